"""How much of a batch is padding, by scheme: random batches, 1D buckets, 2D buckets.

Batches are drawn from the histogram with a seed, and each is padded to its longest member, as in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raytrain.lengths.grid import Bucket, BucketGrid
from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.plan import BucketPlan

_MAX_UTTERANCES = 200_000


def padding_fraction(real: float, padded: float) -> float:
    """The share of a batch that is padding: `padded` samples or tokens of which `real` hold speech or text."""
    return 1 - real / padded


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
    batch_sizes: tuple[int, ...] | None = None,
    *,
    seed: int = 0,
    batch_seconds: float = 360.0,
) -> list[PaddingRow]:
    """Compare schemes on the utterances that the plan keeps.

    Without `batch_sizes` each bucket's batch holds `batch_seconds` of audio at its edge; random batches get the
    mean size of the 2D scheme, so that schemes differ in order alone.
    """
    durations, tokens = _sample(histogram, plan, seed)
    two = plan.grid
    one = BucketGrid(tuple(Bucket(edge, int(tokens.max())) for edge in two.duration_edges))
    sizes_2d = batch_sizes or _sizes(two, batch_seconds)
    sizes_1d = tuple(
        min(size for b, size in zip(two.buckets, sizes_2d, strict=True) if b.max_duration_ms == edge)
        for edge in two.duration_edges
    )
    rng = np.random.default_rng(seed)
    row_2d = _bucketed("2D buckets", durations, tokens, two, sizes_2d, rng)
    row_1d = _bucketed("1D buckets", durations, tokens, one, sizes_1d, rng)
    everything = BucketGrid((Bucket(int(durations.max()), int(tokens.max())),))
    size = max(1, round(row_2d.mean_batch))
    return [_bucketed("random", durations, tokens, everything, (size,), rng), row_1d, row_2d]


def _sizes(grid: BucketGrid, batch_seconds: float) -> tuple[int, ...]:
    return tuple(max(1, int(batch_seconds * 1000 // bucket.max_duration_ms)) for bucket in grid.buckets)


def _sample(histogram: LengthHistogram, plan: BucketPlan, seed: int) -> tuple[np.ndarray, np.ndarray]:
    buckets, _ = plan.place(histogram.cells, histogram.tokens)
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
        starts = np.arange(0, len(members), size)
        in_batch = np.diff(np.append(starts, len(members)))
        padded_audio += int((np.maximum.reduceat(durations[members], starts) * in_batch).sum())
        padded_tokens += int((np.maximum.reduceat(tokens[members], starts) * in_batch).sum())
        num_batches += len(starts)
    inside = buckets >= 0
    return PaddingRow(
        scheme,
        round(1 - int(durations[inside].sum()) / padded_audio, 6),
        round(1 - int(tokens[inside].sum()) / padded_tokens, 6),
        round(int(inside.sum()) / num_batches, 3),
    )
