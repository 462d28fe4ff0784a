"""The policy `optimal`: equal to trying everything on small corpora, never worse than NeMo's rule on large ones."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.config import load_config
from raytrain.lengths import BucketSettings, LengthHistogram, make_plan
from raytrain.lengths.compare import PaddedCells, compare_policies
from raytrain.lengths.cost import CANARY_1B, CostModel
from raytrain.lengths.optimal import candidates, optimal_rows, optimal_token_edges
from raytrain.model.cost import cost_of

COST = CostModel(frame=2.0, frame_squared=0.01, token=3.0, token_squared=0.05, frame_token=0.02)


def subsets(values: list[int], number: int):
    """Rising edges that end with the largest value."""
    *inner, last = values
    return ((*chosen, last) for size in range(number) for chosen in combinations(inner, size))


def row_cost(tokens, counts, duration: int, number: int) -> float:
    """Least cost of one row by trying all token edges."""
    best = np.inf
    for edges in subsets(sorted(set(tokens.tolist())), number):
        padded = np.array(edges)[np.searchsorted(edges, tokens)]
        best = min(best, float((counts * COST.of(np.full(len(tokens), duration), padded)).sum()))
    return best


def best_of_all(histogram: LengthHistogram, num_cells: int) -> float:
    """Least cost by trying all grids."""
    best = np.inf
    for edges in subsets(sorted(set(histogram.cells.tolist())), num_cells):
        index = np.searchsorted(edges, histogram.cells)
        rows = [
            [
                row_cost(histogram.tokens[index == k], histogram.counts[index == k], edge, m)
                for m in range(1, num_cells - len(edges) + 2)
            ]
            for k, edge in enumerate(edges)
        ]
        spare = {0: 0.0}
        for row in rows:
            merged: dict[int, float] = {}
            for used, total in spare.items():
                for extra, value in enumerate(row):
                    if used + extra <= num_cells - len(edges):
                        key = used + extra
                        merged[key] = min(merged.get(key, np.inf), total + value)
            spare = merged
        best = min(best, *spare.values())
    return best


LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=9)


def histogram_of(rows) -> LengthHistogram:
    cells, tokens, counts = (np.array(column) for column in zip(*rows, strict=True))
    return LengthHistogram.from_arrays(cells * 700, tokens * 11, counts, 0)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_the_grid_is_the_best_of_all_grids(rows, num_cells):
    histogram = histogram_of(rows)
    actual = optimal_rows(histogram, COST, num_cells)
    assert sum(row.num_token_buckets for row in actual) <= num_cells
    index = np.searchsorted([row.max_duration_ms for row in actual], histogram.cells)
    total = 0.0
    for number, row in enumerate(actual):
        tokens, counts = histogram.tokens[index == number], histogram.counts[index == number]
        edges = optimal_token_edges(tokens, counts, row.max_duration_ms, COST, row.num_token_buckets)
        assert len(edges) <= row.num_token_buckets and edges[-1] == tokens.max()
        padded = edges[np.searchsorted(edges, tokens)]
        total += float((counts * COST.of(np.full(len(tokens), row.max_duration_ms), padded)).sum())
    assert total == pytest.approx(best_of_all(histogram, num_cells))


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 3))
def test_equal_rows_are_the_best_of_their_kind(rows, num_rows, split):
    histogram = histogram_of(rows)
    actual = optimal_rows(histogram, COST, num_rows * split, num_rows=num_rows)
    best = np.inf
    for edges in subsets(sorted(set(histogram.cells.tolist())), num_rows):
        index = np.searchsorted(edges, histogram.cells)
        best = min(
            best,
            sum(
                row_cost(histogram.tokens[index == k], histogram.counts[index == k], edge, split)
                for k, edge in enumerate(edges)
            ),
        )
    index = np.searchsorted([row.max_duration_ms for row in actual], histogram.cells)
    total = sum(
        row_cost(histogram.tokens[index == k], histogram.counts[index == k], row.max_duration_ms, split)
        for k, row in enumerate(actual)
    )
    assert len(actual) <= num_rows and total == pytest.approx(best)


def corpus(number: int, seed: int) -> LengthHistogram:
    rng = np.random.default_rng(seed)
    seconds = np.where(rng.random(number) < 0.6, rng.lognormal(1.5, 0.6, number), rng.uniform(1, 38, number))
    seconds = seconds.clip(0.5, 39)
    tokens = (seconds * rng.normal(4.5, 1.2, number).clip(1)).astype(np.int64) + 10
    return LengthHistogram.from_lengths((seconds * 1000).astype(np.int64), tokens)


def test_optimal_pads_less_than_equal_mass_and_sharing_by_need_least():
    histogram = corpus(30_000, 3)
    shape = {"num_duration_buckets": 10, "num_token_buckets": 2}
    by_policy = {
        "equal_mass": BucketSettings(**shape),
        "optimal": BucketSettings(**shape, policy="optimal"),
        "by_need": BucketSettings(**shape, policy="optimal", num_cells=20),
    }
    plans = {name: make_plan(histogram, settings, "h") for name, settings in by_policy.items()}
    padding = {name: PaddedCells.of(plan, histogram).compute_padding(CANARY_1B) for name, plan in plans.items()}
    assert padding["by_need"] < padding["optimal"] < 0.9 * padding["equal_mass"]
    for plan in plans.values():
        assert len(plan.grid.buckets) <= 20
        assert sum(plan.counts) + sum(plan.rejected.values()) == histogram.total
        assert set(plan.rejected) <= {"tps_outlier"}


def test_candidates_spread_the_weight():
    values = np.arange(1, 1001)
    actual = candidates(values, np.ones(1000), 10)
    assert actual.tolist() == list(range(100, 1001, 100))
    assert candidates(values[:5], np.ones(5), 10).tolist() == [1, 2, 3, 4, 5]


def test_settings_say_what_is_allowed():
    with pytest.raises(ValueError, match="policy must be one of equal_mass, optimal"):
        BucketSettings(policy="best")
    with pytest.raises(ValueError, match="num_cells needs the policy optimal"):
        BucketSettings(num_cells=5)


def test_the_default_cost_is_canary_1bs():
    config = load_config(Path(__file__).parents[2] / "configs" / "canary-1b.yaml").model
    assert cost_of(config) == CANARY_1B
    # Multiply-accumulates per frame and token are about the parameters that each passes.
    assert CANARY_1B.frame + CANARY_1B.token == pytest.approx(1016.7e6, rel=0.05)


def test_policies_side_by_side():
    rows = compare_policies(corpus(5_000, 4), BucketSettings(6, 2), CANARY_1B)
    assert [row.cells for row in rows] == [6, 6, 12, 12, 12] and len({row.policy for row in rows}) == 5
    padded = [row.padded_compute for row in rows]
    assert padded[1] < padded[0] and padded[4] < padded[3] < padded[2] < padded[0]
    assert all(0 < row.audio_padding < 1 and 0 < row.token_padding < 1 for row in rows)
