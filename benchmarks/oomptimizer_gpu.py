"""Predicted and measured memory on this GPU, and probes and seconds compared with NeMo's rule, for whole models.

Needs only torch, numpy and this package. For each model, 30×2 buckets up to 40 s: the tracer predicts each bucket's
largest batch; the search starts there and runs real steps (DDP in a group of one, bf16, clip, fused AdamW); then NeMo's
rule (start 32, double, halve, bisect to 5 %; the next bucket starts at twice the last result) runs on the same buckets.
After each model the result file is rewritten, so that a stopped run keeps what it has.

python -m benchmarks.oomptimizer_gpu --models canary-180m-flash canary-1b-flash canary-1b --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script, this file's folder would come first

from benchmarks._models import config_of
from benchmarks._record import record
from raytrain.lengths import BatchSizeSearch, BucketPlan, BucketSearches, BucketSettings, LengthHistogram, make_plan
from raytrain.model.cost import cost_of
from raytrain.training.memory.isolated_meter import IsolatedMeter
from raytrain.training.memory.meter import Probe, search_batch_size, search_buckets, soak
from raytrain.training.memory.prediction import predict_batch_size
from raytrain.training.memory.step_meter import StepMeter
from raytrain.training.memory.surface import NeighborLines
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.settings import TrainSettings

GIB = 2**30
TOLERANCE = 0.05
MODELS = ("canary-180m-flash", "canary-1b-flash", "canary-1b")


def draw_lengths(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Durations (ms) and tokens of a mix of short, middle and long utterances up to 40 s, (N,) each."""
    rng = np.random.default_rng(seed)
    short = rng.lognormal(1.6, 0.6, count).clip(0.5, 39.9)
    middle, long = rng.normal(14, 4, count).clip(1, 39.9), rng.uniform(1, 40, count)
    kind = rng.random(count)
    seconds = np.where(kind < 0.55, short, np.where(kind < 0.9, middle, long))
    tokens = 10 + (seconds * rng.normal(3.4, 0.8, count).clip(0.6)).astype(np.int64)
    return np.ceil(seconds * 1000).astype(np.int64), tokens


def measure_model(name: str, plan: BucketPlan, total: int, memory_fraction: float, with_nemo: bool) -> dict[str, Any]:
    """All figures of one model on this GPU."""
    model = config_of(name)
    settings = TrainSettings(num_workers=2, precision="bf16")
    edges = [(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets]
    budget = int(total * memory_fraction)
    start = time.perf_counter()
    tracer, neighbors = StepTracer(model, settings, precision="bf16", world_size=2), NeighborLines()
    predictions = []
    for edge in edges:
        predictions.append(predict_batch_size(tracer, *edge, budget, 4096, neighbors.guess(*edge)))
        neighbors.add(*edge, predictions[-1].line)
    predicting = time.perf_counter() - start
    needs = [(prediction.line.base_bytes, prediction.line.slope_bytes) for prediction in predictions]
    result: dict[str, Any] = {"buckets": len(edges), "prediction_seconds": round(predicting, 1)}
    with IsolatedMeter(StepMeter, model, settings, budget) as meter:
        begun = time.perf_counter()
        searches = BucketSearches(edges, needs, budget, 4096, TOLERANCE)
        answers = search_buckets(lambda bucket, size: meter.measure(size, edges[bucket], 3), searches)
        cells = [
            _cell(bucket, edges[bucket], predictions[bucket], answer.batch_size, answer.probes, needs[bucket])
            for bucket, answer in enumerate(answers)
        ]
        for cell in cells:
            print(name, json.dumps(cell), file=sys.stderr, flush=True)
        result |= _summary("", cells, time.perf_counter() - begun)
        sizes = [cell["batch_size"] for cell in cells]
        lowered = [step for step in soak(meter, edges, sizes, len(edges), seed=1) if step.lowered_to is not None]
        result["soak_lowered"] = [[step.bucket, step.lowered_to] for step in lowered]
        result["cells"] = cells
    if with_nemo:
        with IsolatedMeter(StepMeter, model, settings, budget) as meter:
            begun, nemo_cells, previous = time.perf_counter(), [], None
            for bucket in reversed(range(len(edges))):
                search = BatchSizeSearch(32 if previous is None else previous * 2, 4096, TOLERANCE, growth=2.0)
                answer = search_batch_size(lambda size, bucket=bucket: meter.measure(size, edges[bucket], 1), search)
                nemo_cells.append(_cell(bucket, edges[bucket], predictions[bucket], answer.batch_size, answer.probes))
                previous = answer.batch_size
            result |= _summary("nemo_rule_", nemo_cells, time.perf_counter() - begun)
            result["nemo_rule_batch_sizes"] = [cell["batch_size"] for cell in reversed(nemo_cells)]
    return result


def _cell(
    bucket: int,
    edges: tuple[int, int],
    prediction: Any,
    size: int | None,
    probes: tuple[Probe, ...],
    need: tuple[float, float] | None = None,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "bucket": bucket,
        "edges": list(edges),
        "predicted_size": prediction.batch_size,
        "batch_size": size,
        "probes": len(probes),
    }
    best = max((probe for probe in probes if probe.fits), key=lambda probe: probe.batch_size, default=None)
    if best is not None and need is not None:
        predicted = need[0] + best.batch_size * need[1]
        row |= {
            "measured_gib": round(best.peak_bytes / GIB, 3),
            "predicted_gib": round(predicted / GIB, 3),
            "error": round(predicted / best.peak_bytes - 1, 4),
            "step_seconds": round(best.step_seconds, 4),
        }
    return row


def _summary(prefix: str, cells: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    errors = [abs(cell["error"]) for cell in cells if "error" in cell]
    summary = {
        f"{prefix}probes_per_bucket": round(statistics.mean(cell["probes"] for cell in cells), 3),
        f"{prefix}seconds": round(seconds, 1),
    }
    if errors:
        summary |= {
            "largest_absolute_error": max(errors),
            "median_absolute_error": round(statistics.median(errors), 4),
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--durations", type=int, default=30)
    parser.add_argument("--memory-fraction", type=float, default=0.9)
    parser.add_argument("--without-nemo-rule", action="store_true", help="leave out the slower comparison")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark needs a GPU; benchmarks.oomptimizer runs without one")
    total = torch.cuda.get_device_properties(0).total_memory
    histogram = LengthHistogram.from_lengths(*draw_lengths(400_000, seed=1))
    plan = make_plan(
        histogram,
        BucketSettings(arguments.durations, 2, max_tokens=500),
        "",
        cost_of(config_of("canary-1b")),
    )
    result: dict[str, Any] = {"gpu_gib": round(total / GIB, 2), "plan": asdict(plan.grid), "models": {}}
    for name in arguments.models:
        measured = measure_model(name, plan, total, arguments.memory_fraction, not arguments.without_nemo_rule)
        result["models"][name] = measured
        last = name == arguments.models[-1]
        record("oomptimizer", result, as_json=arguments.json and last, device="cuda")


if __name__ == "__main__":
    main()
