"""Traced memory of a training step: what counts, by whom, and the largest batch that fits by it."""

from dataclasses import replace

import pytest

from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.training.memory import Neighbours, StepTracer, predict_batch_size
from raytrain.training.settings import TrainSettings

MODEL = ModelConfig(
    encoder_layers=3, encoder_width=64, encoder_heads=2, subsampling_channels=32, decoder_layers=1, decoder_width=32,
    decoder_heads=2, max_positions=64, vocab_size=40, ctc_head=True,
)  # fmt: skip
SETTINGS = TrainSettings(ctc_weight=0.5)
WEIGHTS = sum(parameter.numel() * 4 for parameter in Canary(MODEL).parameters())


def trace(size: int = 2, duration: int = 2000, tokens: int = 20, settings: TrainSettings = SETTINGS, **options):
    return StepTracer(MODEL, settings, **options).trace(size, duration, tokens)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_remembered_shapes_change_nothing(precision, checkpointing, world_size):
    settings = replace(SETTINGS, activation_checkpointing=checkpointing)
    options = {"precision": precision, "world_size": world_size}
    tracer = StepTracer(MODEL, settings, **options)
    for size, duration in ((2, 2000), (5, 3000), (2, 2000)):
        plain = StepTracer(MODEL, settings, **options, remember=False).trace(size, duration, 20)
        assert tracer.trace(size, duration, 20) == plain


def test_what_stays_and_what_grows():
    memory = trace()
    # Parameters and two AdamW moments stay; the gradients come and go.
    assert 3 * WEIGHTS < memory.resident_bytes < 3.8 * WEIGHTS
    assert trace(4).peak_bytes > memory.peak_bytes
    assert trace(duration=4000).peak_bytes > memory.peak_bytes
    assert trace(tokens=60).peak_bytes > memory.peak_bytes
    # DDP's buckets hold the gradients between steps too.
    assert trace(world_size=2).resident_bytes - memory.resident_bytes == pytest.approx(WEIGHTS, abs=512)


def test_the_peak_is_told_by_phase_and_by_module():
    memory = trace(8, 4000)
    phases, modules = memory.by_phase(), memory.by_module()
    assert sum(phases.values()) == sum(modules.values()) == memory.peak_bytes
    assert next(iter(phases)) == "activations" and next(iter(modules)) == "encoder.pre_encode"
    # Many layers and few utterances: the end of backward is the highest point, where all gradients are.
    deep = StepTracer(replace(MODEL, encoder_layers=8, encoder_width=128), SETTINGS).trace(1, 500, 12)
    assert {"parameters", "optimizer", "gradients"} <= set(deep.by_phase())
    assert deep.by_phase()["gradients"] > 0.9 * deep.by_phase()["parameters"]


def test_bf16_saves_activations_and_checkpointing_does_too():
    full, half = trace(16, 8000), trace(16, 8000, precision="bf16")
    assert half.resident_bytes == full.resident_bytes
    assert half.peak_bytes < 0.85 * full.peak_bytes
    saving = replace(SETTINGS, activation_checkpointing=True)
    for precision in ("fp32", "bf16"):
        assert (
            trace(16, 8000, settings=saving, precision=precision).peak_bytes
            < trace(16, 8000, precision=precision).peak_bytes
        )


def test_the_prediction_is_the_largest_batch_by_brute_force_for_every_budget():
    tracer = StepTracer(MODEL, SETTINGS, precision="bf16", world_size=2)
    for duration, tokens in ((1500, 12), (9000, 60)):
        peaks = [tracer.trace(size, duration, tokens).peak_bytes for size in range(1, 12)]
        for low, high in zip(peaks, peaks[1:], strict=False):
            budget = (low + high) // 2
            found = predict_batch_size(tracer, duration, tokens, budget, max_size=1000)
            wanted = sum(peak <= budget for peak in peaks)
            # Between two traced sizes the line lies above the truth, hence one less at times.
            assert wanted - 1 <= found.batch_size <= wanted
            assert found.num_traces <= 6
        assert predict_batch_size(tracer, duration, tokens, peaks[0] - 1, 1000).batch_size is None
        assert predict_batch_size(tracer, duration, tokens, peaks[8], max_size=6).batch_size == 6


def test_most_predictions_are_exact_and_take_three_traces():
    tracer = StepTracer(MODEL, SETTINGS, world_size=2)
    exact, traces = 0, 0
    for wanted in range(9, 40, 3):
        budget = sum(tracer.trace(size, 3000, 30).peak_bytes for size in (wanted, wanted + 1)) // 2
        found = predict_batch_size(tracer, 3000, 30, budget, max_size=1000)
        exact += found.batch_size == wanted
        traces += found.num_traces
        assert abs(found.peak_bytes - tracer.trace(found.batch_size, 3000, 30).peak_bytes) < 0.001 * budget
    assert exact >= 9 and traces <= 11 * 4


def test_neighbours_suggest_what_saves_traces():
    tracer, neighbours = StepTracer(MODEL, SETTINGS, world_size=2), Neighbours()
    assert neighbours.guess(1000, 12) is None
    budget = tracer.trace(60, 6000, 30).peak_bytes
    traces = []
    for duration in range(2000, 9000, 700):
        for tokens in (20, 50):
            found = predict_batch_size(tracer, duration, tokens, budget, 1000, neighbours.guess(duration, tokens))
            alone = predict_batch_size(tracer, duration, tokens, budget, 1000)
            assert 0.97 * alone.batch_size <= found.batch_size <= alone.batch_size * 1.02
            neighbours.add(duration, tokens, found.line)
            traces.append(found.num_traces)
    assert sum(traces[5:]) <= 1.6 * len(traces[5:])
