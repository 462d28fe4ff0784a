"""The model: shapes, sizes, gradients, meta tensors; and equality with NeMo where its outputs are available."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from tiny_models import TINY as SMALLEST

from raytrain.config import load_config
from raytrain.data.batch import SpeechBatch
from raytrain.decoding.search import decode
from raytrain.decoding.settings import DecodeSettings
from raytrain.model.canary import Canary, CanaryOutput, exported_state
from raytrain.model.config import SpecAugmentSettings
from raytrain.model.dropout import dropout
from raytrain.model.features import SpecAugment
from raytrain.model.formats.nemo import read_nemo
from raytrain.model.loss import canary_loss
from raytrain.model.relative_attention_twin import shift

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = replace(SMALLEST, encoder_layers=2, decoder_layers=2, decoder_width=48, vocab_size=61, ctc_head=True)


def loss_of(model: Canary, batch: SpeechBatch, smoothing: float = 0.1):
    output = model(batch.audio, batch.audio_lengths, batch.input_ids, batch.input_lengths)
    return canary_loss(
        output,
        batch.labels,
        batch.input_lengths,
        ctc_targets=batch.ctc_targets(),
        ctc_target_lengths=batch.ctc_target_lengths(),
        ctc_weight=0.5,
        label_smoothing=smoothing,
    )


@pytest.mark.parametrize(
    ("name", "millions"),
    [("canary-1b", 1016.7), ("canary-1b-flash", 883.6), ("canary-180m-flash", 182.6), ("canary-tiny", 7.4)],
)
def test_parameter_counts_of_the_shipped_models(name, millions):
    with torch.device("meta"):
        model = Canary(load_config(CONFIGS / f"{name}.yaml").model)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


def test_every_parameter_gets_a_finite_gradient():
    torch.manual_seed(0)
    model = Canary(TINY).train()
    batch = SpeechBatch.synthetic(3, 900, 16, vocab=61, device="cpu")
    loss = loss_of(model, batch)
    loss.total_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert int(loss.num_tokens) == 3 * 15


def test_the_loss_is_nemos_smoothed_cross_entropy_over_valid_labels():
    torch.manual_seed(0)
    vocab, smoothing = 7, 0.2
    logits, labels = torch.randn(2, 5, vocab), torch.randint(0, vocab, (2, 5))
    output = CanaryOutput(logits, torch.empty(0), torch.empty(0), None)
    plain = {"ctc_targets": None, "ctc_target_lengths": None, "ctc_weight": 0.0, "label_smoothing": smoothing}
    log_probs = logits.log_softmax(-1)
    for prompts in (None, torch.tensor([3, 2])):
        loss = canary_loss(output, labels, torch.tensor([5, 3]), prompt_lengths=prompts, **plain)
        first = [0, 0] if prompts is None else [2, 1]
        label_positions = [(row, i) for row, size in ((0, 5), (1, 3)) for i in range(first[row], size)]
        wanted = 0.0
        for row, i in label_positions:
            row_log_probs = log_probs[row, i]
            wrong = row_log_probs.sum() - row_log_probs[labels[row, i]]
            # 1 − ε on the label, ε spread over the others.
            wanted -= (1 - smoothing) * row_log_probs[labels[row, i]] + smoothing / (vocab - 1) * wrong
        assert int(loss.num_tokens) == len(label_positions)
        torch.testing.assert_close(loss.total_sum, wanted)


def test_spec_augment_masks_as_much_as_it_should_and_only_in_training():
    torch.manual_seed(0)
    mel, frames = torch.ones(64, 128, 400), torch.full((64,), 400)
    augment = SpecAugment(SpecAugmentSettings(freq_masks=2, freq_width=27, time_masks=10, time_width=0.05))
    assert torch.equal(augment.eval()(mel, frames), mel)
    hidden = augment.train()(mel, frames) == 0
    times, bins = hidden.all(1).float().mean(), hidden.all(2).sum(1)
    # Ten spans of 0 to 20 frames, a few of which overlap; two of 0 to 26 bins.
    assert 0.15 < times < 0.25 and bins.max() <= 52 and 18 < bins.float().mean() < 28
    short = augment(torch.ones(64, 128, 400), torch.full((64,), 40))
    assert not (short[:, :, 60:] == 0).all(1).any(), "spans lie within the utterance"


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1001, 333, requires_grad=True)
    y = dropout(x, 0.1, True)
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=2e-3)
    assert y.mean().item() == pytest.approx(1, abs=2e-3) and y.max().item() == pytest.approx(1 / 0.9, abs=1e-4)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach()) and dropout(x, 0.1, False) is x
    both = dropout(torch.ones(4, 50_000), 0.5, True) > 0
    assert abs(torch.corrcoef(both.float())[0, 1:]).max() < 0.02


def test_the_step_runs_on_meta_tensors():
    with torch.device("meta"):
        model = Canary(TINY).train()
    loss = loss_of(model, SpeechBatch.synthetic(2, 700, 12, vocab=61, device="meta"))
    loss.total_sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_made_on_meta_equals_one_made_here_after_its_constants_are_filled():
    direct = Canary(TINY)
    with torch.device("meta"):
        moved = Canary(TINY)
    moved.to_empty(device="cpu")
    moved.load_state_dict(direct.state_dict())
    moved.reset_constants()
    for name, value in direct.state_dict().items():
        assert torch.equal(value, moved.state_dict()[name]), name


def test_the_ctc_head_is_left_out_of_an_export():
    model = Canary(TINY)
    plain = Canary(replace(TINY, ctc_head=False))
    plain.load_state_dict(exported_state(model))
    assert not [name for name in plain.state_dict() if "ctc" in name]


def test_padding_changes_nothing():
    torch.manual_seed(0)
    model = Canary(TINY).eval()
    audio = torch.randn(1, 8000)
    with torch.no_grad():
        alone, length = model.encode(audio, torch.tensor([8000]))
        padded, _ = model.encode(torch.nn.functional.pad(audio, (0, 5000)), torch.tensor([8000]))
    size = int(length)
    torch.testing.assert_close(alone[:, :size], padded[:, :size], atol=1e-5, rtol=1e-4)


def test_relative_shift_puts_position_i_minus_j_at_i_j():
    time = 4
    positions = torch.arange(time - 1, -time, -1).float()
    shifted = shift(positions.expand(1, 1, time, 2 * time - 1).contiguous())[0, 0]
    wanted = torch.arange(time)[:, None] - torch.arange(time)[None]
    assert torch.equal(shifted, wanted.float())


def uncached_greedy(model, states, lengths, prompt, eos, delta):
    ids, limit = list(prompt), min(model.config.max_positions, int(lengths) + delta)
    while len(ids) < limit:
        logits = model.decode_logits(torch.tensor([ids]), states[:, : int(lengths)], lengths)
        best = int(logits[0, -1].argmax())
        if best == eos:
            break
        ids.append(best)
    return ids[len(prompt) :]


def greedy(model, states, lengths, prompt, delta):
    """Generated ids of each utterance after one prompt, with 3 as the end of text."""
    prompts, sizes = torch.tensor([prompt] * len(lengths)), torch.full((len(lengths),), len(prompt))
    decoded = decode(model, states, lengths, prompts, sizes, 3, DecodeSettings(max_generation_delta=delta))
    return [hypotheses[0].ids for hypotheses in decoded]


def test_cached_decoding_equals_uncached_and_batch_equals_single():
    torch.manual_seed(1)
    model = Canary(TINY).eval()
    for name, weight in model.named_parameters():
        if "transf_decoder" in name and weight.ndim == 2:
            weight.data *= 3  # varied outputs
    audio, lengths = torch.randn(4, 16000), torch.tensor([16000, 9000, 3000, 12000])
    prompt = [7, 4, 8]
    with torch.no_grad():
        states, sizes = model.encode(audio, lengths)
        decoded = greedy(model, states, sizes, prompt, 20)
        for row in range(4):
            wanted = uncached_greedy(model, states[row : row + 1], sizes[row : row + 1], prompt, 3, 20)
            assert decoded[row] == wanted
    assert len({tuple(ids) for ids in decoded}) > 1


def reference(name: str):
    root = SHARED / "reference" / name
    if not root.exists():
        pytest.skip(f"the recorded outputs of NeMo are not available (looked for {root.name} in $RAYTRAIN_SHARED)")
    model = read_nemo(root / "model.nemo").build()
    expected = {key: torch.tensor(value) for key, value in np.load(root / "expected.npz").items()}
    return model, expected, json.loads(Path(root / "decode_single.json").read_text())


@pytest.mark.parametrize("name", ["tiny-canary", "tiny-canary2"])
def test_equal_to_nemo(name):
    model, expected, decoded = reference(name)
    with torch.no_grad():
        mel, frames = model.preprocessor(expected["wave"], expected["wave_len"])
        states, lengths = model.encode(expected["wave"], expected["wave_len"])
        log_probs = model.decode_logits(expected["ids"], states, lengths).log_softmax(-1)
        assert torch.equal(frames, expected["mel_len"]) and torch.equal(lengths, expected["enc_len"])
        generated = greedy(model, states, lengths, decoded["prompt"], decoded["max_generation_delta"])
    for row in range(3):
        for value, key, size in (
            (mel[row].T, "mel", frames[row]),
            (states[row], "enc", lengths[row]),
            (log_probs[row], "logp", expected["ids_len"][row]),
        ):
            wanted = expected[key][row].T if key == "mel" else expected[key][row]
            assert (value[:size] - wanted[:size]).abs().max() < 1e-4, key
        wanted = decoded["beam1"][row]
        size = min(len(wanted), len(generated[row]))
        assert size and generated[row][:size] == wanted[:size]
