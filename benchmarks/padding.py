"""Padding by scheme on a long-tailed mix of lengths, and the time to compute a plan from its histogram."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict

import numpy as np

from benchmarks._record import record
from raytrain.lengths import BucketSettings, LengthHistogram, make_plan, padding_by_scheme


def draw_lengths(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Durations (ms) up to 40 s and tokens, with 1 % fast speakers; (number,) each."""
    rng = np.random.default_rng(seed)
    kind = rng.random(number)
    seconds = np.where(kind < 0.55, rng.lognormal(1.6, 0.6, number), rng.normal(14, 4, number))
    seconds = np.where(kind >= 0.9, rng.uniform(1, 40, number), seconds).clip(0.5, 39.9)
    rate = rng.normal(4.5, 1.0, number).clip(1)
    rate = np.where(rng.random(number) < 0.01, rate * rng.uniform(2, 6, number), rate)
    return (seconds * 1000).astype(np.int64), (seconds * rate).astype(np.int64) + 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--utterances", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    lengths = draw_lengths(arguments.utterances, arguments.seed)
    start = time.perf_counter()
    histogram = LengthHistogram.from_lengths(*lengths)
    counted = time.perf_counter()
    plan = make_plan(histogram, BucketSettings(max_tokens=2048), "benchmark")
    planned = time.perf_counter()
    result = {
        "utterances": arguments.utterances,
        "histogram_seconds": round(counted - start, 4),
        "plan_seconds": round(planned - counted, 4),
        "buckets": len(plan.grid.buckets),
        "rejected": plan.rejected,
        "schemes": [asdict(row) for row in padding_by_scheme(histogram, plan, seed=arguments.seed)],
    }
    record("padding", result, as_json=arguments.json)


if __name__ == "__main__":
    main()
