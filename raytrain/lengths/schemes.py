"""The paper's batching schemes on one corpus: what each pads, how large its batches are, what it asks of a GPU.

From arXiv 2503.05931, each with what the one before has, and R and D+ at the ends:

    R    random batches of one size, which even the longest utterances must fit
    A    buckets of duration; a batch holds `batch_seconds` of d + d² / `penalty_seconds` for utterances of d seconds
    B    … without those that speak faster than mean + 4σ of their bucket
    C    … with the largest batch of each bucket that fits (OOMptimizer)
    D    … buckets of duration × tokens
    D+   … with edges that leave least compute in padding, as many cells

Batches are drawn with a seed from the length histogram and padded to their longest member, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from raytrain.lengths.cost import CostModel
from raytrain.lengths.histogram import LengthHistogram
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
_MAX_DRAWN = 4_000_000  # utterances of one scheme's simulation

# Bytes of a step with batch size, longest duration (ms) and most tokens, (N,) each.
Memory = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def title_of(scheme: str) -> str:
    """What a scheme is, in a few words."""
    return _TITLES[scheme]


def scheme_settings(scheme: str, base: BucketSettings) -> BucketSettings:
    """How a scheme cuts the grid, where `base` says how many durations and tokens, and the outlier limit."""
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
    # Limits for the duration buckets of NeMo's rule say nothing about others.
    max_tps = None if isinstance(base.max_tps, tuple) else base.max_tps
    return replace(plain, policy="optimal", num_cells=base.num_cells or durations * split, max_tps=max_tps)


def by_seconds(scheme: str) -> bool:
    """Whether a scheme sizes its batches by seconds of audio instead of by memory."""
    return scheme in ("A", "B")


def sizes_by_seconds(
    histogram: LengthHistogram, plan: BucketPlan, batch_seconds: float, penalty_seconds: float = PENALTY_SECONDS
) -> tuple[int, ...]:
    """Utterances that sum to `batch_seconds` of d + d² / `penalty_seconds`, on average over each bucket: a sampler
    fills a batch with what comes, hence the mean and not the bucket's edge."""
    seconds = histogram.cells / 1000
    needs = histogram.counts * (seconds + seconds**2 / penalty_seconds)
    place = plan.place(histogram.cells, histogram.tokens)[0]
    inside, number = place >= 0, len(plan.grid.buckets)
    counts = np.bincount(place[inside], histogram.counts[inside], number)
    total = np.bincount(place[inside], needs[inside], number)
    return tuple(max(1, int(batch_seconds * n / need)) if n else 1 for n, need in zip(counts, total, strict=True))


def largest_batch_seconds(
    histogram: LengthHistogram, plan: BucketPlan, memory: Memory, budget: float, highest: float = 1e5
) -> float:
    """The most seconds of audio that scheme A or B may have without its worst possible batch running out of memory:
    what a person finds by trying. 1 s where even that does not fit."""
    edges = np.array([(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets])

    def fits(batch_seconds: float) -> bool:
        sizes = np.array(sizes_by_seconds(histogram, plan, batch_seconds))
        return bool((memory(sizes, edges[:, 0], edges[:, 1]) <= budget).all())

    low, high = 1.0, highest
    while high - low > max(0.5, 0.005 * low):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def sizes_by_memory(plan: BucketPlan, memory: Memory, budget: float, most: int = 4096) -> tuple[int, ...]:
    """The largest batch of each bucket within the budget at its upper edges, at least 1."""
    found = []
    for bucket in plan.grid.buckets:
        low, high = 1, most + 1  # `low` fits, or is all there is
        while high - low > 1:
            middle = (low + high) // 2
            edges = np.array([middle]), np.array([bucket.max_duration_ms]), np.array([bucket.max_tokens])
            low, high = (middle, high) if memory(*edges)[0] <= budget else (low, middle)
        found.append(low)
    return tuple(found)


@dataclass(frozen=True)
class SchemeRow:
    """One scheme on one corpus and model.

    Padding: shares of padded audio, tokens and compute (attention's squares included) that hold nothing. `mean_batch`:
    utterances per worker and step; `audio_seconds`: their speech. `memory_mean`, `memory_worst`: predicted peak of a
    step over the budget. `steps_per_epoch`: of one worker that sees every utterance. `flops`: of a mean step, forward
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
    traced: int = 240,
) -> SchemeRow:
    """Draw `steps` batches of a scheme, buckets as often as they have batches, and count."""
    place = plan.place(histogram.cells, histogram.tokens)[0]
    kept = place >= 0
    counts = np.bincount(place[kept], histogram.counts[kept], len(sizes))
    size_of = np.array(sizes, np.int64)
    per_epoch = counts / size_of
    rng = np.random.default_rng(seed)
    steps = min(steps, max(traced, int(_MAX_DRAWN / (counts.sum() / per_epoch.sum()))))
    buckets = rng.choice(len(size_of), steps, p=per_epoch / per_epoch.sum())
    real, padded, peaks = np.zeros(3), np.zeros(3), np.zeros(steps)
    for number in np.unique(buckets):
        where = np.flatnonzero(buckets == number)
        members = np.flatnonzero(place == number)
        share = histogram.counts[members] / counts[number]
        drawn = members[rng.choice(len(members), (len(where), size_of[number]), p=share)]
        lengths, tokens = histogram.cells[drawn], histogram.tokens[drawn]
        longest, most, size = lengths.max(1), tokens.max(1), size_of[number]
        real += lengths.sum(), tokens.sum(), cost.of(lengths, tokens).sum()
        padded += size * longest.sum(), size * most.sum(), size * cost.of(longest, most).sum()
        peaks[where] = memory(np.full(len(where), size), longest, most) / budget
    audio, token, compute = (float(one) for one in 1 - real / padded)
    return SchemeRow(
        scheme=scheme,
        title=_TITLES[scheme],
        buckets=len(size_of),
        rejected=int(histogram.counts[~kept].sum()),
        batch_sizes=tuple(int(size) for size in size_of),
        batch_seconds=batch_seconds,
        audio_padding=audio,
        token_padding=token,
        compute_padding=compute,
        mean_batch=float(size_of[buckets].mean()),
        audio_seconds=float(real[0]) / 1000 / steps,
        memory_mean=float(peaks.mean()),
        memory_worst=float(peaks.max()),
        steps_per_epoch=float(per_epoch.sum()),
        flops=6 * float(padded[2]) / steps,  # two operations per multiply-accumulate; backward is twice forward
        memory_trace=tuple(np.round(peaks[:traced], 4).tolist()),
    )


def random_batch(histogram: LengthHistogram, size: int, seed: int = 0) -> list[tuple[int, int]]:
    """Durations (ms) and tokens of one random batch, to look at."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(histogram.counts), size, p=histogram.counts / histogram.total)
    return list(zip(histogram.cells[drawn].tolist(), histogram.tokens[drawn].tolist(), strict=True))


@dataclass(frozen=True)
class Hardware:
    """What a step takes on a GPU: `overhead_seconds`, whatever the batch (launches, the optimizer, what the exchange of
    gradients does not hide), and its operations at `peak_flops` · `utilisation`."""

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
    """What a scheme needs beside scheme A on `gpus` GPUs for `steps` steps.

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
