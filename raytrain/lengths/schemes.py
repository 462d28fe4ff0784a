"""The paper's batching schemes on one corpus: their padding, their batch sizes, and the memory that they need.

From arXiv 2503.05931, each adds to the one before, with R and D+ at the ends:

    R    random batches of one size, that fits even the longest utterances
    A    buckets of duration; a batch holds `batch_seconds` of d + d² / `penalty_seconds` for utterances of d seconds
    B    … without utterances of more tokens per second than mean + 4σ of their bucket
    C    … with the largest batch of each bucket that fits (OOMptimizer)
    D    … buckets of duration × tokens
    D+   … with edges that minimize compute in padding, and as many cells

Batches are drawn with a seed from the length histogram and padded to their longest member, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from raytrain.lengths.cost import CostModel
from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.padding import padding_fraction
from raytrain.lengths.plan import BucketPlan, BucketSettings

SCHEMES = ("R", "A", "B", "C", "D", "D+")
BATCH_SECONDS, PENALTY_SECONDS = 360.0, 15.0  # published for Canary-1B on 80 GB
_TITLES = {
    "R": "random batches of one size",
    "A": "duration buckets, batches by seconds of audio",
    "B": "A without the fastest talkers",
    "C": "B with searched batch sizes",
    "D": "C with duration × token buckets",
    "D+": "D with optimal edges",
}
_TRACED = 240  # batches whose memory the report shows
_MAX_DRAWN = 4_000_000  # utterances of one scheme's simulation

# Bytes of a step with batch size, longest duration (ms) and most tokens, (N,) each.
Memory = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def title_of(scheme: str) -> str:
    """A short description of a scheme."""
    return _TITLES[scheme]


def scheme_settings(scheme: str, base: BucketSettings) -> BucketSettings:
    """How a scheme cuts the grid, where `base` gives the number of durations and tokens, and the outlier limit."""
    durations, split = base.num_duration_buckets, base.num_token_buckets
    plain = replace(base, policy="equal_mass", num_cells=None)
    if scheme == "R":
        return replace(plain, num_duration_buckets=1, num_token_buckets=1, tps_sigma=None, max_tps=None)
    if scheme == "A":
        return replace(plain, num_token_buckets=1, tps_sigma=None, max_tps=None)
    if scheme in ("B", "C"):
        return replace(plain, num_token_buckets=1)
    if scheme == "D":
        return plain
    # Limits for the duration buckets of NeMo's rule don't apply to other buckets.
    max_tps = None if isinstance(base.max_tps, tuple) else base.max_tps
    return replace(plain, policy="optimal", num_cells=base.num_cells or durations * split, max_tps=max_tps)


def by_seconds(scheme: str) -> bool:
    """Whether a scheme sizes its batches by seconds of audio instead of by memory."""
    return scheme in ("A", "B")


def sizes_by_seconds(
    histogram: LengthHistogram, plan: BucketPlan, batch_seconds: float, penalty_seconds: float = PENALTY_SECONDS
) -> tuple[int, ...]:
    """Utterances that sum to `batch_seconds` of d + d² / `penalty_seconds`, on average over each bucket: a sampler
    fills a batch with utterances as they come, hence the mean and not the bucket's edge."""
    seconds = histogram.cells / 1000
    needs = histogram.counts * (seconds + seconds**2 / penalty_seconds)
    buckets = plan.assign(histogram.cells, histogram.tokens)[0]
    inside, number = buckets >= 0, len(plan.grid.buckets)
    counts = np.bincount(buckets[inside], histogram.counts[inside], number)
    total = np.bincount(buckets[inside], needs[inside], number)
    return tuple(max(1, int(batch_seconds * n / need)) if n else 1 for n, need in zip(counts, total, strict=True))


def largest_batch_seconds(histogram: LengthHistogram, plan: BucketPlan, memory: Memory, budget: float) -> float:
    """The most seconds of audio that scheme A or B may have without its worst possible batch running out of memory:
    what a person would find by trial and error. 1 s if even that does not fit."""
    edges = np.array([(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets])

    def fits(batch_seconds: float) -> bool:
        sizes = np.array(sizes_by_seconds(histogram, plan, batch_seconds))
        return bool((memory(sizes, edges[:, 0], edges[:, 1]) <= budget).all())

    low, high = 1.0, 1e5
    while high - low > max(0.5, 0.005 * low):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def sizes_by_memory(plan: BucketPlan, memory: Memory, budget: float, most: int = 4096) -> tuple[int, ...]:
    """The largest batch of each bucket within the budget at its upper edges, at least 1."""
    sizes = []
    for bucket in plan.grid.buckets:
        low, high = 1, most + 1  # `low` fits, or is the minimum
        while high - low > 1:
            middle = (low + high) // 2
            edges = np.array([middle]), np.array([bucket.max_duration_ms]), np.array([bucket.max_tokens])
            low, high = (middle, high) if memory(*edges)[0] <= budget else (low, middle)
        sizes.append(low)
    return tuple(sizes)


@dataclass(frozen=True)
class SchemeRow:
    """One scheme on one corpus and model.

    Padding: shares of padded audio, tokens and compute (attention's squares included) that hold nothing. `mean_batch`:
    utterances per worker and step; `audio_seconds`: their speech. `memory_mean`, `memory_worst`: predicted peak of a
    step over the budget. `steps_per_epoch`: for one worker that sees every utterance. `flops`: of a mean step, forward
    and backward, padding included. `memory_trace`: the first steps' peaks over the budget.
    """

    scheme: str
    title: str
    buckets: int
    rejected: int
    batch_sizes: tuple[int, ...]
    batch_seconds: float | None
    audio_padding: float
    token_padding: float
    compute_padding: float
    mean_batch: float
    audio_seconds: float
    memory_mean: float
    memory_worst: float
    steps_per_epoch: float
    flops: float
    memory_trace: tuple[float, ...] = ()


def simulate_scheme(
    scheme: str,
    histogram: LengthHistogram,
    plan: BucketPlan,
    sizes: Sequence[int],
    cost: CostModel,
    memory: Memory,
    budget: float,
    *,
    batch_seconds: float | None = None,
    seed: int = 0,
    steps: int = 4000,
) -> SchemeRow:
    """Draw `steps` batches of a scheme, with buckets weighted by their number of batches, and sum them up."""
    cells = _BucketCells(histogram, plan, np.array(sizes, np.int64))
    rng = np.random.default_rng(seed)
    steps = min(steps, max(_TRACED, int(_MAX_DRAWN / cells.mean_batch)))
    buckets = rng.choice(len(sizes), steps, p=cells.batches_per_epoch / cells.batches_per_epoch.sum())
    drawn = cells.draw(buckets, rng, cost, memory)
    audio, token, compute = map(padding_fraction, drawn.real.tolist(), drawn.padded.tolist())
    peaks = drawn.peaks / budget
    return SchemeRow(
        scheme=scheme,
        title=_TITLES[scheme],
        buckets=len(sizes),
        rejected=cells.rejected,
        batch_sizes=tuple(int(size) for size in sizes),
        batch_seconds=batch_seconds,
        audio_padding=audio,
        token_padding=token,
        compute_padding=compute,
        mean_batch=float(cells.batch_sizes[buckets].mean()),
        audio_seconds=float(drawn.real[0]) / 1000 / steps,
        memory_mean=float(peaks.mean()),
        memory_worst=float(peaks.max()),
        steps_per_epoch=float(cells.batches_per_epoch.sum()),
        flops=6 * float(drawn.padded[2]) / steps,  # two operations per multiply-accumulate; backward is twice forward
        memory_trace=tuple(np.round(peaks[:_TRACED], 4).tolist()),
    )


@dataclass(frozen=True)
class _DrawnBatches:
    """Sums over drawn batches, `real` and `padded`: audio (ms), tokens and compute; `peaks` (N,) bytes of each."""

    real: np.ndarray
    padded: np.ndarray
    peaks: np.ndarray


class _BucketCells:
    """A histogram's cells by a plan's buckets, from which batches of `batch_sizes` utterances are drawn."""

    def __init__(self, histogram: LengthHistogram, plan: BucketPlan, batch_sizes: np.ndarray) -> None:
        self.batch_sizes, self._histogram = batch_sizes, histogram
        self._buckets = plan.assign(histogram.cells, histogram.tokens)[0]
        kept = self._buckets >= 0
        self._counts = np.bincount(self._buckets[kept], histogram.counts[kept], len(batch_sizes))
        self.rejected = int(histogram.counts[~kept].sum())
        self.batches_per_epoch = self._counts / batch_sizes
        self.mean_batch = self._counts.sum() / self.batches_per_epoch.sum()

    def draw(self, buckets: np.ndarray, rng: np.random.Generator, cost: CostModel, memory: Memory) -> _DrawnBatches:
        """A batch of each of `buckets` (N,)."""
        real, padded, peaks = np.zeros(3), np.zeros(3), np.zeros(len(buckets))
        for bucket in np.unique(buckets):
            batches, size = np.flatnonzero(buckets == bucket), self.batch_sizes[bucket]
            lengths, tokens = self._draw(bucket, len(batches), rng)
            longest, most = lengths.max(1), tokens.max(1)
            real += lengths.sum(), tokens.sum(), cost.of(lengths, tokens).sum()
            padded += size * longest.sum(), size * most.sum(), size * cost.of(longest, most).sum()
            peaks[batches] = memory(np.full(len(batches), size), longest, most)
        return _DrawnBatches(real, padded, peaks)

    def _draw(self, bucket: int, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(number, batch size) durations and tokens of batches of a bucket."""
        members = np.flatnonzero(self._buckets == bucket)
        shares = self._histogram.counts[members] / self._counts[bucket]
        drawn = members[rng.choice(len(members), (number, self.batch_sizes[bucket]), p=shares)]
        return self._histogram.cells[drawn], self._histogram.tokens[drawn]


def random_batch(histogram: LengthHistogram, size: int, seed: int = 0) -> list[tuple[int, int]]:
    """Durations (ms) and tokens of one random batch, for display."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(histogram.counts), size, p=histogram.counts / histogram.total)
    return list(zip(histogram.cells[drawn].tolist(), histogram.tokens[drawn].tolist(), strict=True))


@dataclass(frozen=True)
class Hardware:
    """What a step takes on a GPU: `overhead_seconds` regardless of the batch (launches, the optimizer, gradient
    exchange that is not overlapped), and its operations at `peak_flops` · `utilisation`."""

    gpu: str
    memory_gib: float
    peak_flops: float
    utilisation: float
    overhead_seconds: float

    def step_seconds(self, flops: float) -> float:
        """Seconds of a step of that many operations."""
        return self.overhead_seconds + flops / (self.peak_flops * self.utilisation)


@dataclass(frozen=True)
class GpuPlan:
    """What a scheme needs compared with scheme A on `gpus` GPUs for `steps` steps.

    `step_seconds`; `throughput`: utterances per GPU and second over A's. `gpus_same_batch`: how many hold A's global
    batch, and the hours in which they take as many steps. `hours_same_gpus`: until as many utterances were seen as A
    sees. `gpus_same_hours`: how many see them in the time that A takes. `gpu_hours`: of that many utterances.
    """

    scheme: str
    step_seconds: float
    throughput: float
    gpus_same_batch: int
    hours_same_batch: float
    hours_same_gpus: float
    gpus_same_hours: int
    gpu_hours: float


def gpu_plans(rows: Sequence[SchemeRow], hardware: Hardware, gpus: int, steps: int) -> list[GpuPlan]:
    """Each scheme's needs where scheme A trains on `gpus` GPUs for `steps` steps."""
    base = next(row for row in rows if row.scheme == "A")
    base_seconds = hardware.step_seconds(base.flops)
    base_hours = steps * base_seconds / 3600
    plans = []
    for row in rows:
        seconds = hardware.step_seconds(row.flops)
        throughput = (row.mean_batch / seconds) / (base.mean_batch / base_seconds)
        enough = math.ceil(round(gpus * base.mean_batch / row.mean_batch, 6))
        plans.append(
            GpuPlan(
                scheme=row.scheme,
                step_seconds=seconds,
                throughput=throughput,
                gpus_same_batch=enough,
                hours_same_batch=steps * seconds / 3600,
                hours_same_gpus=base_hours / throughput,
                gpus_same_hours=math.ceil(round(gpus / throughput, 6)),
                gpu_hours=gpus * base_hours / throughput,
            )
        )
    return plans
