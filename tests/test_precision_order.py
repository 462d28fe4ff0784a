"""NeMo's order of operations beside the model's own, and the benchmark that compares their loss curves."""

import json
import random
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TINY
from torch import nn

from benchmarks._autocast import autocast_order, uncompiled
from benchmarks.precision_curve import compared, measure, recipe, smoothed
from raytrain.data.batch import SpeechBatch
from raytrain.model.block import Block
from raytrain.model.canary import Canary
from raytrain.model.decoder import DecoderBlock
from raytrain.model.encoder import ConformerBlock
from raytrain.training.optim import make_optimizer
from raytrain.training.settings import TrainSettings
from raytrain.training.step import train_step

MODEL = replace(TINY, encoder_layers=2, decoder_layers=2)


def outputs(module: nn.Module, config=MODEL, dtype=torch.bfloat16):
    torch.manual_seed(1)
    batch = SpeechBatch.synthetic(2, 1200, 12, vocab=config.vocab_size, device="cpu")
    return module(batch.audio, batch.audio_lengths, batch.input_ids, batch.input_lengths, dtype=dtype)


def stream_types(model: Canary, run) -> tuple[list[torch.dtype], set[torch.dtype], set[torch.dtype]]:
    """The types of the residual stream at each block's input and at the encoder's output, of layer norms' outputs, and
    of linear layers' outputs."""
    stream, norms, linear = [], set(), set()
    hooks = [model.encoder.register_forward_hook(lambda module, inputs, output: stream.append(output[0].dtype))]
    for module in model.modules():
        if isinstance(module, (ConformerBlock, DecoderBlock)):
            hooks.append(module.register_forward_pre_hook(lambda module, inputs: stream.append(inputs[0].dtype)))
        if isinstance(module, (nn.LayerNorm, nn.Linear)):
            seen = norms if isinstance(module, nn.LayerNorm) else linear
            hooks.append(module.register_forward_hook(lambda *call, seen=seen: seen.add(call[2].dtype)))
    run()
    for hook in hooks:
        hook.remove()
    return stream, norms, linear


@pytest.mark.parametrize("decoder_width", [32, 48])
def test_the_residual_stream_is_bf16_and_in_nemo_s_order_float32(decoder_width):
    """The first block of an encoder gets what a linear layer returns, and autocast's is bf16 too."""
    config = replace(MODEL, decoder_width=decoder_width)
    model, low, full = Canary(config).train(), torch.bfloat16, torch.float32
    stream, norms, linear = stream_types(model, lambda: outputs(model, config))
    assert stream == [low] * 5 and linear == {low}
    assert norms == {low, full}  # float32 in the embedding alone, whose input is float32
    with autocast_order(model) as reference:
        stream, norms, linear = stream_types(model, lambda: outputs(reference, config))
    assert stream == [low, full, full, full, full] and norms == {full} and linear == {low}


def test_the_order_changes_rounding_alone_and_ends_with_its_context():
    torch.manual_seed(0)
    model = Canary(replace(MODEL, dropout=0.0)).eval()
    before, exact = outputs(model).logits, outputs(model, dtype=torch.float32).logits
    with autocast_order(model) as reference:
        rounded = outputs(reference).logits
        assert torch.equal(outputs(reference, dtype=torch.float32).logits, exact)
    assert rounded.dtype == torch.bfloat16 and not torch.equal(rounded, before)
    for logits in (rounded, before):
        assert (logits - exact).norm() < 0.03 * exact.norm()
    assert torch.equal(outputs(model).logits, before)


def test_a_step_trains_the_model_through_the_reference():
    model, settings = Canary(MODEL).train(), TrainSettings()
    weights = [parameter.clone() for parameter in model.parameters()]
    with autocast_order(model) as reference:
        batch = SpeechBatch.synthetic(2, 1200, 12, vocab=40, device="cpu")
        result = train_step(reference, [batch], make_optimizer(reference, settings), settings, precision="bf16")
    assert result.sums.isfinite().all() and not result.skipped
    changed = [not torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True)]
    assert all(changed)


def test_compiled_blocks_run_uncompiled_in_the_context_alone():
    model, calls = Canary(MODEL).train(), []

    def compiled(block, *inputs):
        calls.append(type(block))
        return block.compute(*inputs)

    for block in model.modules():
        if isinstance(block, Block):
            block.compiled = compiled
    with uncompiled(model):
        outputs(model)
    with autocast_order(model) as reference:
        outputs(reference)
    assert not calls
    outputs(model)
    assert len(calls) == 4


# --- curves


def test_curves_are_means_of_windows():
    assert smoothed([1.0, 3.0, 2.0, 2.0, 9.0], 2) == [2.0, 2.0]


def test_points_outside_the_band_are_counted_with_their_distance():
    reference = {1: [3.0, 2.0], 2: [4.0, 2.5], 3: [5.0, 2.2]}
    inside = compared(reference, reference)
    assert inside["above"] == inside["below"] == inside["mean_curve_outside"] == inside["paired_most"] == 0
    found = compared({1: [2.5, 2.4], 2: [4.0, 2.75]}, reference)
    assert (found["points"], found["above"], found["below"]) == (4, 1, 1)
    assert (found["most_above"], found["most_below"], found["mean_band_width"]) == (0.25, 0.5, 1.25)
    assert found["mean_curve_outside"] == 1  # (2.4 + 2.75) / 2 > 2.5
    assert found["paired_mean"] == pytest.approx((-0.5 + 0.4 + 0 + 0.25) / 4, abs=1e-4) and found["paired_most"] == 0.5


def corpus(folder: Path) -> Path:
    rng, rows = random.Random(0), []
    for number in range(16):
        text = " ".join(rng.choices(("one", "two", "three"), k=3))
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(
                np.random.default_rng(number).integers(-3000, 3000, 9600 + 160 * number, "int16").tobytes()
            )
        rows.append({"audio_filepath": f"{number}.wav", "duration": 0.6 + number / 100, "text": text})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_seed_gives_the_same_weights_batches_and_random_numbers_in_each_order(tmp_path):
    shared = recipe(corpus(tmp_path), 2, 2, 1.0)
    shared = replace(shared, model=replace(MODEL, vocab_size=shared.model.vocab_size, ctc_head=True))
    first, again = (shared.losses("fp32", 3) for _ in range(2))
    assert first == again != shared.losses("fp32", 4)
    others = [shared.losses(order, 3) for order in ("autocast", "stream")]
    assert others[0] != others[1]
    for losses in others:
        assert losses == pytest.approx(first, rel=0.02) and losses != first
    result = measure(replace(shared, settings=replace(shared.settings, max_steps=25)), ["autocast", "stream"], [1])
    assert result["stream beside autocast"]["points"] == 1 and result["curves"]["stream"][1][0] < first[0]


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"train\.jsonl is not a file; allowed: .*; to do: .*--corpus"):
        recipe(tmp_path / "nowhere", 2, 2, 1.0)
