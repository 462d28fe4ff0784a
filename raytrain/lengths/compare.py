"""Compares batching methods on one histogram: how much schemes pad in drawn batches, and policies at bucket edges.

Schemes are random batches, 1D buckets and 2D buckets; their batches are drawn from the histogram with a seed, and each
is padded to its longest member, as in training. Policies are methods of making the 2D grid.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from raytrain.lengths.cost import CostModel
from raytrain.lengths.grid import Bucket, BucketGrid
from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.padding import padded_sizes, padding_fraction
from raytrain.lengths.plan import BucketPlan, BucketSettings, make_plan

_MAX_UTTERANCES = 200_000
_BATCH_SECONDS = 360.0


@dataclass(frozen=True)
class PaddingRow:
    """One scheme: share of padding in audio and in tokens (fractions), and utterances per batch."""

    scheme: str
    audio_padding: float
    token_padding: float
    mean_batch: float


def padding_by_scheme(
    histogram: LengthHistogram,
    plan: BucketPlan,
    *,
    seed: int = 0,
) -> list[PaddingRow]:
    """Compare schemes on the utterances that the plan keeps.

    Each bucket's batch holds six minutes of audio at its edge; random batches get the mean size of the 2D scheme, so
    that schemes differ in order alone.
    """
    durations, tokens = _sample(histogram, plan, seed)
    grid = plan.grid
    grid_1d = BucketGrid(tuple(Bucket(edge, int(tokens.max())) for edge in grid.duration_edges))
    sizes_2d = tuple(max(1, int(_BATCH_SECONDS * 1000 // bucket.max_duration_ms)) for bucket in grid.buckets)
    sizes_1d = tuple(
        min(size for b, size in zip(grid.buckets, sizes_2d, strict=True) if b.max_duration_ms == edge)
        for edge in grid.duration_edges
    )
    rng = np.random.default_rng(seed)
    row_2d = _bucketed("2D buckets", durations, tokens, grid, sizes_2d, rng)
    row_1d = _bucketed("1D buckets", durations, tokens, grid_1d, sizes_1d, rng)
    everything = BucketGrid((Bucket(int(durations.max()), int(tokens.max())),))
    size = max(1, round(row_2d.mean_batch))
    return [_bucketed("random", durations, tokens, everything, (size,), rng), row_1d, row_2d]


def _sample(histogram: LengthHistogram, plan: BucketPlan, seed: int) -> tuple[np.ndarray, np.ndarray]:
    buckets, _ = plan.assign(histogram.cells, histogram.tokens)
    kept = histogram.select(buckets >= 0)
    index = (
        np.repeat(np.arange(len(kept.counts)), kept.counts)
        if kept.total <= _MAX_UTTERANCES
        else (np.random.default_rng(seed).choice(len(kept.counts), _MAX_UTTERANCES, p=kept.counts / kept.total))
    )
    return kept.cells[index], kept.tokens[index]


def _bucketed(
    scheme: str,
    durations: np.ndarray,
    tokens: np.ndarray,
    grid: BucketGrid,
    sizes: tuple[int, ...],
    rng: np.random.Generator,
) -> PaddingRow:
    """Shuffle, cut every bucket into batches, pad each to its longest member."""
    buckets = grid.assign_many(durations, tokens)
    padded_audio = padded_tokens = num_batches = 0
    for number, size in enumerate(sizes):
        members = rng.permutation(np.flatnonzero(buckets == number))
        if not len(members):
            continue
        batch_sizes = np.diff(np.append(np.arange(0, len(members), size), len(members)))
        padded_audio += int(padded_sizes(durations[members], batch_sizes).sum())
        padded_tokens += int(padded_sizes(tokens[members], batch_sizes).sum())
        num_batches += len(batch_sizes)
    inside = buckets >= 0
    return PaddingRow(
        scheme,
        round(padding_fraction(int(durations[inside].sum()), padded_audio), 6),
        round(padding_fraction(int(tokens[inside].sum()), padded_tokens), 6),
        round(int(inside.sum()) / num_batches, 3),
    )


@dataclass(frozen=True)
class PolicyRow:
    """One plan: shares of padding (fractions) where every utterance is padded to the edges of its bucket, cells,
    rejected utterances, and the planning time in seconds."""

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
    # Limits for the duration buckets of NeMo's rule don't apply to other buckets.
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
    cells = PaddedCells.of(plan, histogram)
    return PolicyRow(
        name,
        round(cells.audio_padding(), 6),
        round(cells.token_padding(), 6),
        round(cells.compute_padding(cost), 6),
        len(plan.grid.buckets),
        sum(plan.rejected.values()),
        round(seconds, 3),
    )


@dataclass(frozen=True)
class PaddedCells:
    """The histogram cells that a plan keeps, (N,) each: lengths and counts, and the edges that they are padded to."""

    counts: np.ndarray
    durations: np.ndarray
    tokens: np.ndarray
    duration_edges: np.ndarray
    token_edges: np.ndarray

    @classmethod
    def of(cls, plan: BucketPlan, histogram: LengthHistogram) -> PaddedCells:
        """All utterances of `histogram` in the buckets of `plan`."""
        buckets, _ = plan.assign(histogram.cells, histogram.tokens)
        inside = buckets >= 0
        edges = np.array([(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets])
        durations, tokens = histogram.cells[inside], histogram.tokens[inside]
        return cls(histogram.counts[inside], durations, tokens, *edges[buckets[inside]].T)

    def audio_padding(self) -> float:
        """Share of the audio that is padding."""
        return self._fraction(self.durations, self.duration_edges)

    def token_padding(self) -> float:
        """Share of the tokens that is padding."""
        return self._fraction(self.tokens, self.token_edges)

    def compute_padding(self, cost: CostModel) -> float:
        """Share of the compute that goes into padding."""
        return self._fraction(cost.of(self.durations, self.tokens), cost.of(self.duration_edges, self.token_edges))

    def _fraction(self, real: np.ndarray, padded: np.ndarray) -> float:
        return padding_fraction(float((self.counts * real).sum()), float((self.counts * padded).sum()))
