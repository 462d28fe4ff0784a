"""Histogram, grid, plan and padding: counts add up and every utterance has one place or one reason."""

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
from raytrain.lengths.plan import equal_mass_edges

lengths = st.lists(st.tuples(st.integers(1, 50_000), st.integers(1, 300)), max_size=60)


def histogram(pairs) -> LengthHistogram:
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return LengthHistogram.from_lengths(array[:, 0], array[:, 1])


@given(lengths, lengths, lengths)
def test_histograms_add_in_any_order_and_grouping(a, b, c):
    one, two, three = histogram(a), histogram(b), histogram(c)
    assert one + two == two + one
    assert (one + two) + three == one + (two + three)
    assert one + LengthHistogram.empty() == one
    assert one + two + three == histogram(a + b + c)


@given(lengths)
def test_histogram_keeps_counts_and_rounds_durations_up(pairs):
    made = histogram(pairs)
    assert made.total == len(pairs)
    assert made.real_duration_ms == sum(duration for duration, _ in pairs)
    if pairs:
        assert made.quantile(1.0) == -(-max(duration for duration, _ in pairs) // 10) * 10
        assert len(made.cells) <= len(pairs)


def test_histogram_refuses_lengths_below_one():
    with pytest.raises(DataError, match="at least 1"):
        histogram([(0, 5)])


@given(lengths, st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=60)
def test_every_utterance_gets_one_bucket_or_one_reason(pairs, num_durations, num_tokens):
    made = histogram(pairs)
    wanted = BucketSettings(num_duration_buckets=num_durations, num_token_buckets=num_tokens, max_tokens=200)
    try:
        plan = make_plan(made, wanted, "id")
    except PlanError:
        usable = [pair for pair in pairs if 100 <= -(-pair[0] // 10) * 10 <= 40_000 and pair[1] <= 200]
        assert not usable
        return
    array = np.array(pairs, np.int64).reshape(-1, 2)
    buckets, reasons = plan.place(array[:, 0], array[:, 1])
    assert ((buckets >= 0) == (reasons == "")).all()
    for (duration, tokens), bucket in zip(pairs, buckets.tolist(), strict=True):
        if bucket >= 0:
            edge = plan.grid.buckets[bucket]
            assert duration <= edge.max_duration_ms and tokens <= edge.max_tokens
    counts = np.bincount(buckets[buckets >= 0], minlength=len(plan.grid.buckets))
    assert tuple(counts.tolist()) == plan.counts
    assert sum(plan.counts) + sum(plan.rejected.values()) == len(pairs)
    assert BucketPlan.from_body(plan.to_body()) == plan


def test_edges_belong_to_their_bucket():
    grid = BucketGrid((Bucket(2000, 10), Bucket(2000, 20), Bucket(5000, 30)))
    assert [grid.assign(*pair) for pair in [(2000, 10), (1, 11), (2001, 1), (5000, 30), (5001, 1), (9, 21)]] == [
        0, 1, 2, 2, -1, -1,
    ]  # fmt: skip


def test_equal_mass_edges_cut_where_shares_of_the_total_are_reached():
    values = np.arange(1, 101)
    edges = equal_mass_edges(values, np.ones(100, int), 4)
    mass = [values[(values > low) & (values <= high)].sum() for low, high in zip([0, *edges[:-1]], edges, strict=True)]
    assert edges[-1] == 100 and max(mass) / min(mass) < 1.1
    # One value that holds more than a share merges edges.
    assert equal_mass_edges(np.array([5, 9]), np.array([1000, 1]), 4).tolist() == [5, 9]


def test_fast_talkers_are_rejected_on_the_upper_side_only():
    pairs = [(10_000, 50 + i % 7) for i in range(500)] + [(10_000, 2), (10_000, 400)]
    plan = make_plan(histogram(pairs), BucketSettings(num_duration_buckets=1, num_token_buckets=1), "id")
    assert plan.rejected == {"tps_outlier": 1}
    assert plan.grid.buckets[0].max_tokens == 56


def test_too_long_short_and_wordy_have_names():
    pairs = [(1000, 10), (60_000, 10), (20, 3), (1000, 2000)]
    plan = make_plan(histogram(pairs), BucketSettings(num_duration_buckets=1), "id")
    _, reasons = plan.place(*np.array(pairs).T)
    assert reasons.tolist() == ["", "too_long", "too_short", "too_many_tokens"]


def test_2d_buckets_pad_less_than_random_batches():
    rng = np.random.default_rng(0)
    durations = rng.lognormal(8.5, 0.7, 20_000).clip(500, 39_000).astype(int)
    tokens = (durations / 1000 * rng.normal(4, 1, 20_000).clip(1)).astype(int) + 9
    made = LengthHistogram.from_lengths(durations, tokens)
    plan = make_plan(made, BucketSettings(), "id")
    random, one, two = padding_by_scheme(made, plan, seed=1)
    assert random.audio_padding > 0.4 > 0.1 > two.audio_padding
    assert random.token_padding > one.token_padding > two.token_padding
    assert padding_by_scheme(made, plan, seed=1) == [random, one, two]
