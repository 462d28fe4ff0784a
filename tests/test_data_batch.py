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
        assert targets[row, : int(target_lengths[row])].tolist() == text
        assert (batch.tokens[row, length + 1 :] == PAD).all()
        assert (batch.audio[row, 10 + len(text) :] == 0).all() and int(batch.audio_lengths[row]) == 10 + len(text)


def test_dtypes_are_fixed_and_a_move_keeps_all_tensors():
    batch = make_batch([[20], [21, 22]]).to("cpu")
    assert [tensor.dtype for tensor in batch.tensors()] == [torch.float32, *[torch.int64] * 4]


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 30])
def test_synthetic_batches_have_valid_lengths_at_any_edge(max_tokens):
    batch = SpeechBatch.synthetic(2, 1000, max_tokens, vocab=50, device="cpu")
    assert (batch.ctc_target_lengths() >= 0).all() and (batch.input_lengths >= 1).all()


def test_everything_derived_works_without_data():
    batch = SpeechBatch.synthetic(2, 1000, 16, vocab=50, device="meta")
    assert batch.input_ids.shape == batch.labels.shape == (2, 15)
    assert batch.ctc_targets().shape == (2, 16) and batch.ctc_targets().is_meta
    assert batch.ctc_target_lengths().is_meta


def test_an_empty_or_uneven_batch_is_refused():
    for audios, tokens in (([], []), ([np.zeros(3, np.float32)], [])):
        with pytest.raises(DataError, match="same utterances"):
            SpeechBatch.collate(audios, tokens, [], pad_id=PAD)
