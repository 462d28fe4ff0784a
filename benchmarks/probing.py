"""The overhead of `oomptimize` besides its steps: probing processes on a Ray with emulated GPUs, whose steps take a
known time.

python -m benchmarks.probing --gpus 2 --buckets 8 --json

The processes, Ray Tune and the coordinator are the real ones; only a step is replaced by a wait, and its memory by a
formula. The model is canary-tiny, built in each process as on a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script, this file's folder would come first

from benchmarks._models import config_of
from benchmarks._record import record
from raytrain.cluster.authentication import token_authentication
from raytrain.cluster.placement import Placement
from raytrain.cluster.probing import probe_all
from raytrain.cluster.session import ray_session
from raytrain.config import ClusterSection
from raytrain.model.device import EMULATED_GPU
from raytrain.training.memory.coordinator import ProbeJob, ProbeOutcome
from raytrain.training.memory.isolated_meter import IsolatedMeter
from raytrain.training.memory.meter import Edges, Probe, ProbeGroup
from raytrain.training.memory.step_meter import StepMeter
from raytrain.training.settings import TrainSettings

_BASE = 1 << 30


def bytes_per_utterance(edges: Edges) -> float:
    """A formula close to a Canary's: linear in frames and tokens, with attention's quadratic term."""
    seconds, tokens = edges[0] / 1000, edges[1] / 10
    return (20 + 10 * seconds + 0.2 * seconds**2 + tokens) * 2**20


class KnownStepMeter(StepMeter):
    """The model of a `StepMeter`, and steps that take `step_seconds` and memory by a formula, 5 % below the
    prediction."""

    def __init__(self, step_seconds: float, budget_bytes: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._step_seconds, self._limit = step_seconds, budget_bytes

    def measure(self, batch_size: int, edges: Edges, num_steps: int, *, fresh: bool = True) -> Probe:
        """See `Meter`."""
        time.sleep(num_steps * self._step_seconds)
        peak = _BASE + 0.95 * batch_size * bytes_per_utterance(edges)
        if peak > self._limit:
            return Probe(batch_size, False, why="out of memory")
        return Probe(batch_size, True, int(peak), self._step_seconds)


class MakeMeter:
    """Creates the isolated meters of trials."""

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds

    def __call__(self, job: ProbeJob, group: ProbeGroup | None) -> IsolatedMeter:
        from benchmarks.probing import KnownStepMeter as Meter  # by its module's name, which the other process knows

        return IsolatedMeter(Meter, self._step_seconds, job.budget_bytes, job.model, job.train, None, "cpu", "cuda")


def make_job(buckets: int, soak_steps: int) -> ProbeJob:
    """A search of `buckets` cells, all with four tokens per second, on 80 GiB."""
    edges = tuple((round(40_000 * (place + 1) / buckets), 16 * (place + 1)) for place in range(buckets))
    return ProbeJob(
        model=config_of("canary-tiny"),
        train=TrainSettings(num_workers=1),
        device_name="claimed",
        budget_bytes=int(80 * 2**30 * 0.9),
        edges=edges,
        needs=tuple((float(_BASE), bytes_per_utterance(cell)) for cell in edges),
        max_size=4096,
        tolerance=0.05,
        steps_per_probe=3,
        soak_steps=soak_steps,
        seed=1,
    )


def measure(gpus: int, buckets: int, step_seconds: float, soak_steps: int) -> dict[str, Any]:
    """Process starts and seconds of one search on a Ray with this many emulated GPUs."""
    job, make = make_job(buckets, soak_steps), MakeMeter(step_seconds)
    places = [Placement()] * gpus
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        outcome = probe_all(job, places, Path(folder, "probes.json"), Placement(), lambda *what: None, make_meter=make)
        wall = time.monotonic() - began
    return {
        "gpus": gpus,
        "process_starts": outcome.num_starts,
        "probes_per_bucket": round(sum(len(bucket.probes) for bucket in outcome.buckets) / buckets, 2),
        "seconds": round(wall, 2),
        "seconds_of_steps": round(_slept(outcome, gpus), 2),
        "seconds_beside": round(wall - _slept(outcome, gpus), 2),
        "seconds_by_part": {part: round(spent, 2) for part, spent in outcome.seconds.items()},
    }


def _slept(outcome: ProbeOutcome, gpus: int) -> float:
    """Wall time of steps: probes run on all GPUs at once, the soak on one."""
    soak = outcome.seconds.get("soak", 0.0)
    return (outcome.seconds["steps"] - soak) / gpus + soak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="how many GPUs Ray claims")
    parser.add_argument("--buckets", type=int, default=8)
    parser.add_argument("--step-seconds", type=float, default=0.06)
    parser.add_argument("--soak-steps", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    os.environ[EMULATED_GPU] = f"claimed:{80 << 30}"
    import ray

    claimed = {"num_cpus": 2, "num_gpus": max(arguments.gpus), "_node_ip_address": "127.0.0.1"}
    with token_authentication(local=True):
        ray.init("local", **claimed, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            with ray_session(ClusterSection()):
                rows = [
                    measure(gpus, arguments.buckets, arguments.step_seconds, arguments.soak_steps)
                    for gpus in arguments.gpus
                ]
        finally:
            ray.shutdown()
    result = {"buckets": arguments.buckets, "step_seconds": arguments.step_seconds, "searches": rows}
    record("probing", result, as_json=arguments.json)


if __name__ == "__main__":
    main()
