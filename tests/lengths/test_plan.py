"""Histogram, grid, plan and padding: counts add up and every utterance has one bucket or one reason."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.errors import DataError, PlanError
from raytrain.lengths import (
    Bucket,
    BucketGrid,
    BucketPlan,
    BucketSettings,
    LengthHistogram,
    make_plan,
    padding_by_scheme,
)
from raytrain.lengths.plan import REASONS, equal_mass_edges

lengths = st.lists(st.tuples(st.integers(1, 50_000), st.integers(1, 300)), max_size=60)


def histogram(pairs) -> LengthHistogram:
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return LengthHistogram.from_lengths(array[:, 0], array[:, 1])


@given(lengths, lengths, lengths)
def test_histograms_add_in_any_order_and_grouping(a, b, c):
    first, second, third = histogram(a), histogram(b), histogram(c)
    assert first + second == second + first
    assert (first + second) + third == first + (second + third)
    assert first + LengthHistogram.empty() == first == LengthHistogram.empty() + first
    assert first + second + third == histogram(a + b + c)


@given(lengths, st.randoms(use_true_random=False), st.integers(1, 5))
def test_any_split_of_a_corpus_gives_the_same_histogram(pairs, random, parts):
    whole = histogram(pairs)
    random.shuffle(pairs)
    total = LengthHistogram.empty()
    for part in range(parts):
        total += histogram(pairs[part::parts])
    assert total == whole
    keys = list(zip(whole.cells.tolist(), whole.tokens.tolist(), strict=True))
    counted = Counter((-(-duration // 10) * 10, tokens) for duration, tokens in pairs)
    assert keys == sorted(counted) and whole.counts.tolist() == [counted[key] for key in keys]
    assert whole.counts.dtype == whole.cells.dtype == whole.tokens.dtype == np.int64


@given(lengths.filter(len), st.floats(0, 1))
def test_quantiles_are_numpys_on_cell_edges(pairs, q):
    cells = [-(-duration // 10) * 10 for duration, _ in pairs]
    assert histogram(pairs).quantile(q) == np.quantile(cells, q, method="inverted_cdf")


@given(lengths)
def test_histogram_keeps_counts_and_rounds_durations_up(pairs):
    made = histogram(pairs)
    assert made.total == len(pairs)
    assert made.real_duration_ms == sum(duration for duration, _ in pairs)
    if pairs:
        assert made.quantile(1.0) == -(-max(duration for duration, _ in pairs) // 10) * 10
        assert len(made.cells) <= len(pairs)
    assert made.hours == pytest.approx(sum(duration for duration, _ in pairs) / 3.6e6)


def test_histogram_refuses_lengths_below_one():
    with pytest.raises(DataError, match="at least 1"):
        histogram([(0, 5)])
    with pytest.raises(DataError, match="too large to count"):
        histogram([(2**61, 5)])


POLICIES = st.sampled_from(
    [{}, {"tps_sigma": None}, {"tps_sigma": 0.5}, {"policy": "optimal"}, {"policy": "optimal", "num_cells": 7}]
)


@given(lengths, st.integers(1, 6), st.integers(1, 4), POLICIES)
@settings(max_examples=100, deadline=None)
def test_every_utterance_gets_one_bucket_or_one_reason(pairs, num_durations, num_tokens, policy):
    made = histogram(pairs)
    wanted = BucketSettings(num_durations, num_tokens, max_tokens=200, **policy)
    try:
        plan = make_plan(made, wanted, "id")
    except PlanError:
        usable = [pair for pair in pairs if 100 <= -(-pair[0] // 10) * 10 <= 40_000 and pair[1] <= 200]
        assert not usable
        return
    array = np.array(pairs, np.int64).reshape(-1, 2)
    buckets, reasons = plan.assign(array[:, 0], array[:, 1])
    assert ((buckets >= 0) == (reasons == "")).all() and set(reasons.tolist()) <= set(REASONS)
    for (duration, tokens), bucket in zip(pairs, buckets.tolist(), strict=True):
        if bucket >= 0:
            edge = plan.grid.buckets[bucket]
            assert duration <= edge.max_duration_ms and tokens <= edge.max_tokens
    counts = np.bincount(buckets[buckets >= 0], minlength=len(plan.grid.buckets))
    assert tuple(counts.tolist()) == plan.counts
    assert sum(plan.counts) + sum(plan.rejected.values()) == len(pairs)
    assert plan.rejected == {reason: n for reason, n in Counter(reasons.tolist()).items() if reason}
    assert BucketPlan.from_body(plan.to_body()) == plan


def test_edges_belong_to_their_bucket():
    grid = BucketGrid((Bucket(2000, 10), Bucket(2000, 20), Bucket(5000, 30)))
    assert [grid.assign(*pair) for pair in [(2000, 10), (1, 11), (2001, 1), (5000, 30), (5001, 1), (9, 21)]] == [
        0,
        1,
        2,
        2,
        -1,
        -1,
    ]


def test_equal_mass_edges_cut_where_shares_of_the_total_are_reached():
    values = np.arange(1, 101)
    edges = equal_mass_edges(values, np.ones(100, int), 4)
    mass = [values[(values > low) & (values <= high)].sum() for low, high in zip([0, *edges[:-1]], edges, strict=True)]
    # A bucket may overshoot its share by one value; its excess is missing in the last bucket.
    assert edges.tolist() == [51, 72, 88, 100] and all(0 <= edge - 5050 / 4 <= 100 for edge in mass[:-1])
    # A value that holds several shares repeats.
    assert equal_mass_edges(np.array([5, 9]), np.array([1000, 1]), 4).tolist() == [5, 5, 5, 9]


def cut(values: list[int], parts: int) -> list[int]:
    """Upper edges that the published rule gives sorted values, one at a time."""
    share, gone, edges = Fraction(sum(values), parts), 0, []
    for value in values:
        if gone > share:
            edges.append(value)
            gone = 0
        gone += value
    return [*edges, values[-1]]


def published_rule(pairs: list[tuple[int, int]], num_durations: int, num_tokens: int) -> list[Bucket]:
    """NeMo's plan for (duration in ms, tokens), with all utterances up to an edge inside its bucket."""
    below, buckets = 0, []
    for edge, repeats in Counter(cut(sorted(duration for duration, _ in pairs), num_durations)).items():
        rates = [(Fraction(1000 * tokens, duration), tokens) for duration, tokens in pairs if below < duration <= edge]
        mean = sum(rate for rate, _ in rates) / len(rates)
        variance = sum((rate - mean) ** 2 for rate, _ in rates) / len(rates)
        kept = sorted(tokens for rate, tokens in rates if rate <= mean or (rate - mean) ** 2 <= 16 * variance)
        buckets += [Bucket(edge, tokens) for tokens in sorted(set(cut(kept, repeats * num_tokens)))]
        below = edge
    return buckets


spread = st.tuples(st.integers(10, 4000).map(lambda cells: 10 * cells), st.integers(1, 300), st.integers(1, 30))
skewed = st.tuples(st.sampled_from([200, 3000, 30_000]), st.sampled_from([1, 20, 300]), st.integers(1, 30))


@given(st.lists(spread | skewed, min_size=1, max_size=30), st.integers(1, 8), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_equal_mass_is_the_published_rule(rows, num_durations, num_tokens):
    pairs = [(duration, tokens) for duration, tokens, count in rows for _ in range(count)]
    plan = make_plan(histogram(pairs), BucketSettings(num_durations, num_tokens), "id")
    assert list(plan.grid.buckets) == published_rule(pairs, num_durations, num_tokens)


def test_repeated_duration_edges_become_one_bucket_with_more_token_edges():
    pairs = [(1000, 5)] * 100 + [(20_000, tokens) for tokens in range(50, 110)] + [(30_000, 90)] * 10
    plan = make_plan(histogram(pairs), BucketSettings(5, 2), "id")
    # A fifth is 320 s, passed by 17 utterances of 20 s, so 20 000 comes up 3 times and 30 000 twice; all utterances
    # of 30 s have equally many tokens.
    assert [bucket.max_duration_ms for bucket in plan.grid.buckets] == [20_000] * 6 + [30_000]


def test_fast_talkers_are_rejected_on_the_upper_side_only():
    pairs = [(10_000, 50 + i % 7) for i in range(500)] + [(10_000, 2), (10_000, 400)]
    plan = make_plan(histogram(pairs), BucketSettings(num_duration_buckets=1, num_token_buckets=1), "id")
    assert plan.rejected == {"tps_outlier": 1}
    assert plan.grid.buckets[0].max_tokens == 56


def test_a_fixed_limit_applies_and_a_bucket_left_empty_is_named():
    pairs = [(1000, 20)] * 50 + [(10_000, 50)] * 50
    edges = {"num_duration_buckets": 2, "num_token_buckets": 1, "tps_sigma": None}
    made = histogram(pairs + [(900, 19)])
    plan = make_plan(made, BucketSettings(**edges, max_tps=20), "id")
    assert plan.rejected == {"tps_outlier": 1} and set(plan.tps_limits) == {20.0}
    fast = histogram([(1000, 20)] * 100 + [(10_000, 50)] * 8)
    with pytest.raises(PlanError, match=r"bucket 0 \(≤ 1000 ms\) keeps no utterance.*got 20 .*allowed: 19;"):
        make_plan(fast, BucketSettings(**edges, max_tps=19), "id")
    # Edges by need are for the kept utterances.
    plan = make_plan(fast, BucketSettings(**edges, max_tps=19, policy="optimal"), "id")
    assert plan.rejected == {"tps_outlier": 100} and plan.grid.buckets == (Bucket(10_000, 50),)
    with pytest.raises(PlanError, match="keeps no utterance"):
        make_plan(fast, BucketSettings(**edges, max_tps=1, policy="optimal"), "id")


def test_one_limit_per_duration_bucket():
    made = histogram([(1000, 20)] * 149 + [(1000, 25)] + [(10_000, 50)] * 4 + [(10_000, 100)])
    plan = make_plan(made, BucketSettings(2, 1, max_tps=(20.0, 9.5)), "id")
    assert plan.tps_limits == (20.0, 9.5) and plan.rejected == {"tps_outlier": 2}
    with pytest.raises(PlanError, match="got 1 numbers; allowed: 2, for the edges 1000, 10000 ms"):
        make_plan(made, BucketSettings(2, 1, max_tps=(20.0,)), "id")


def test_meaningless_limits_are_rejected():
    with pytest.raises(ValueError, match="max_tps must be above 0 and at most 1000000, got 0"):
        BucketSettings(max_tps=0)
    with pytest.raises(ValueError, match="max_tps has 3 numbers for 2 duration buckets"):
        BucketSettings(2, max_tps=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="per duration bucket needs the policy equal_mass"):
        BucketSettings(2, policy="optimal", max_tps=(1.0, 2.0))
    with pytest.raises(ValueError, match="tps_sigma must be from 0 to 1000000, got -1.0"):
        BucketSettings(tps_sigma=-1.0)


def test_too_long_short_and_wordy_have_names():
    pairs = [(1000, 10), (60_000, 10), (20, 3), (1000, 2000)]
    plan = make_plan(histogram(pairs), BucketSettings(num_duration_buckets=1), "id")
    _, reasons = plan.assign(*np.array(pairs).T)
    assert reasons.tolist() == ["", "too_long", "too_short", "too_many_tokens"]


def test_2d_buckets_pad_less_than_random_batches():
    rng = np.random.default_rng(0)
    durations = rng.lognormal(8.5, 0.7, 20_000).clip(500, 39_000).astype(int)
    tokens = (durations / 1000 * rng.normal(4, 1, 20_000).clip(1)).astype(int) + 9
    made = LengthHistogram.from_lengths(durations, tokens)
    plan = make_plan(made, BucketSettings(), "id")
    random, batch, two = padding_by_scheme(made, plan, seed=1)
    assert random.audio_padding > 0.4 > 0.1 > two.audio_padding
    assert random.token_padding > batch.token_padding > two.token_padding
    assert padding_by_scheme(made, plan, seed=1) == [random, batch, two]
