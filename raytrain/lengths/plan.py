"""`BucketPlan`: a 2D grid of duration × tokens made from a histogram, with the outlier limit of each duration.

The policy `equal_mass` is NeMo's rule (arXiv 2503.05931 and NeMo's `estimate_duration_bins_2d`): sort by
duration, cut where equal parts of the total duration are reached; drop what speaks faster than mean + 4σ of its
duration bucket; inside each bucket sort by tokens and cut into equal parts of the total tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from raytrain.errors import PlanError
from raytrain.lengths.cost import CANARY_1B, CostModel
from raytrain.lengths.grid import Bucket, BucketGrid
from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.optimal import GridRow, optimal_rows, optimal_token_edges

POLICIES = ("equal_mass", "optimal")
REASONS = ("", "too_short", "too_long", "too_many_tokens", "tps_outlier")


@dataclass(frozen=True)
class BucketSettings:
    """How to cut the grid.

    `policy` is `equal_mass` (NeMo's rule) or `optimal` (least padded compute by dynamic programming). Both make
    `num_duration_buckets` × `num_token_buckets` cells; with `num_cells`, `optimal` spreads that many over the
    durations by need instead. `tps_sigma` unset turns the tokens-per-second filter off; `max_tps` fixes its limit.
    """

    __pydantic_config__ = {"extra": "forbid"}

    num_duration_buckets: int = 30
    num_token_buckets: int = 2
    policy: str = "equal_mass"
    num_cells: int | None = None
    min_duration_ms: int = 100
    max_duration_ms: int = 40_000
    max_tokens: int = 1024
    tps_sigma: float | None = 4.0
    max_tps: float | None = None

    def __post_init__(self) -> None:
        problems = []
        for name in ("num_duration_buckets", "num_token_buckets", "min_duration_ms", "max_tokens"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_duration_ms <= self.min_duration_ms:
            problems.append(f"max_duration_ms {self.max_duration_ms} must exceed min_duration_ms")
        if self.policy not in POLICIES:
            problems.append(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.num_cells is not None and (self.num_cells < 1 or self.policy != "optimal"):
            problems.append(f"num_cells must be at least 1 and needs the policy optimal, got {self.num_cells}")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class BucketPlan:
    """The grid with what is known about it. `tps_limits` has one entry per duration bucket (inf: no limit);
    `counts`, `duration_padding`, `token_padding` (fractions against the bucket's edge) one per bucket."""

    grid: BucketGrid
    policy: str
    min_duration_ms: int
    max_tokens: int
    tps_limits: tuple[float, ...]
    counts: tuple[int, ...] = ()
    duration_padding: tuple[float, ...] = ()
    token_padding: tuple[float, ...] = ()
    rejected: dict[str, int] = field(default_factory=dict)
    histogram_id: str = ""

    def place(self, duration_ms: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) bucket numbers with -1 for rejected ones, and (N,) reasons, empty where there is a bucket.

        Durations count as their histogram cell (the next 10 ms), so plan and assignment agree on every row.
        """
        duration_ms = -(-np.asarray(duration_ms, np.int64) // 10) * 10
        tokens = np.asarray(tokens, np.int64)
        index = self.grid.duration_index(duration_ms)
        too_long = index >= len(self.tps_limits)
        limits = np.array([*self.tps_limits, math.inf])[index]
        buckets = self.grid.assign_many(duration_ms, tokens)
        outlier = tokens * 1000.0 / np.maximum(duration_ms, 1) > limits
        reasons = np.select(
            [
                duration_ms < self.min_duration_ms,
                too_long,
                tokens > self.max_tokens,
                outlier,
                buckets < 0,
            ],
            ["too_short", "too_long", "too_many_tokens", "tps_outlier", "too_many_tokens"],
            default="",
        )
        return np.where(reasons == "", buckets, -1), reasons

    def to_body(self) -> dict[str, Any]:
        """JSON values; an infinite limit becomes null."""
        body = asdict(self)
        body.pop("grid")
        body["buckets"] = [[bucket.max_duration_ms, bucket.max_tokens] for bucket in self.grid.buckets]
        body["tps_limits"] = [None if math.isinf(limit) else limit for limit in self.tps_limits]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in body.items()}

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> BucketPlan:
        """The inverse of `to_body`."""
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in body.items()}
        buckets = values.pop("buckets")
        values["tps_limits"] = tuple(math.inf if limit is None else limit for limit in body["tps_limits"])
        return cls(grid=BucketGrid(tuple(Bucket(*edges) for edges in buckets)), **values)


def make_plan(
    histogram: LengthHistogram, settings: BucketSettings, histogram_id: str, cost: CostModel = CANARY_1B
) -> BucketPlan:
    """A plan for the utterances of `histogram`; `cost` is what the policy `optimal` minimises.

    Raises `PlanError` where no utterance is within the limits.
    """
    usable = (
        (histogram.cells >= settings.min_duration_ms)
        & (histogram.cells <= settings.max_duration_ms)
        & (histogram.tokens <= settings.max_tokens)
    )
    kept = histogram.select(usable)
    if not kept.total:
        raise PlanError(
            "no utterance is within the limits",
            got=f"{histogram.total} utterances",
            allowed=f"{settings.min_duration_ms} to {settings.max_duration_ms} ms, ≤ {settings.max_tokens} tokens",
            remedy="widen buckets.min_duration_ms, max_duration_ms or max_tokens",
        )
    limits, buckets = [], []
    rows = _rows(kept, settings, cost)
    index = np.searchsorted([row.max_duration_ms for row in rows], kept.cells, side="left")
    for number, row in enumerate(rows):
        members = index == number
        tokens, counts = kept.tokens[members], kept.counts[members]
        rate = tokens * 1000.0 / kept.cells[members]
        limit = tps_limit(rate, counts, settings)
        inside = rate <= limit
        limits.append(limit)
        edges = _token_edges(tokens[inside], counts[inside], row, settings, cost)
        buckets += [Bucket(row.max_duration_ms, edge) for edge in edges.tolist()]
    bare = BucketPlan(
        grid=BucketGrid(tuple(buckets)),
        policy=settings.policy,
        min_duration_ms=settings.min_duration_ms,
        max_tokens=settings.max_tokens,
        tps_limits=tuple(limits),
        histogram_id=histogram_id,
    )
    return _with_counts(bare, histogram)


def _rows(kept: LengthHistogram, settings: BucketSettings, cost: CostModel) -> list[GridRow]:
    """Duration edges and how many token edges each has."""
    edges = equal_mass_edges(kept.cells, kept.counts, settings.num_duration_buckets)
    if settings.policy == "equal_mass":
        return [GridRow(edge, settings.num_token_buckets) for edge in edges.tolist()]
    # Edges are for the utterances that stay, and which stay depends on the edges: NeMo's rule says it well enough.
    index = np.searchsorted(edges, kept.cells, side="left")
    rate = kept.tokens * 1000.0 / kept.cells
    limits = [tps_limit(rate[index == number], kept.counts[index == number], settings) for number in range(len(edges))]
    staying = kept.select(rate <= np.array(limits)[index])
    number = settings.num_duration_buckets
    if settings.num_cells is not None:
        rows = optimal_rows(staying, cost, settings.num_cells)
    else:
        rows = optimal_rows(staying, cost, number * settings.num_token_buckets, num_rows=number)
    # The longest utterance may have been an outlier.
    longest = int(kept.cells.max())
    return [*rows[:-1], GridRow(longest, rows[-1].num_token_buckets)]


def _token_edges(
    tokens: np.ndarray, counts: np.ndarray, row: GridRow, settings: BucketSettings, cost: CostModel
) -> np.ndarray:
    if settings.policy == "optimal":
        return optimal_token_edges(tokens, counts, row.max_duration_ms, cost, row.num_token_buckets)
    order = np.argsort(tokens, kind="stable")
    return equal_mass_edges(tokens[order], counts[order], row.num_token_buckets)


def padded_compute(plan: BucketPlan, histogram: LengthHistogram, cost: CostModel) -> float:
    """Share of the compute that goes into padding when all utterances are padded to the edges of their buckets."""
    buckets, _ = plan.place(histogram.cells, histogram.tokens)
    inside = buckets >= 0
    counts = histogram.counts[inside]
    edges = np.array([(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets])[buckets[inside]]
    padded = float((counts * cost.of(edges[:, 0], edges[:, 1])).sum())
    real = float((counts * cost.of(histogram.cells[inside], histogram.tokens[inside])).sum())
    return 1 - real / padded


def equal_mass_edges(values: np.ndarray, counts: np.ndarray, num_buckets: int) -> np.ndarray:
    """Rising, distinct upper edges that cut sorted `values` where equal shares of Σ value·count are reached.

    The last edge is the largest value. Fewer edges come back where one value holds more than a share.
    """
    mass = np.cumsum(values * counts)
    shares = mass[-1] * np.arange(1, num_buckets) / num_buckets
    inner = values[np.searchsorted(mass, shares, side="left")]
    return np.unique(np.append(inner, values[-1]))


def tps_limit(rate: np.ndarray, counts: np.ndarray, settings: BucketSettings) -> float:
    """Highest tokens per second that one duration bucket keeps: the fixed number, or mean + σ·`tps_sigma`."""
    if settings.max_tps is not None:
        return max(settings.max_tps, float(rate.min()))
    if settings.tps_sigma is None:
        return math.inf
    mean = float(np.average(rate, weights=counts))
    deviation = math.sqrt(float(np.average((rate - mean) ** 2, weights=counts)))
    # Rounded up, so that a bucket of equal utterances (deviation 0) keeps them all.
    return math.ceil((mean + settings.tps_sigma * deviation) * 1e6) / 1e6


def _with_counts(plan: BucketPlan, histogram: LengthHistogram) -> BucketPlan:
    buckets, reasons = plan.place(histogram.cells, histogram.tokens)
    counts, durations, tokens = [], [], []
    for number, bucket in enumerate(plan.grid.buckets):
        members = buckets == number
        count = int(histogram.counts[members].sum())
        counts.append(count)
        for values, edge, out in (
            (histogram.cells, bucket.max_duration_ms, durations),
            (histogram.tokens, bucket.max_tokens, tokens),
        ):
            real = int((values[members] * histogram.counts[members]).sum())
            out.append(round(1 - real / (count * edge), 6) if count else 0.0)
    names = [reason for reason in np.unique(reasons).tolist() if reason]
    rejected = {name: int(histogram.counts[reasons == name].sum()) for name in names}
    values = {**asdict(plan), "grid": plan.grid}
    return BucketPlan(
        **{
            **values,
            "counts": tuple(counts),
            "duration_padding": tuple(durations),
            "token_padding": tuple(tokens),
            "rejected": rejected,
        }
    )
