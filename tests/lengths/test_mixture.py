"""Corpora with weights: visits, shares, and the same rows for any caller in any order."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.errors import PlanError
from raytrain.lengths import BatchSchedule
from raytrain.lengths.mixture import Mixture, repeats_of, sampling_shares

buckets = st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3).map(tuple), min_size=1, max_size=4).map(tuple)
repeats = st.tuples(*[st.sampled_from([0.0, 0.3, 1.0, 1.7, 4.0])] * 3)


@settings(max_examples=200, deadline=None)
@given(buckets, repeats, st.integers(0, 2**40), st.integers(1, 4))
def test_visits_are_even_after_any_number_of_epochs(rows, repeats, seed, epochs):
    try:
        mixture = Mixture(rows, repeats)
    except PlanError:
        return
    for bucket, per_epoch in enumerate(mixture.draws_per_bucket):
        if not per_epoch:
            continue
        positions = np.arange(epochs * per_epoch)
        numbers = mixture.numbers(bucket, positions, seed)
        corpora = mixture.corpora(bucket, numbers)
        visits, starts = Counter(numbers.tolist()), np.cumsum([0, *rows[bucket]])
        for corpus in range(3):
            draws = mixture.draws[bucket][corpus]
            assert (corpora == corpus).sum() == epochs * draws
            counts = [visits[number] for number in range(starts[corpus], starts[corpus + 1])]
            assert not counts or max(counts) - min(counts) <= 1
        # A position's row does not depend on the other positions in the call.
        sample = np.random.default_rng(seed).permutation(positions)[:7]
        assert mixture.numbers(bucket, np.sort(sample), seed).tolist() == numbers[np.sort(sample)].tolist()


def test_equal_repeats_are_the_plain_schedule():
    plain, mixed = Mixture.plain((30, 7)), Mixture(((10, 20), (0, 7)), (1.0, 1.0))
    for bucket, count in enumerate((30, 7)):
        positions = np.arange(3 * count)
        assert plain.numbers(bucket, positions, 5).tolist() == mixed.numbers(bucket, positions, 5).tolist()


def test_shares_are_met_and_an_epoch_keeps_its_length():
    rows = ((900, 90), (600, 10))
    hours, wanted = [15.0, 1.0], [0.6, 0.4]
    mixture = Mixture(rows, repeats_of(hours, wanted))
    assert mixture.repeats == pytest.approx((0.64, 6.4))
    schedule = BatchSchedule(3, mixture, (16, 8), num_epochs=3)
    state, seen = schedule.initial(), Counter()
    while not schedule.is_last(state, world_size=4):
        plan, state = schedule.step(state, world_size=4)
        for rank in range(4):
            numbers = schedule.rows(plan, rank)
            seen.update((plan.bucket, corpus) for corpus in mixture.corpora(plan.bucket, numbers).tolist())
    # Three epochs, apart from a remainder of fewer rows than ranks in each bucket.
    for bucket in range(2):
        for corpus in range(2):
            assert seen[bucket, corpus] == pytest.approx(3 * mixture.draws[bucket][corpus], abs=4)


def test_shares_by_corpus_and_by_language():
    assert sampling_shares([75, 25], [1, 1]) == [0.75, 0.25]
    assert sampling_shares([75, 25], [1, 3]) == [0.5, 0.5]
    assert sampling_shares([90, 10, 0], [1, 1, 1], 2.0) == pytest.approx([0.75, 0.25, 0])
    # Two corpora of one language share the language's part.
    assert sampling_shares([60, 30, 10], [1, 1, 1], 2.0, ["en", "en", "de"]) == pytest.approx([0.5, 0.25, 0.25])


def test_invalid_mixtures_are_rejected():
    with pytest.raises(PlanError, match="no rows"):
        Mixture(((0, 0),), (1.0, 1.0))
    with pytest.raises(PlanError, match="weight above 0"):
        Mixture(((0, 5),), (1.0, 0.0))
    with pytest.raises(PlanError, match="every corpus in every bucket"):
        Mixture(((1, 2), (3,)), (1.0, 1.0))
    with pytest.raises(PlanError, match="0 or more"):
        Mixture(((1,),), (-1.0,))


@settings(max_examples=100, deadline=None)
@given(buckets, repeats, st.integers(1, 5), st.integers(1, 3), st.integers(1, 6))
def test_a_finite_schedule_ends_with_every_draw_given_or_left(rows, repeats, workers, epochs, size):
    try:
        mixture = Mixture(rows, repeats)
    except PlanError:
        return
    schedule = BatchSchedule(1, mixture, (size,) * len(rows), num_epochs=epochs)
    state, given_rows = schedule.initial(), 0
    while not schedule.is_last(state, workers):
        plan, state = schedule.step(state, workers)
        given_rows += sum(plan.sizes)
        assert plan.epoch < epochs
    with pytest.raises(StopIteration):
        schedule.step(state, workers)
    left = epochs * sum(mixture.draws_per_bucket) - given_rows
    assert left == sum(
        epochs * draws - position for draws, position in zip(mixture.draws_per_bucket, state.positions, strict=True)
    )
    assert left < workers * len(rows)
