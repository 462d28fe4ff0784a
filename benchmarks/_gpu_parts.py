"""Parts of `benchmarks.gpu` that need only torch, numpy and sentencepiece: the GPU, predicted and measured memory,
training steps, and RTFx."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks import _gpu_memory
from benchmarks import rtfx as rtfx_benchmark
from benchmarks._autocast import autocast_order
from benchmarks._gpu import (
    GIB,
    Shape,
    matrix_product_tflops,
    matrix_size,
    nvidia_smi,
    peak_gib,
    profiled,
    release_memory,
    reset_peak,
    seconds_per_call,
    significant,
    step_flops,
    wait_for,
)
from benchmarks._gpu_run import Bench
from benchmarks._models import config_of, random_model
from benchmarks.train_step import stepper
from raytrain.model.canary import Canary
from raytrain.model.compilation import is_compiled
from raytrain.model.config import ModelConfig
from raytrain.training.acceleration import accelerate
from raytrain.training.memory.meter import Edges, Meter
from raytrain.training.memory.prediction import Prediction, predict_batch_size
from raytrain.training.memory.step_meter import StepMeter
from raytrain.training.memory.surface import NeighborLines
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.settings import TrainSettings
from raytrain.training.step import resolve_precision

MODELS = ("canary-1b-flash", "canary-1b", "canary-180m-flash")
# The longest bucket with many and with fewer tokens, and two sizes typical of a corpus.
CELLS: tuple[Edges, ...] = ((40000, 233), (22090, 146), (17060, 65), (4000, 30))
TINY_CELLS: tuple[Edges, ...] = ((4000, 30), (1000, 12))
SHAPES: tuple[Shape, ...] = ((64, 20.0, 90), (16, 40.0, 220), (256, 5.0, 30))
TINY_SHAPES: tuple[Shape, ...] = ((2, 1.0, 12), (1, 2.0, 24))
MEMORY_FRACTION = 0.9


# --- card


def card(bench: Bench) -> None:
    """Name, memory, driver and versions of the first GPU, and the rate of a large bf16 matrix product."""
    facts: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if bench.on_cuda:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "name": properties.name,
            "gpus": torch.cuda.device_count(),
            "gib": round(properties.total_memory / GIB, 2),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        fields = ("driver_version", "power.limit", "clocks.max.sm", "temperature.gpu")
        values = nvidia_smi(*fields)
        facts |= dict(zip(("driver", "power_limit_w", "max_mhz", "celsius"), values, strict=True)) if values else {}
    bench.report("facts", facts)
    size = matrix_size(bench.tiny)
    bench.report("matrix product", {"size": size, "tflops": significant(matrix_product_tflops(bench.device, size))})


# --- memory


def memory(bench: Bench) -> None:
    """Predicted and measured peaks of each model's cells, at the largest predicted batch."""
    for name in ("canary-tiny",) if bench.tiny else MODELS:
        config, settings = config_of(name), TrainSettings(num_workers=2)
        budget, precision = _budget(bench), resolve_precision(settings.precision, bench.device)
        tracer = StepTracer(config, settings, precision=precision, world_size=2, device_type=bench.device)
        edges = TINY_CELLS if bench.tiny else CELLS
        predictions = _predictions(tracer, edges, budget, 4 if bench.tiny else 4096)
        meter = StepMeter(config, settings, budget if bench.on_cuda else None, bench.device)
        for cell, prediction in zip(edges, predictions, strict=True):
            figures = measure_cell(meter, cell, prediction)
            if not bench.on_cuda and "measured_gib" in figures:  # it is that of the whole process
                figures["process_gib"] = figures.pop("measured_gib")
                del figures["error"]
            bench.report(f"{name} {cell[0]} ms {cell[1]} tokens", figures)
        del meter
        release_memory(bench.device)


def _budget(bench: Bench) -> int:
    """Bytes that a step may use."""
    if not bench.on_cuda:
        return GIB
    return int(torch.cuda.get_device_properties(0).total_memory * MEMORY_FRACTION)


def _predictions(tracer: StepTracer, cells: tuple[Edges, ...], budget: int, max_size: int) -> list[Prediction]:
    neighbors, predictions = NeighborLines(), []
    for cell in cells:
        predictions.append(predict_batch_size(tracer, *cell, budget, max_size, neighbors.guess(*cell)))
        neighbors.add(*cell, predictions[-1].line)
    return predictions


def measure_cell(meter: Meter, cell: Edges, prediction: Prediction, tries: int = 4) -> dict[str, Any]:
    """Probe the predicted batch, reduced by 5 % until it fits; returns the predicted and measured peak of the batch
    that fits.

    `predicted_shares` are those of the largest batch that was traced.
    """
    size = prediction.batch_size
    figures: dict[str, Any] = {"predicted_size": size}
    for _ in range(tries if size else 0):
        probe = meter.measure(size, cell, 3)
        if probe.fits:
            break
        figures["did_not_fit"] = [*figures.get("did_not_fit", []), size]
        size = min(size - 1, int(size * 0.95))
    else:
        return figures | {"why": "not even 1 is predicted to fit" if size is None else "none of these fits"}
    figures |= {"batch_size": size, "step_seconds": significant(probe.step_seconds)}
    line, step = prediction.line, prediction.step
    predicted = prediction.peak_bytes if size == prediction.batch_size else line.base_bytes + size * line.slope_bytes
    if probe.peak_bytes is not None:
        figures |= {
            "predicted_gib": significant(predicted / GIB),
            "measured_gib": significant(probe.peak_bytes / GIB),
            "error": round(predicted / probe.peak_bytes - 1, 4),
        }
    shares = {phase: round(num_bytes / step.peak_bytes, 4) for phase, num_bytes in step.by_phase().items()}
    return figures | {"predicted_shares": shares}


def memory_questions(bench: Bench) -> None:
    """What the tracer can't know: what libraries keep, what each kind of layer needs, what a failed probe leaves
    behind."""
    bench.report("workspaces", _gpu_memory.workspaces(bench.device))  # first: they are allocated once per process
    for row in _gpu_memory.layers(bench.device, 1 if bench.tiny else 64):
        bench.report(row.pop("layer"), row)
    model = config_of("canary-tiny") if bench.tiny else None
    bench.report("after a failed probe", _gpu_memory.left_over(bench.device, model))


# --- step


def step(bench: Bench) -> None:
    """Training steps of canary-1b-flash in NeMo's order, uncompiled, and as training runs them: seconds, FLOP/s
    relative to the reference, memory, profiles; and how long the compiler takes.

    What needs no compiler comes first, so that a slow one leaves something to report.
    """
    config = config_of("canary-tiny" if bench.tiny else "canary-1b-flash")
    shapes = TINY_SHAPES if bench.tiny else SHAPES
    model = random_model(config, bench.device).to(bench.device).train()
    for shape in shapes:
        with autocast_order(model) as reference:
            bench.report(f"autocast {_named(shape)}", measure_step(bench, reference, config, shape))
        bench.report(f"uncompiled {_named(shape)}", measure_step(bench, model, config, shape))
    bench.report("compilation", {"seconds": significant(_prepare(model, bench.device)), "compiled": is_compiled(model)})
    for shape in shapes:
        bench.report(_named(shape), measure_step(bench, model, config, shape))
    for shape in shapes:
        bench.report(f"profile {_named(shape)}", _profile(bench, model, shape))
    if is_compiled(model):
        torch.compiler.reset()  # forgets the code in memory, not on disk: as in the next process
        bench.report("compilation again", {"seconds": significant(_prepare(model, bench.device))})


def _prepare(model: Canary, device: str) -> float:
    """Seconds to prepare a model as training does, including the compiler's warm-up."""
    start = time.perf_counter()
    accelerate(model, TrainSettings(), resolve_precision("auto", device))
    wait_for(device)
    return time.perf_counter() - start


def _profile(bench: Bench, model: nn.Module, shape: Shape) -> dict[str, Any]:
    release_memory(bench.device)
    try:
        work = stepper(model, shape, bench.device)
        work()
        return profiled(work, bench.device)
    except torch.OutOfMemoryError:
        return {"why": "out of memory"}


def _named(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]:g} s {shape[2]} tokens"


def measure_step(bench: Bench, model: nn.Module, config: ModelConfig, shape: Shape) -> dict[str, Any]:
    """Figures of one shape; the batch is halved until it fits on the GPU."""
    batch, seconds, tokens = shape
    rate = matrix_product_tflops(bench.device, matrix_size(bench.tiny))
    while batch >= 1:
        release_memory(bench.device)
        reset_peak(bench.device)
        # Memory is released only after the except block, when no traceback holds the failed step's tensors.
        try:
            work = stepper(model, (batch, seconds, tokens), bench.device)
            taken = seconds_per_call(work, bench.device, 0.2 if bench.tiny else 2.0)
            break
        except torch.OutOfMemoryError:
            work = None
        model.zero_grad(set_to_none=True)
        batch //= 2
    else:
        return {"why": "not even one utterance fits"}
    tflop = step_flops(config, (batch, seconds, tokens)) / 1e12
    return {
        "batch_size": batch,
        "step_seconds": significant(taken),
        "audio_seconds_per_second": significant(batch * seconds / taken),
        "tflop": significant(tflop),
        "tflops": significant(tflop / taken),
        "matrix_product_tflops": significant(rate),
        "share_of_matrix_product": significant(tflop / taken / rate),
        **peak_gib(bench.device),
    }


# --- rtfx


def rtfx(bench: Bench) -> None:
    """RTFx of encoder and decoder of the three models, which take turns in each batch size."""
    names = ("canary-tiny",) if bench.tiny else MODELS
    seconds, tokens, rounds = (2.0, 6, 1) if bench.tiny else (10.0, 40, 3)
    precision = "bf16" if bench.on_cuda else "fp32"
    models = {name: rtfx_benchmark.load(name, precision, bench.device) for name in names}
    settings = SimpleNamespace(device=bench.device, seconds=seconds, delta=1)
    for batch in (1, 2) if bench.tiny else (1, 32, 128):
        label = f"{batch} x {seconds:g} s {tokens} tokens"
        try:
            runs = {
                name: rtfx_benchmark.Utterances(parts, batch, 1, settings, model)
                for name, (parts, model) in models.items()
            }
            figures = rtfx_benchmark.measure(runs, tokens, batch * seconds, rounds)
            for name, row in figures.items():
                bench.report(f"{name} {precision} {label}", row)
            if ratio := rtfx_benchmark.times_faster(figures):
                bench.report(f"flash over 1b {label}", ratio)
        except torch.OutOfMemoryError as error:
            bench.report(label, {"why": str(error).splitlines()[0]})
        runs = {}
        release_memory(bench.device)
