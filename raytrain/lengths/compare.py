"""Policies side by side on one histogram."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from raytrain.lengths.cost import CostModel
from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.plan import BucketPlan, BucketSettings, make_plan, padded_compute


@dataclass(frozen=True)
class PolicyRow:
    """One plan: shares of padding (fractions) where every utterance is padded to the edges of its bucket, cells,
    rejected utterances, and seconds that planning took."""

    policy: str
    audio_padding: float
    token_padding: float
    padded_compute: float
    cells: int
    rejected: int
    seconds: float


def compare_policies(histogram: LengthHistogram, settings: BucketSettings, cost: CostModel) -> list[PolicyRow]:
    """NeMo's rule and the optimum in 1D and 2D, and the optimum with the 2D grid's cells spread by need."""
    durations, split = settings.num_duration_buckets, settings.num_token_buckets
    plain = replace(settings, num_cells=None)
    # Limits for the duration buckets of NeMo's rule say nothing about others.
    max_tps = None if isinstance(settings.max_tps, tuple) else settings.max_tps
    optimal = replace(plain, policy="optimal", max_tps=max_tps)
    variants = {
        f"equal_mass {durations}×1": replace(plain, policy="equal_mass", num_token_buckets=1),
        f"optimal {durations}×1": replace(optimal, num_token_buckets=1),
        f"equal_mass {durations}×{split}": replace(plain, policy="equal_mass"),
        f"optimal {durations}×{split}": optimal,
        f"optimal, {settings.num_cells or durations * split} cells by need": replace(
            optimal, num_cells=settings.num_cells or durations * split
        ),
    }
    return [_row(name, variant, histogram, cost) for name, variant in variants.items()]


def _row(name: str, settings: BucketSettings, histogram: LengthHistogram, cost: CostModel) -> PolicyRow:
    start = time.perf_counter()
    plan = make_plan(histogram, settings, "", cost)
    seconds = time.perf_counter() - start
    audio, tokens = edge_padding(plan, histogram)
    return PolicyRow(
        name,
        audio,
        tokens,
        round(padded_compute(plan, histogram, cost), 6),
        len(plan.grid.buckets),
        sum(plan.rejected.values()),
        round(seconds, 3),
    )


def edge_padding(plan: BucketPlan, histogram: LengthHistogram) -> tuple[float, float]:
    """Shares of audio and of tokens that are padding at the buckets' edges."""
    buckets, _ = plan.place(histogram.cells, histogram.tokens)
    inside = buckets >= 0
    counts = histogram.counts[inside]
    edges = np.array([(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets])[buckets[inside]]
    real = (histogram.cells[inside], histogram.tokens[inside])
    shares = [1 - float((counts * real[axis]).sum() / (counts * edges[:, axis]).sum()) for axis in (0, 1)]
    return round(shares[0], 6), round(shares[1], 6)
