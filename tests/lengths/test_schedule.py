"""Permutation, schedule, search and profile: laws that hold for all numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.errors import PlanError, ProfileError
from raytrain.lengths import BatchProfile, BatchSchedule, ProbeSetting, ScheduleState
from raytrain.lengths.permutation import FeistelPermutation

rows = st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any)


@given(st.integers(1, 3000), st.integers(0, 2**63))
@settings(max_examples=40)
def test_permutation_is_a_bijection(size, key):
    shuffle = FeistelPermutation(size, key)
    assert sorted(shuffle.many(np.arange(size)).tolist()) == list(range(size))


def test_permutation_depends_on_its_key_and_works_for_a_billion_rows():
    positions = np.arange(1000)
    assert (FeistelPermutation(1000, 1).many(positions) != FeistelPermutation(1000, 2).many(positions)).mean() > 0.9
    assert 0 <= FeistelPermutation(10**9, 5)(10**9 - 1) < 10**9
    with pytest.raises(IndexError):
        FeistelPermutation(10, 1)(10)


@pytest.mark.parametrize("n", [2, 7, 50, 1000])
def test_keys_give_every_order_equally_often(n):
    tries, positions = 4000, np.array([0, min(1, n - 1), n - 1])
    shuffled = np.array([FeistelPermutation(n, key).many(positions) for key in range(tries)])
    for column in shuffled.T:
        counts = np.bincount(column, minlength=n)
        chi = ((counts - tries / n) ** 2 / (tries / n)).sum()
        assert chi < n - 1 + 5 * np.sqrt(2 * (n - 1)) + 10
    first, second, _ = shuffled.T
    assert abs((first < second).mean() - 0.5) < 0.04  # the order of neighbors is a coin toss
    # Adjacent keys, as of two epochs, are independent.
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.08


@given(rows, st.integers(1, 9), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=60)
def test_every_row_once_an_epoch_apart_from_a_small_remainder(counts, size, workers, seed):
    schedule = BatchSchedule(seed, tuple(counts), (size,) * len(counts))
    state, seen = schedule.initial(), [[] for _ in counts]
    while True:
        plan, after = schedule.step(state, workers)
        if plan.epoch > 0:
            break
        assert len(plan.sizes) == workers and min(plan.sizes) >= 1 and max(plan.sizes) <= size
        for rank in range(workers):
            drawn = schedule.rows(plan, rank).tolist()
            assert len(drawn) == plan.sizes[rank]
            seen[plan.bucket] += drawn
        state = after
    for drawn, count in zip(seen, counts, strict=True):
        assert len(set(drawn)) == len(drawn) <= count
    left = [count - len(drawn) for drawn, count in zip(seen, counts, strict=True)]
    assert all(number < workers for number in left)
    assert schedule.remainder(state) == sum(left)


@given(rows, st.integers(0, 40), st.integers(0, 100))
@settings(max_examples=40)
def test_resume_at_any_step_equals_an_uninterrupted_run(counts, steps, seed):
    schedule = BatchSchedule(seed, tuple(counts), tuple(range(2, 2 + len(counts))))
    state, plans = schedule.initial(), []
    states = [state]
    for _ in range(steps + 5):
        plan, state = schedule.step(state, 2)
        plans.append(plan)
        states.append(state)
    resumed = ScheduleState.from_dict(states[steps].to_dict())
    fresh = BatchSchedule(seed, tuple(counts), tuple(range(2, 2 + len(counts))))
    for wanted in plans[steps:]:
        plan, resumed = fresh.step(resumed, 2)
        assert plan == wanted
        assert [fresh.rows(plan, rank).tolist() for rank in (0, 1)] == [
            schedule.rows(wanted, rank).tolist() for rank in (0, 1)
        ]


@given(rows, st.lists(st.integers(1, 4), min_size=30, max_size=30))
@settings(max_examples=40)
def test_the_number_of_workers_may_change_within_an_epoch(counts, workers):
    schedule = BatchSchedule(7, tuple(counts), (3,) * len(counts))
    state, seen = schedule.initial(), set()
    for number in workers:
        plan, state = schedule.step(state, number)
        for rank in range(number):
            for row in schedule.rows(plan, rank).tolist():
                position = plan.start + len([1 for key in seen if key[0] == plan.bucket and key[3] == plan.start])
                key = (plan.bucket, position // counts[plan.bucket], row, plan.start)
                assert (key[0], key[1], row) not in {(k[0], k[1], k[2]) for k in seen}
                seen.add(key)


def test_buckets_run_out_together():
    counts = (60_000, 30_000, 10_000)
    schedule = BatchSchedule(3, counts, (10, 10, 10))
    state = schedule.initial()
    for _ in range(5000):
        _, state = schedule.step(state, 1)
    shares = [position / count for position, count in zip(state.positions, counts, strict=True)]
    assert max(shares) - min(shares) < 0.06


def test_schedule_rejects_mismatched_inputs():
    with pytest.raises(PlanError, match="no rows"):
        BatchSchedule(1, (0, 0), (1, 1))
    with pytest.raises(PlanError, match="differ in buckets"):
        BatchSchedule(1, (5,), (1, 1))


def test_a_profile_for_another_plan_or_model_is_refused_by_name():
    setting = ProbeSetting("m1", "adamw", "fp32", False, "traced", 16.0, 0.9, 2, "2.13.0")
    profile = BatchProfile("p1", setting, (4, 2), (1.0, 2.0), (0, 0))
    assert BatchProfile.from_body(profile.to_body()) == profile
    profile.check_matches(plan_id="p1", model_id="m1")
    with pytest.raises(ProfileError, match="bucket plan p1 instead of p2, model m1 instead of m2"):
        profile.check_matches(plan_id="p2", model_id="m2")
    with pytest.raises(ProfileError, match="at least 1"):
        BatchProfile("p1", setting, (0,), (1.0,), (0,))
