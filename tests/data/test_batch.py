"""Batches: decoder input, labels and CTC targets are views of one padded sequence."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data.batch import SpeechBatch
from raytrain.errors import DataError

PROMPT, EOS, PAD = [7, 4, 8], 3, 2


def make_batch(texts: list[list[int]]) -> SpeechBatch:
    audios = [np.full(10 + len(text), 0.5, np.float32) for text in texts]
    return SpeechBatch.collate(audios, [[*PROMPT, *text, EOS] for text in texts], [3] * len(texts), pad_id=PAD)


@given(texts=st.lists(st.lists(st.integers(20, 90), max_size=9), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_parts_of_a_batch_give_back_what_went_in(texts):
    batch = make_batch(texts)
    targets, target_lengths = batch.ctc_targets(), batch.ctc_target_lengths()
    assert targets.shape == batch.tokens.shape
    for row, text in enumerate(texts):
        length = int(batch.input_lengths[row])
        assert batch.input_ids[row, :length].tolist() == [*PROMPT, *text]
        assert batch.labels[row, :length].tolist() == [*PROMPT[1:], *text, EOS]
        assert int(target_lengths[row]) == len(text)
        assert targets[row].tolist() == text + [0] * (targets.shape[1] - len(text))
        assert (batch.tokens[row, length + 1 :] == PAD).all()
        samples = 10 + len(text)
        assert int(batch.audio_lengths[row]) == samples
        assert (batch.audio[row, :samples] == 0.5).all() and (batch.audio[row, samples:] == 0).all()


def test_dtypes_are_fixed_and_a_move_keeps_all_tensors():
    batch = make_batch([[20], [21, 22]]).to("cpu")
    assert [tensor.dtype for tensor in batch.tensors()] == [torch.float32, *[torch.int64] * 4]


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 30])
def test_synthetic_batches_have_valid_lengths_at_any_edge(max_tokens):
    batch = SpeechBatch.synthetic(2, 1000, max_tokens, vocab=50, device="cpu")
    assert (batch.ctc_target_lengths() >= 0).all() and (batch.input_lengths >= 1).all()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_synthetic_batches_have_the_shapes_of_real_ones(device):
    batch = SpeechBatch.synthetic(2, 1500, 16, vocab=50, device=device)
    assert batch.audio.shape == (2, 24000) and batch.tokens.shape == (2, 16) and len(batch) == 2
    assert [tensor.dtype for tensor in batch.tensors()] == [torch.float32, *[torch.int64] * 4]
    assert batch.input_ids.shape == batch.labels.shape == (2, 15)
    derived = batch.ctc_targets(), batch.ctc_target_lengths(), batch.input_lengths
    assert [tensor.shape for tensor in derived] == [(2, 16), (2,), (2,)]
    assert all(tensor.device.type == device for tensor in derived)


def test_an_empty_or_uneven_batch_is_refused():
    for audios, tokens in (([], []), ([np.zeros(3, np.float32)], [])):
        with pytest.raises(DataError, match="same utterances"):
            SpeechBatch.collate(audios, tokens, [], pad_id=PAD)
