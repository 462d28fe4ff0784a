"""Traced memory of a training step: what counts, by phase, and the largest batch that fits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import TINY

from raytrain.model.canary import Canary
from raytrain.training.memory.live_bytes import cuda_block, rounded
from raytrain.training.memory.prediction import predict_batch_size
from raytrain.training.memory.surface import NeighborLines
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.parallel import micro_batches
from raytrain.training.settings import TrainSettings

MODEL = replace(TINY, encoder_layers=3, encoder_width=64, subsampling_channels=32, ctc_head=True)
# Compiled blocks are traced in test_checkpointed_blocks.py; each tracer takes seconds for them.
SETTINGS = TrainSettings(ctc_weight=0.5, num_workers=1, compile="never")
MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "oomptimizer_cuda_20261128.json"
MIB, GIB = 2**20, 2**30
WEIGHTS = sum(parameter.numel() * 4 for parameter in Canary(MODEL).parameters())


def trace(size: int = 2, duration: int = 2000, tokens: int = 20, settings: TrainSettings = SETTINGS, **options):
    return StepTracer(MODEL, settings, **options).trace(size, duration, tokens)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("parallel", ["none", "ddp", "shard"])
def test_remembered_shapes_change_nothing(precision, checkpointing, parallel):
    settings = replace(SETTINGS, activation_checkpointing=checkpointing, shard=parallel == "shard")
    options = {"precision": precision, "world_size": 1 if parallel == "none" else 2}
    tracer = StepTracer(MODEL, settings, **options)
    shapes = ((2, 2000, 20), (5, 3000, 20))
    plain = [StepTracer(MODEL, settings, **options, remember=False).trace(*shape) for shape in shapes]
    assert [tracer.trace(*shape) for shape in (*shapes, shapes[0])] == [*plain, plain[0]]


def test_what_stays_and_what_grows():
    memory = trace()
    # Parameters and two AdamW moments stay; the gradients come and go.
    assert 3 * WEIGHTS < memory.resident_bytes < 3.8 * WEIGHTS
    assert trace(4).peak_bytes > memory.peak_bytes
    assert trace(duration=4000).peak_bytes > memory.peak_bytes
    assert trace(tokens=60).peak_bytes > memory.peak_bytes
    # DDP's buckets hold the gradients between steps too.
    assert trace(world_size=2).resident_bytes - memory.resident_bytes == pytest.approx(WEIGHTS, abs=512)


def test_the_peak_is_broken_down_by_phase_and_module():
    memory = StepTracer(replace(MODEL, encoder_layers=8), SETTINGS).trace(8, 4000, 20)
    phases, modules = memory.by_phase(), memory.by_module()
    assert sum(phases.values()) == sum(modules.values()) == memory.peak_bytes
    assert next(iter(phases)) == "activations" and next(iter(modules)) == "encoder.layers"
    # Many layers and few utterances: the end of backward is the highest point, where all gradients are.
    deep = StepTracer(replace(MODEL, encoder_layers=8, encoder_width=128), SETTINGS).trace(1, 500, 12)
    assert {"parameters", "optimizer", "gradients"} <= set(deep.by_phase())
    assert deep.by_phase()["gradients"] > 0.9 * deep.by_phase()["parameters"]


@pytest.mark.parametrize("parallel", ["none", "ddp", "shard"])
def test_bf16_saves_activations_and_checkpointing_does_too(parallel):
    peaks = {}
    for precision in ("fp32", "bf16"):
        for checkpointing in ("none", "full"):
            settings = replace(SETTINGS, activation_checkpointing=checkpointing, shard=parallel == "shard")
            tracer = StepTracer(
                replace(MODEL, encoder_layers=6), settings, precision=precision, world_size=1 + (parallel != "none")
            )
            peaks[precision, checkpointing] = tracer.trace(16, 8000, 20).peak_bytes
    assert peaks["bf16", "none"] < 0.85 * peaks["fp32", "none"]
    assert all(peaks[precision, "full"] < 0.9 * peaks[precision, "none"] for precision in ("fp32", "bf16"))


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_autocast_is_traced_for_either_kind_of_device(device_type):
    full, half = (trace(4, 4000, precision=precision, device_type=device_type) for precision in ("fp32", "bf16"))
    assert half.resident_bytes == full.resident_bytes and half.peak_bytes < full.peak_bytes


# --- CUDA


def test_a_step_takes_less_than_was_measured_on_a_gpu_before_its_residual_stream_was_bf16():
    """The measured steps ran under autocast, whose layer norms return float32, and kept attention's scores; traces of
    that code agreed with them to 0.5 %."""
    from benchmarks._models import config_of

    measured = json.loads(MEASURED.read_text())["result"]
    for name, model in measured["models"].items():
        settings = TrainSettings(num_workers=2, precision="bf16", compile="never")
        tracer = StepTracer(config_of(name), settings, precision="bf16", world_size=2)
        for cell in model["cells"]:
            memory = tracer.trace(cell["batch_size"], *cell["edges"])
            assert 0.8 < memory.peak_bytes / GIB / cell["measured_gib"] < 0.97


def test_blocks_of_the_caching_allocator_are_as_large_as_what_they_hold_or_a_little_larger():
    assert [cuda_block(size) for size in (1, 512, 513, 5 * MIB)] == [rounded(size) for size in (1, 512, 513, 5 * MIB)]
    assert cuda_block(16 * MIB) == 16 * MIB  # fills its segment
    assert cuda_block(17 * MIB + 1) == rounded(17 * MIB + 1) + MIB // 4


def test_dropout_keeps_a_mask_of_one_byte_per_element_on_cuda_alone():
    def of_dropout(device_type: str) -> int:
        peaks = []
        for dropout in (0.0, 0.1):
            config = replace(MODEL, encoder_layers=8, dropout=dropout)
            peaks.append(StepTracer(config, SETTINGS, device_type=device_type).trace(16, 4000, 20).peak_bytes)
        return peaks[1] - peaks[0]

    # In fp32 a mask of the input's type has four bytes, and attention on a CPU has masks too.
    assert of_dropout("cpu") > 3.9 * of_dropout("cuda")


# --- sharded


DEEP = replace(MODEL, encoder_layers=24, encoder_width=128)
DEEP_WEIGHTS = sum(parameter.numel() * 4 for parameter in Canary(DEEP).parameters())


def of_rank(world_size: int, precision: str = "fp32", batch: int = 1, **settings):
    chosen = replace(SETTINGS, shard=True, **settings)
    return StepTracer(DEEP, chosen, world_size=world_size, precision=precision).trace(batch, 500, 12)


def test_a_rank_of_a_sharded_model_holds_its_part():
    whole = of_rank(1)
    for world_size in (2, 4):
        part = of_rank(world_size)
        # Sharded weights and moments; the filterbank and other buffers on every rank.
        assert part.resident_bytes == pytest.approx(whole.resident_bytes / world_size, rel=0.1)
        assert part.peak_bytes < whole.peak_bytes
        assert sum(part.by_phase().values()) == part.peak_bytes
        averaged = of_rank(world_size, average_decay=0.999).resident_bytes
        assert averaged - part.resident_bytes == pytest.approx(DEEP_WEIGHTS / world_size, rel=0.05)


def test_a_tracer_of_whole_models_can_be_asked_for():
    settings = replace(SETTINGS, shard=True)
    whole = StepTracer(MODEL, settings, world_size=2, shard=False).trace(2, 2000, 20)
    assert whole == trace(world_size=2)


def test_micro_batches_before_the_last_keep_whole_gradients():
    """FSDP2 reduces with the last micro-batch alone; until then a rank has gradients of the whole model."""
    assert of_rank(4, accumulate=2).peak_bytes - of_rank(4).peak_bytes > 0.5 * DEEP_WEIGHTS


def test_fewer_workers_than_the_most_accumulate():
    assert [micro_batches(TrainSettings(num_workers=(1, 4)), ranks) for ranks in (1, 2, 3, 4)] == [2, 2, 2, 1]
    assert micro_batches(TrainSettings(num_workers=4, accumulate=3), 4) == 2
    assert [micro_batches(TrainSettings(num_workers=2), ranks) for ranks in (1, 2)] == [1, 1]
    elastic = of_rank(2, num_workers=(2, 4)).peak_bytes
    assert elastic == of_rank(2, accumulate=2).peak_bytes > of_rank(2).peak_bytes


def test_gathered_weights_live_for_a_block_or_two_but_the_copies_of_autocast_for_all():
    full, half = of_rank(8).peak_bytes, of_rank(8, "bf16").peak_bytes
    # fp32: an eighth of weights, moments and gradients, and the blocks in use; bf16 saves a copy of every matrix.
    assert full < 0.95 * DEEP_WEIGHTS
    assert half - full == pytest.approx(0.5 * DEEP_WEIGHTS, rel=0.3)


# --- the largest batch


def test_the_prediction_is_the_largest_batch_by_brute_force_for_every_budget():
    tracer = StepTracer(MODEL, SETTINGS, precision="bf16", world_size=2)
    for duration, tokens in ((1500, 12), (9000, 60)):
        peaks = [tracer.trace(size, duration, tokens).peak_bytes for size in range(1, 12)]
        for low, high in zip(peaks, peaks[1:], strict=False):
            budget = (low + high) // 2
            predicted = predict_batch_size(tracer, duration, tokens, budget, max_size=1000)
            wanted = sum(peak <= budget for peak in peaks)
            # Between two traced sizes the line lies above the truth, hence sometimes one less.
            assert wanted - 1 <= predicted.batch_size <= wanted
            assert predicted.num_traces <= 6
        assert predict_batch_size(tracer, duration, tokens, peaks[0] - 1, 1000).batch_size is None
        assert predict_batch_size(tracer, duration, tokens, peaks[8], max_size=6).batch_size == 6


def test_most_predictions_are_exact_and_take_three_traces():
    tracer = StepTracer(MODEL, SETTINGS, world_size=2)
    exact, traces = 0, 0
    for wanted in range(9, 40, 3):
        budget = sum(tracer.trace(size, 3000, 30).peak_bytes for size in (wanted, wanted + 1)) // 2
        predicted = predict_batch_size(tracer, 3000, 30, budget, max_size=1000)
        exact += predicted.batch_size == wanted
        traces += predicted.num_traces
        assert abs(predicted.peak_bytes - tracer.trace(predicted.batch_size, 3000, 30).peak_bytes) < 0.001 * budget
    assert exact >= 9 and traces <= 11 * 4


def test_estimates_from_neighbors_save_traces():
    tracer, neighbors = StepTracer(MODEL, SETTINGS, world_size=2), NeighborLines()
    assert neighbors.guess(1000, 12) is None
    budget = tracer.trace(60, 6000, 30).peak_bytes
    traces = []
    for duration in range(2000, 9000, 700):
        for tokens in (20, 50):
            predicted = predict_batch_size(tracer, duration, tokens, budget, 1000, neighbors.guess(duration, tokens))
            alone = predict_batch_size(tracer, duration, tokens, budget, 1000)
            assert 0.97 * alone.batch_size <= predicted.batch_size <= alone.batch_size * 1.02
            neighbors.add(duration, tokens, predicted.line)
            traces.append(predicted.num_traces)
    assert sum(traces[5:]) <= 1.6 * len(traces[5:])
