"""`BucketPlan`: a 2D grid of duration × tokens made from a histogram, with the outlier limit of each duration.

The policy `equal_mass` is NeMo's rule (arXiv 2503.05931 and NeMo's `estimate_duration_bins_2d`): sort by duration,
start a new bucket whenever more than an equal part of the total duration has accumulated; drop utterances with more
tokens per second than mean + 4σ of their duration bucket; inside each bucket sort by tokens and cut by the same rule.
If skewed data give n equal duration edges, they become one bucket with n times as many token edges.

It differs from NeMo where NeMo's plan would reject utterances that it was made for: token edges and limits of a bucket
count exactly the utterances that training will place there, those at its upper edge and the longest of all included;
equal utterances (σ = 0) are kept; the last edge is the longest utterance, also under a `max_duration_ms`; equal token
edges of a bucket, of which only one could ever be used, are merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np

from raytrain.errors import PlanError
from raytrain.lengths.cost import CANARY_1B, CostModel
from raytrain.lengths.grid import Bucket, BucketGrid
from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.optimal import GridRow, optimal_rows, optimal_token_edges
from raytrain.lengths.padding import padding_fraction
from raytrain.settings import Range, Setting, refuse, setting_problems

Policy = Literal["equal_mass", "optimal"]
Rate = Annotated[float, Range(0, 10**6, above=True)]  # tokens per second
REASONS = ("", "too_short", "too_long", "too_many_tokens", "tps_outlier")


@dataclass(frozen=True)
class BucketSettings:
    """How to cut the grid."""

    __pydantic_config__ = {"extra": "forbid"}

    num_duration_buckets: Annotated[int, Range(1, 100_000), Setting("Buckets by duration.", unit="buckets")] = 30
    num_token_buckets: Annotated[
        int, Range(1, 100_000), Setting("Buckets by tokens in each bucket by duration.", unit="buckets")
    ] = 2
    policy: Annotated[
        Policy,
        Setting("equal_mass is NeMo's rule; optimal finds the edges with the least padded compute."),
    ] = "equal_mass"
    num_cells: Annotated[
        int | None,
        Range(1, 100_000),
        Setting(
            "With optimal: this many cells, spread over the durations by need, instead of as many for each duration.",
            unit="cells",
        ),
    ] = None
    min_duration_ms: Annotated[int, Range(1, 10**9), Setting("Shorter utterances are rejected.", unit="ms")] = 100
    max_duration_ms: Annotated[int, Range(2, 10**9), Setting("Longer utterances are rejected.", unit="ms")] = 40_000
    max_tokens: Annotated[
        int, Range(1, 1 << 40), Setting("Utterances of more tokens, with their prompt, are rejected.", unit="tokens")
    ] = 1024
    tps_sigma: Annotated[
        float | None,
        Range(0, 10**6),
        Setting(
            "Utterances are rejected whose tokens per second are further above the mean of their duration bucket. "
            "null turns this off.",
            unit="standard deviations",
        ),
    ] = 4.0
    max_tps: Annotated[
        Rate | tuple[Rate, ...] | None,
        Setting(
            "A fixed limit instead of tps_sigma: one number, or with equal_mass one per duration bucket of the plan.",
            unit="tokens/s",
        ),
    ] = None

    def __post_init__(self) -> None:
        refuse(setting_problems(self))
        problems = []
        if self.max_duration_ms <= self.min_duration_ms:
            problems.append(f"max_duration_ms {self.max_duration_ms} must exceed min_duration_ms")
        if self.num_cells is not None and self.policy != "optimal":
            problems.append(f"num_cells needs the policy optimal, got {self.policy!r}")
        refuse(problems + self._max_tps_problems())

    def _max_tps_problems(self) -> list[str]:
        problems: list[str] = []
        if self.max_tps is None:
            return problems
        limits = self.max_tps if isinstance(self.max_tps, tuple) else (self.max_tps,)
        if not limits:
            problems.append("max_tps must be a number, or one per duration bucket, got an empty list")
        if isinstance(self.max_tps, tuple) and self.policy != "equal_mass":
            problems.append(f"max_tps per duration bucket needs the policy equal_mass, got {self.policy!r}")
        if isinstance(self.max_tps, tuple) and len(limits) > self.num_duration_buckets:
            problems.append(f"max_tps has {len(limits)} numbers for {self.num_duration_buckets} duration buckets")
        return problems


@dataclass(frozen=True)
class BucketPlanBody:
    """What `BucketPlan.to_body` returns and `from_body` takes."""

    buckets: list[tuple[int, int]]
    policy: str
    min_duration_ms: int
    max_tokens: int
    tps_limits: list[float | None]
    counts: list[int]
    duration_padding: list[float | None]
    token_padding: list[float | None]
    rejected: dict[str, int]
    histogram_id: str

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (self.buckets, self.counts, self.duration_padding, self.token_padding)}
        durations = {duration for duration, _ in self.buckets}
        if len(lengths) != 1 or len(durations) != len(self.tps_limits):
            raise ValueError("its lists differ in length")
        if not self.buckets or min(min(edges) for edges in self.buckets) < 1:
            raise ValueError("edges of buckets must be at least 1")


@dataclass(frozen=True)
class BucketPlan:
    """The grid, and its statistics on a histogram. `tps_limits` has one entry per duration bucket (inf: no limit);
    `counts`, `duration_padding`, `token_padding` (fractions against the bucket's edge, None for an empty bucket) one
    per bucket."""

    grid: BucketGrid
    policy: str
    min_duration_ms: int
    max_tokens: int
    tps_limits: tuple[float, ...]
    counts: tuple[int, ...] = ()
    duration_padding: tuple[float | None, ...] = ()
    token_padding: tuple[float | None, ...] = ()
    rejected: dict[str, int] = field(default_factory=dict)
    histogram_id: str = ""

    def assign(self, duration_ms: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) bucket numbers, -1 for rejected utterances, and (N,) reasons, empty for accepted utterances.

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
    def from_body(cls, body: Mapping[str, Any]) -> BucketPlan:
        """The inverse of `to_body`."""
        return cls(
            grid=BucketGrid(tuple(Bucket(*edges) for edges in body["buckets"])),
            policy=body["policy"],
            min_duration_ms=body["min_duration_ms"],
            max_tokens=body["max_tokens"],
            tps_limits=tuple(math.inf if limit is None else limit for limit in body["tps_limits"]),
            counts=tuple(body.get("counts", ())),
            duration_padding=tuple(body.get("duration_padding", ())),
            token_padding=tuple(body.get("token_padding", ())),
            rejected=body.get("rejected", {}),
            histogram_id=body.get("histogram_id", ""),
        )


def make_plan(
    histogram: LengthHistogram, settings: BucketSettings, histogram_id: str, cost: CostModel = CANARY_1B
) -> BucketPlan:
    """A plan for the utterances of `histogram`; `cost` is what the policy `optimal` minimizes.

    Raises `PlanError` if no utterance is within the limits, if a duration bucket would keep none under `max_tps`, or if
    `max_tps` does not have one number per duration bucket.
    """
    kept = _within_limits(histogram, settings)
    rows = _rows(kept, settings, cost)
    index, limits, inside = _staying(kept, [row.max_duration_ms for row in rows], settings)
    buckets = []
    for number, row in enumerate(rows):
        members = inside & (index == number)
        if not members.any():
            name = f"duration bucket {number} (≤ {row.max_duration_ms} ms)"
            raise _nobody_stays(name, kept.select(index == number), limits[number])
        edges = _token_edges(kept.tokens[members], kept.counts[members], row, settings, cost)
        buckets += [Bucket(row.max_duration_ms, edge) for edge in edges.tolist()]
    bare = BucketPlan(
        grid=BucketGrid(tuple(buckets)),
        policy=settings.policy,
        min_duration_ms=settings.min_duration_ms,
        max_tokens=settings.max_tokens,
        tps_limits=tuple(limits.tolist()),
        histogram_id=histogram_id,
    )
    return _with_counts(bare, histogram)


def _within_limits(histogram: LengthHistogram, settings: BucketSettings) -> LengthHistogram:
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
    return kept


def _rows(kept: LengthHistogram, settings: BucketSettings, cost: CostModel) -> list[GridRow]:
    """Duration edges and the number of token edges of each."""
    number, split = settings.num_duration_buckets, settings.num_token_buckets
    edges, repeats = np.unique(equal_mass_edges(kept.cells, kept.counts, number), return_counts=True)
    if settings.policy == "equal_mass":
        return [GridRow(edge, n * split) for edge, n in zip(edges.tolist(), repeats.tolist(), strict=True)]
    # Edges are for the kept utterances, and which are kept depends on the edges: NeMo's rule is close enough.
    _, limits, inside = _staying(kept, edges.tolist(), settings)
    if not inside.any():
        raise _nobody_stays("the plan", kept, limits[0])
    staying = kept.select(inside)
    if settings.num_cells is not None:
        rows = optimal_rows(staying, cost, settings.num_cells)
    else:
        rows = optimal_rows(staying, cost, number * split, num_rows=number)
    # The longest utterance may have been an outlier.
    longest = int(kept.cells.max())
    return [*rows[:-1], GridRow(longest, rows[-1].num_token_buckets)]


def _staying(
    kept: LengthHistogram, duration_edges: Sequence[int], settings: BucketSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N,) duration bucket of each cell, (K,) highest tokens per second per bucket, (N,) whether a cell is within
    them."""
    number = len(duration_edges)
    if isinstance(settings.max_tps, tuple) and len(settings.max_tps) != number:
        raise PlanError(
            "max_tps must have one number per duration bucket",
            got=f"{len(settings.max_tps)} numbers",
            allowed=f"{number}, for the edges {', '.join(map(str, duration_edges))} ms",
            remedy="change buckets.max_tps, or give one number for all",
        )
    index = np.searchsorted(duration_edges, kept.cells, side="left")
    rate = kept.tokens * 1000.0 / kept.cells
    if settings.max_tps is not None:
        limits = np.broadcast_to(np.array(settings.max_tps, np.float64), number)
    elif settings.tps_sigma is None:
        limits = np.full(number, np.inf)
    else:
        members = (index == k for k in range(number))
        limits = np.array([tps_limit(rate[mine], kept.counts[mine], settings.tps_sigma) for mine in members])
    return index, limits, rate <= limits[index]


def _nobody_stays(what: str, members: LengthHistogram, limit: float) -> PlanError:
    slowest = float((members.tokens * 1000.0 / members.cells).min())
    return PlanError(
        f"{what} keeps no utterance under max_tps",
        got=f"{slowest:.6g} tokens per second for the slowest",
        allowed=f"{limit:.6g}",
        remedy="raise buckets.max_tps or buckets.min_duration_ms",
    )


def _token_edges(
    tokens: np.ndarray, counts: np.ndarray, row: GridRow, settings: BucketSettings, cost: CostModel
) -> np.ndarray:
    if settings.policy == "optimal":
        return optimal_token_edges(tokens, counts, row.max_duration_ms, cost, row.num_token_buckets)
    order = np.argsort(tokens, kind="stable")
    return np.unique(equal_mass_edges(tokens[order], counts[order], row.num_token_buckets))


def equal_mass_edges(values: np.ndarray, counts: np.ndarray, num_buckets: int) -> np.ndarray:
    """(≤ num_buckets,) upper edges of sorted `values`, NeMo's and lhotse's rule; edges repeat if one value holds
    several shares.

    A cut comes before the first utterance with more than Σ value·count / num_buckets accumulated since the previous
    cut, and its edge is that utterance's value. The last edge is the largest value. Integer arithmetic, hence exact.
    """
    mass = np.cumsum(values * counts) * num_buckets
    edges, target = [], int(mass[-1]) // num_buckets  # num_buckets times the mass that must have accumulated
    while (cell := int(np.searchsorted(mass, target, side="right"))) < len(mass):
        step = int(values[cell]) * num_buckets
        before = int(mass[cell]) - step * int(counts[cell])
        # The cut is between two utterances of this cell, or after its last one.
        passed = (target - before) // step + 1
        cell += passed == counts[cell]
        if cell == len(mass):
            break
        edges.append(values[cell])
        target = before + passed * step + int(mass[-1]) // num_buckets
    return np.array([*edges, values[-1]])


def tps_limit(rate: np.ndarray, counts: np.ndarray, sigma: float) -> float:
    """mean + `sigma`·σ of the tokens per second `rate` (N,) of `counts` utterances: the most that one bucket keeps."""
    mean = float(np.average(rate, weights=counts))
    deviation = math.sqrt(float(np.average((rate - mean) ** 2, weights=counts)))
    # Rounded up, so that a bucket of equal utterances (deviation 0) keeps them all.
    return math.ceil((mean + sigma * deviation) * 1e6) / 1e6


def _with_counts(plan: BucketPlan, histogram: LengthHistogram) -> BucketPlan:
    buckets, reasons = plan.assign(histogram.cells, histogram.tokens)
    members = [histogram.select(buckets == number) for number in range(len(plan.grid.buckets))]
    pairs = list(zip(members, plan.grid.buckets, strict=True))
    names = [reason for reason in np.unique(reasons).tolist() if reason]
    return replace(
        plan,
        counts=tuple(cells.total for cells in members),
        duration_padding=tuple(_edge_padding(cells.cells, cells.counts, edge.max_duration_ms) for cells, edge in pairs),
        token_padding=tuple(_edge_padding(cells.tokens, cells.counts, edge.max_tokens) for cells, edge in pairs),
        rejected={name: int(histogram.counts[reasons == name].sum()) for name in names},
    )


def _edge_padding(lengths: np.ndarray, counts: np.ndarray, edge: int) -> float | None:
    """The padding of a bucket whose utterances are all padded to its edge; None for an empty bucket."""
    total = int(counts.sum())
    return round(padding_fraction(int((lengths * counts).sum()), total * edge), 6) if total else None
