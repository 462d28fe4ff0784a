"""Batch sizes without a GPU: seconds to predict 60 buckets, probes that a search needs compared with NeMo's rule, mean
batch sizes of the paper's schemes, and predictions compared with the memory of real steps on this CPU.

python -m benchmarks.oomptimizer --manifest manifest.jsonl --tokenizer spe.model --json
python -m benchmarks.oomptimizer --json                     # a drawn mix of lengths instead
python -m benchmarks.oomptimizer --only-probes --json       # the simulated devices alone
python -m benchmarks.oomptimizer --processes-only --json    # the last part alone, also for DDP and sharded models
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script, this file's folder would come first

from benchmarks._models import config_of
from benchmarks._record import record
from benchmarks.padding import draw_lengths
from benchmarks.plans import read_lengths
from raytrain.cluster.session import ray_session
from raytrain.config import check_config
from raytrain.lengths import BatchSizeSearch, BucketPlan, BucketSearches, BucketSettings, LengthHistogram, make_plan
from raytrain.model.config import ModelConfig
from raytrain.model.cost import cost_of
from raytrain.stages.devices import traced_device
from raytrain.stages.predicted_sizes import predict
from raytrain.training.memory.isolated_meter import IsolatedMeter
from raytrain.training.memory.meter import Probe, ProbeGroup, joint_probe
from raytrain.training.memory.step_meter import StepMeter
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.settings import TrainSettings

GIB = 2**30
BATCH_SECONDS, PENALTY_SECONDS = 360.0, 15.0  # scheme A: 360 s of d + d²/15
TOLERANCE = 0.05


# --- prediction


def sizes_of(plan: BucketPlan, model: ModelConfig, memory: str) -> tuple[list[Any], float]:
    """Predictions for a plan's buckets in bf16 with DDP, and the seconds that Ray's workers took."""
    config = check_config(
        {
            "name": "benchmark",
            "data": {"train": ["none"]},
            "train": {"device": "cuda", "precision": "bf16"},
            "oomptimize": {"device_memory": memory},
        }
    )
    start = time.perf_counter()
    with ray_session(config.cluster):
        ready = time.perf_counter()
        device = traced_device(config.oomptimize.device_memory)
        predictions = predict(config, model, plan, device, lambda *_: None)
        done = time.perf_counter()
    print(f"{len(predictions)} buckets in {done - ready:.1f} s, Ray's start {ready - start:.1f} s", file=sys.stderr)
    return predictions, done - ready


# --- schemes


def mean_batch(counts: np.ndarray, sizes: np.ndarray) -> float:
    """Utterances by the number of batches that they make."""
    return float(counts.sum() / (counts / sizes).sum())


def heuristic_sizes(histogram: LengthHistogram, edges: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Scheme A's utterances and batch sizes by duration bucket: as many utterances as sum to 360 s of d + d²/15.

    A sampler fills a batch with arriving utterances, hence the mean over the bucket's utterances and not its upper
    edge.
    """
    seconds = histogram.cells / 1000
    needs = seconds + seconds**2 / PENALTY_SECONDS
    index = np.searchsorted(edges, histogram.cells)
    inside = index < len(edges)
    counts = np.bincount(index[inside], histogram.counts[inside], len(edges))
    total = np.bincount(index[inside], (histogram.counts * needs)[inside], len(edges))
    kept = counts > 0
    return counts[kept], np.maximum(1, BATCH_SECONDS / (total[kept] / counts[kept]))


def schemes(histogram: LengthHistogram, model: ModelConfig, memory: str, durations: int) -> dict[str, Any]:
    """Mean batch size of the paper's schemes A to D on a device of `memory`, and what D's batches hold."""
    one_dimensional = make_plan(histogram, BucketSettings(durations, 1, max_tokens=2048), "", cost_of(model))
    two_dimensional = make_plan(histogram, BucketSettings(durations, 2, max_tokens=2048), "", cost_of(model))
    edges = [bucket.max_duration_ms for bucket in one_dimensional.grid.buckets]
    kept = histogram.select(one_dimensional.assign(histogram.cells, histogram.tokens)[0] >= 0)
    result: dict[str, Any] = {
        "mean_batch_A": mean_batch(*heuristic_sizes(histogram, edges)),
        "mean_batch_B": mean_batch(*heuristic_sizes(kept, edges)),
    }
    for name, plan in (("C", one_dimensional), ("D", two_dimensional)):
        sizes = np.array([prediction.batch_size for prediction in sizes_of(plan, model, memory)[0]], float)
        buckets = plan.assign(histogram.cells, histogram.tokens)[0]
        counts = np.bincount(buckets[buckets >= 0], histogram.counts[buckets >= 0], len(sizes))
        result[f"mean_batch_{name}"] = mean_batch(counts, sizes)
    result["D_over_A"] = result["mean_batch_D"] / result["mean_batch_A"]
    return {key: round(value, 2) for key, value in result.items()}


# --- probes


@dataclass(frozen=True)
class SimulatedDevice:
    """A device on which a step takes `factors` (by bucket) times its predicted bytes, and `largest` are the largest
    batches that fit. Peaks are reported to ±0.5 %."""

    needs: tuple[tuple[float, float], ...]
    factors: tuple[float, ...]
    largest: tuple[int, ...]
    seed: int

    def probe(self, bucket: int, size: int) -> tuple[bool, float | None]:
        """Whether a batch fits, and its peak bytes if it does."""
        base, slope = self.needs[bucket]
        noise = random.Random(f"{self.seed} {bucket} {size}").uniform(0.995, 1.005)
        fits = size <= self.largest[bucket]
        return fits, (base + size * slope) * self.factors[bucket] * noise if fits else None


def simulate(
    edges: list[tuple[int, int]],
    needs: list[tuple[float, float]],
    budget: float,
    seed: int,
    usable: tuple[float, float] = (1.0, 1.0),
) -> SimulatedDevice:
    """A device that differs from the prediction by up to ±10 % in all buckets alike (workspaces, the allocator's gaps)
    and by ±2 % in each duration, and runs out of memory at a share of the budget within `usable`, bucket by bucket."""
    rng = random.Random(seed)
    bias = rng.uniform(0.90, 1.10)
    by_duration = {duration: bias * rng.uniform(0.98, 1.02) for duration in sorted({duration for duration, _ in edges})}
    largest = [
        int((budget * rng.uniform(*usable) * by_duration[duration] - base) / slope)
        for (duration, _), (base, slope) in zip(edges, needs, strict=True)
    ]
    # Longer and denser buckets never fit more.
    largest = [
        min(size for (d, t), size in zip(edges, largest, strict=True) if d <= edge[0] and t <= edge[1])
        for edge in edges
    ]
    factors = tuple(1 / by_duration[duration] for duration, _ in edges)
    return SimulatedDevice(tuple(needs), factors, tuple(largest), seed)


@dataclass
class Tally:
    """Over all devices: probes, those of them that failed, answers above what fits, and answers as shares of the
    largest that fits."""

    probes: int = 0
    failed: int = 0
    above: int = 0
    shares: list[float] = field(default_factory=list)

    def answer(self, size: int, largest: int) -> None:
        """Count one bucket's answer."""
        self.above += size > largest
        self.shares.append(size / largest)

    def figures(self, prefix: str) -> dict[str, float]:
        """Per bucket."""
        return {
            f"{prefix}probes_per_bucket": round(self.probes / len(self.shares), 3),
            f"{prefix}failing_probes_per_bucket": round(self.failed / len(self.shares), 3),
            f"{prefix}mean_share_of_largest": round(statistics.mean(self.shares), 4),
        }


def run_nemo(device: SimulatedDevice, tally: Tally) -> None:
    """NeMo's rule: the largest bucket first, each next one from twice the last answer."""
    previous: int | None = None
    for bucket in reversed(range(len(device.largest))):
        search = BatchSizeSearch(32 if previous is None else previous * 2, 4096, TOLERANCE, growth=2.0)
        while (size := search.next()) is not None:
            fits, _ = device.probe(bucket, size)
            search.report(size, fits)
            tally.probes += 1
            tally.failed += not fits
        previous = search.result
        tally.answer(search.result, device.largest[bucket])


def run_searches(
    device: SimulatedDevice, searches: BucketSearches, tally: Tally, peaks: bool = True, processes: int = 1
) -> None:
    """All buckets' searches together, by this many concurrent probing processes."""
    while not searches.done:
        asks = [ask for ask in (searches.next() for _ in range(processes)) if ask is not None]
        for bucket, size in asks:
            fits, peak = device.probe(bucket, size)
            searches.report(bucket, size, fits, peak if peaks else None)
            tally.probes += 1
            tally.failed += not fits
    for bucket, largest in enumerate(device.largest):
        tally.answer(searches.result(bucket), largest)


def count_probes(
    edges: list[tuple[int, int]], needs: list[tuple[float, float]], budget: int, devices: int
) -> dict[str, Any]:
    """Probes per bucket on simulated devices. Both rules face the same devices and end at the same tolerance; ours also
    with four processes at once, at a tolerance of 0.02, without reported peaks, and with devices that run out 1 to 5 %
    before the budget."""
    names = ("", "four_processes_", "tolerance_0.02_", "without_peaks_", "early_failures_", "nemo_rule_")
    tallies = {name: Tally() for name in names}

    def searches(tolerance: float = TOLERANCE) -> BucketSearches:
        return BucketSearches(edges, needs, budget, 4096, tolerance)

    for seed in range(devices):
        device = simulate(edges, needs, budget, seed)
        run_searches(device, searches(), tallies[""])
        run_searches(device, searches(), tallies["four_processes_"], processes=4)
        run_searches(device, searches(0.02), tallies["tolerance_0.02_"])
        run_searches(device, searches(), tallies["without_peaks_"], peaks=False)
        early = simulate(edges, needs, budget, seed, usable=(0.95, 0.99))
        run_searches(early, searches(), tallies["early_failures_"])
        run_nemo(device, tallies["nemo_rule_"])
    result: dict[str, Any] = {"devices": devices, "answers": devices * len(edges)}
    for prefix, tally in tallies.items():
        result |= tally.figures(prefix)
    return result | {
        "fewer_probes": round(tallies["nemo_rule_"].probes / tallies[""].probes, 2),
        "answers_above_what_fits": sum(tally.above for tally in tallies.values()),
    }


# --- prediction against this processor


class ProcessMeter:
    """Peak of this process above its level without the model, for steps on the CPU."""

    def __init__(self, model: ModelConfig, settings: TrainSettings, group: ProbeGroup | None = None) -> None:
        import torch

        torch.set_num_threads(1)
        small = replace(
            model,
            encoder_layers=1,
            encoder_width=64,
            encoder_heads=2,
            subsampling_channels=8,
            decoder_layers=1,
            decoder_width=64,
            decoder_heads=2,
        )
        # A first step loads libraries and compiles kernels.
        StepMeter(small, settings, None, "cpu", group=group).measure(2, (3000, 20), 2)
        gc.collect()
        self._before = _resident_bytes()
        self._meter = StepMeter(model, settings, None, "cpu", group=group)

    def measure(self, batch_size: int, edges: tuple[int, int], num_steps: int, *, fresh: bool = True) -> Probe:
        """See `StepMeter`."""
        probe = self._meter.measure(batch_size, edges, num_steps)
        return replace(probe, peak_bytes=probe.peak_bytes - self._before)


def _resident_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


# Freed memory is returned to the system immediately, so that resident memory equals live memory.
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
}
_SHAPES = ((4, (4000, 40)), (8, (10000, 60)), (16, (10000, 200)), (8, (20000, 100)), (4, (40000, 300)))


def process_meters(model: ModelConfig, settings: TrainSettings, folder: Path) -> list[IsolatedMeter]:
    """One meter, or for a sharded model one for each rank, which meet by a file in `folder`."""
    from benchmarks.oomptimizer import (
        ProcessMeter as Meter,
    )  # by its module's name, so that the other process can import it

    ranks = settings.most_workers if settings.shard else 1
    groups: list[ProbeGroup | None] = [None]
    if ranks > 1:
        groups = [ProbeGroup(rank, ranks, f"file://{folder.resolve()}/group") for rank in range(ranks)]
    return [IsolatedMeter(Meter, model, settings, group, environment=_ENVIRONMENT) for group in groups]


def measure_together(meters: list[IsolatedMeter], size: int, edges: tuple[int, int], num_steps: int) -> Probe:
    """The same steps on all ranks at once."""
    with ThreadPoolExecutor(len(meters)) as pool:
        return joint_probe(list(pool.map(lambda meter: meter.measure(size, edges, num_steps), meters)))


PROCESSOR_MODEL = ModelConfig(
    encoder_layers=4,
    encoder_width=256,
    encoder_heads=4,
    subsampling_channels=64,
    decoder_layers=2,
    decoder_width=256,
    decoder_heads=4,
    max_positions=512,
    vocab_size=1000,
)  # small enough for float32 steps on a processor


def against_processor(
    shapes: Sequence[tuple[int, tuple[int, int]]] = _SHAPES, kinds: Sequence[str] = ("one", "ddp", "sharded")
) -> dict[str, Any]:
    """Predicted and measured peak MiB of a 4+2-layer Canary in fp32: alone, in DDP and sharded over two ranks, with and
    without activation checkpointing."""
    rows = []
    for kind in kinds:
        for checkpointing in ("none", "full"):
            settings = TrainSettings(
                num_workers=1 if kind == "one" else 2,
                shard=kind == "sharded",
                activation_checkpointing=checkpointing,
                precision="fp32",
            )
            for row in processor_cells(PROCESSOR_MODEL, settings, shapes):
                rows.append({"kind": kind, "activation_checkpointing": checkpointing, **row})
                print(rows[-1], file=sys.stderr)
    result: dict[str, Any] = {}
    for kind in kinds:
        errors = [abs(row["error"]) for row in rows if row["kind"] == kind]
        result[f"cpu_{kind}_median_absolute_error"] = round(statistics.median(errors), 4)
        result[f"cpu_{kind}_largest_absolute_error"] = max(errors)
    return {**result, "cpu_cells": rows}


def processor_cells(
    model: ModelConfig, settings: TrainSettings, shapes: Sequence[tuple[int, tuple[int, int]]]
) -> list[dict[str, Any]]:
    """A row for each shape: the traced peak, and the highest of the processes that ran the step."""
    tracer = StepTracer(model, settings, world_size=settings.most_workers, device_type="cpu")
    rows = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        meters = [stack.enter_context(meter) for meter in process_meters(model, settings, folder)]
        for size, edges in shapes:
            measured = measure_together(meters, size, edges, 2).peak_bytes
            predicted = tracer.trace(size, *edges).peak_bytes
            rows.append(
                {
                    "batch_size": size,
                    "max_duration_ms": edges[0],
                    "max_tokens": edges[1],
                    "measured_mib": round(measured / 2**20, 1),
                    "predicted_mib": round(predicted / 2**20, 1),
                    "error": round(predicted / measured - 1, 4),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, help="NeMo JSONL")
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece model")
    parser.add_argument("--utterances", type=int, default=400_000, help="how many to draw without a manifest")
    parser.add_argument("--model", default="canary-1b-flash", help="for the time and the probes: a name in configs/")
    parser.add_argument("--schemes-model", default="canary-1b", help="for the schemes")
    parser.add_argument("--device-memory", default="80GiB")
    parser.add_argument("--durations", type=int, default=30)
    parser.add_argument("--devices", type=int, default=20, help="number of simulated devices to count probes on")
    parser.add_argument("--only-probes", action="store_true", help="skip everything timed or measured")
    parser.add_argument("--processes-only", action="store_true", help="only compare predictions with processes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.processes_only:
        record("oomptimizer_processes", against_processor(), as_json=arguments.json)
        return
    if arguments.manifest:
        lengths = read_lengths(arguments.manifest, arguments.tokenizer, prompt=9)
    else:
        lengths = draw_lengths(arguments.utterances, seed=1)
    histogram = LengthHistogram.from_lengths(*lengths)
    model = config_of(arguments.model)
    settings = BucketSettings(arguments.durations, 2, max_tokens=2048)
    plan = make_plan(histogram, settings, "", cost_of(model))
    predictions, seconds = sizes_of(plan, model, arguments.device_memory)
    edges = [(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets]
    needs = [(prediction.line.base_bytes, prediction.line.slope_bytes) for prediction in predictions]
    budget = int(0.9 * check_memory(arguments.device_memory))
    result = {
        "model": arguments.model,
        "device_memory": arguments.device_memory,
        "buckets": len(predictions),
        **count_probes(edges, needs, budget, arguments.devices),
    }
    if arguments.only_probes:
        record("oomptimizer_probes", result, as_json=arguments.json)
        return
    result |= {
        "seconds_per_60_cells": round(seconds * 60 / len(predictions), 2),
        "batch_sizes": [prediction.batch_size for prediction in predictions],
        "edges": [list(edge) for edge in edges],
        "schemes_model": arguments.schemes_model,
        **schemes(histogram, config_of(arguments.schemes_model), arguments.device_memory, arguments.durations),
        **against_processor(),
    }
    record("oomptimizer", result, as_json=arguments.json)


def check_memory(text: str) -> int:
    """Bytes of a size such as 80GiB."""
    return check_config(
        {"name": "benchmark", "data": {"train": ["none"]}, "oomptimize": {"device_memory": text}}
    ).oomptimize.device_memory


if __name__ == "__main__":
    main()
