"""The search for batch sizes: one bucket by yes and no, and all buckets by the peaks that probes measure."""

import bisect
import random
from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.errors import PlanError
from raytrain.lengths import BatchSizeSearch, BucketSearches
from raytrain.lengths.search import SharedBrackets
from raytrain.training.memory.meter import Probe, search_batch_size, search_buckets

EDGES = [(duration, tokens) for duration in (1000, 4000, 16000) for tokens in (10, 40)]
NUM_BUCKETS = len(EDGES)
BASE, MAX_SIZE = 1000.0, 2000


@dataclass(frozen=True)
class Device:
    """Its steps take `base_factor` times BASE bytes, and `slope_factor` times the predicted bytes per utterance. A step
    fits where that, times `reserved`, is at most the capacity."""

    capacity: float
    base_factor: float = 1.0
    slope_factor: float = 1.0
    reserved: float = 1.0
    tells_peaks: bool = True

    @staticmethod
    def slope(bucket: int) -> float:
        """Predicted bytes per utterance."""
        duration, tokens = EDGES[bucket]
        return (duration / 1000 + tokens / 10) ** 2

    def fits(self, bucket: int, size: int) -> bool:
        return self._need(bucket, size) * self.reserved <= self.capacity

    def _need(self, bucket: int, size: int) -> float:
        return self.base_factor * BASE + size * self.slope_factor * self.slope(bucket)

    def largest(self, bucket: int) -> int:
        """The largest batch that fits, 0 if none does."""
        return bisect.bisect_left(range(1, MAX_SIZE + 1), True, key=lambda size: not self.fits(bucket, size))

    def measure(self, bucket: int, size: int) -> Probe:
        if not self.fits(bucket, size):
            return Probe(size, False, why="out of memory")
        return Probe(size, True, int(self._need(bucket, size)) if self.tells_peaks else None)

    def searches(self, tolerance: float = 0.05) -> BucketSearches:
        needs = [(BASE, self.slope(bucket)) for bucket in range(NUM_BUCKETS)]
        return BucketSearches(EDGES, needs, self.capacity, MAX_SIZE, tolerance)


def is_within(size: int | None, largest: int, tolerance: float) -> bool:
    return min(largest * (1 - tolerance) - 1e-9, largest - 1) <= (size or 0) <= largest


def devices(lowest: float, highest: float, **options: st.SearchStrategy) -> st.SearchStrategy[Device]:
    """Devices whose bases and slopes are `lowest` to `highest` times what is predicted."""
    factor = st.floats(lowest, highest)
    return st.builds(
        Device, capacity=st.floats(5e3, 1e6), base_factor=st.floats(lowest, 1.0), slope_factor=factor, **options
    )


# --- one bucket, by yes and no


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 3000),
    st.integers(1, 3000),
    st.integers(1, 2000),
    st.sampled_from([0.0, 0.02, 0.05, 0.2]),
    st.sampled_from([None, 1.1, 2.0]),
)
def test_a_search_ends_within_the_tolerance_and_never_above(largest, start, max_size, tolerance, growth):
    search = BatchSizeSearch(start, max_size, tolerance, growth)
    tried = []
    while (size := search.next()) is not None:
        assert 1 <= size <= max_size and size == search.next() and size not in tried
        tried.append(size)
        search.report(size, size <= largest)
    assert search.done and len(tried) <= 40
    best = min(largest, max_size)
    assert (search.result or 0) <= best
    if tolerance == 0 or best == 0:
        assert (search.result or 0) == best
    elif search.result < best:
        assert (search.smallest_failure - search.result) / search.smallest_failure <= tolerance


@pytest.mark.parametrize("largest", [7, 20, 39, 40, 41, 200, 700])
def test_a_right_start_takes_two_probes_without_peaks(largest):
    search, probes = BatchSizeSearch(start=largest), 0
    while (size := search.next()) is not None:
        search.report(size, size <= largest)
        probes += 1
    assert search.result == largest and probes == 2


def test_a_contradiction_is_an_error():
    search = BatchSizeSearch(10, 100)
    search.report(10, True)
    with pytest.raises(PlanError, match="contradicts an earlier probe"):
        search.report(9, False)


def test_a_probe_overrides_what_was_implied():
    search = BatchSizeSearch(10, 100)
    search.inform(largest_fit=12)  # a larger bucket takes more
    assert search.largest_fit == 12
    search.report(10, False)
    assert search.largest_fit == 0 and search.next() < 10
    search.report(8, True)
    search.inform(smallest_failure=5)  # a smaller bucket takes less
    assert search.result == 8 and search.done


@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from([0.0, 0.05]))
def test_a_ceiling_ends_a_search_without_a_failure(size, ceiling, tolerance):
    search = BatchSizeSearch(size, 500, tolerance)
    search.report(size, True)
    search.inform(ceiling=ceiling)
    assert search.done == (ceiling - size <= tolerance * ceiling)
    if not search.done:
        assert size < search.next() <= ceiling


# --- what buckets learn from each other


@settings(max_examples=100, deadline=None)
@given(devices(0.9, 1.1), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.05]))
def test_shared_brackets_save_probes_and_change_no_answer(device, rng, tolerance):
    shared = SharedBrackets(EDGES)
    alone = together = 0
    for bucket in rng.sample(range(NUM_BUCKETS), NUM_BUCKETS):
        measure, largest = partial(device.measure, bucket), device.largest(bucket)
        start = max(1, int(largest * rng.uniform(0.8, 1.2)))
        search = BatchSizeSearch(start, MAX_SIZE, tolerance)
        search.inform(*shared.bracket(bucket))
        while (size := search.next()) is not None:
            fits = measure(size).fits
            search.report(size, fits)
            shared.report(bucket, size, fits)
            search.inform(*shared.bracket(bucket))
            together += 1
        assert is_within(search.result, largest, tolerance)
        alone += len(search_batch_size(measure, BatchSizeSearch(start, MAX_SIZE, tolerance)).probes)
    assert together <= alone + 3  # a narrower bracket is sometimes entered at another point


@pytest.mark.parametrize("tells_peaks", [True, False])
@pytest.mark.parametrize("factor", [0.85, 1.1])
def test_deviations_of_the_device_from_the_prediction_are_learned(factor, tells_peaks):
    device = Device(40_000.0, slope_factor=factor)
    shared = SharedBrackets(EDGES, [(BASE, Device.slope(bucket)) for bucket in range(NUM_BUCKETS)], 40_000.0, 0.0)
    for bucket in (1, 4):
        largest = device.largest(bucket)
        shared.report(bucket, largest, True, device.measure(bucket, largest).peak_bytes if tells_peaks else None)
        shared.report(bucket, largest + 1, False)
    assert shared.start(3) == pytest.approx(device.largest(3), rel=0.02)
    assert SharedBrackets(EDGES).start(0) is None


@given(devices(0.7, 1.4), st.integers(0, NUM_BUCKETS - 1), st.integers(1, MAX_SIZE))
def test_a_peak_bounds_what_fits_from_both_sides(device, bucket, size):
    probe = device.measure(bucket, size)
    needs = [(BASE, Device.slope(bucket)) for bucket in range(NUM_BUCKETS)]
    shared = SharedBrackets(EDGES, needs, device.capacity, tolerance=0.0)
    shared.report(bucket, size, probe.fits, probe.peak_bytes)
    if not probe.fits:
        assert shared.ceiling(bucket) is None
        return
    if device.base_factor == 1.0:  # the slope's deviation is one of the two that are assumed
        assert shared.ceiling(bucket) >= device.largest(bucket)
        # A peak is in whole bytes, and what it is rounded by counts as often as the size is in the largest.
        assert shared.start(bucket) <= max(1, device.largest(bucket) + 1 + device.largest(bucket) // size)
    assert size <= shared.ceiling(bucket)


# --- all buckets


@settings(max_examples=200, deadline=None)
@given(
    devices(0.9, 1.1, reserved=st.sampled_from([1.0, 1.03]), tells_peaks=st.booleans()),
    st.sampled_from([0.0, 0.02, 0.05, 0.2]),
)
def test_answers_fit_and_are_near_the_largest(device, tolerance):
    searches = device.searches(tolerance)
    answers = search_buckets(device.measure, searches)
    assert searches.done and searches.next() is None
    for bucket, answer in enumerate(answers):
        largest = device.largest(bucket)
        # If probes fail below the budget, conclusions from one bucket for another are not exact.
        assert is_within(answer.batch_size, largest, tolerance + (0.04 if device.reserved > 1 else 0.0))
        sizes = [probe.batch_size for probe in answer.probes]
        assert len(sizes) == len(set(sizes)) == searches.num_probes[bucket] <= 36  # at a tolerance of 0
        if answer.best is not None:
            assert answer.best.fits and answer.best.batch_size == answer.batch_size


@settings(max_examples=100, deadline=None)
@given(st.floats(0.9, 1.1), st.floats(2e4, 1e6))
def test_one_probe_ends_a_bucket_where_the_first_has_taught_the_deviation(factor, capacity):
    device = Device(capacity, base_factor=factor, slope_factor=factor)
    searches = device.searches()
    answers = search_buckets(device.measure, searches)
    assert all(probe.fits for answer in answers for probe in answer.probes[1:])
    # If a batch has only a few utterances, one of them is more than the margin.
    large = [bucket for bucket in range(NUM_BUCKETS - 1) if device.largest(bucket) >= 40]
    assert all(searches.num_probes[bucket] <= 1 for bucket in large)
    assert searches.num_probes[-1] <= 3


@settings(max_examples=100, deadline=None)
@given(devices(0.3, 3.0), st.integers(1, 8), st.integers(0, 1000))
def test_many_processes_find_the_same_in_any_order_of_reports(device, num_processes, seed):
    searches, in_flight, rng = device.searches(), {}, random.Random(seed)
    for _ in range(1000):
        while len(in_flight) < num_processes and (ask := searches.next()) is not None:
            assert ask[0] not in in_flight and not searches.done
            in_flight[ask[0]] = ask[1]
        if not in_flight:
            break
        bucket = rng.choice(sorted(in_flight))
        size = in_flight.pop(bucket)
        if rng.random() < 0.1:
            searches.release(bucket)  # its process died
            continue
        probe = device.measure(bucket, size)
        searches.report(bucket, size, probe.fits, probe.peak_bytes)
    assert searches.done
    assert all(is_within(searches.result(bucket), device.largest(bucket), 0.05) for bucket in range(NUM_BUCKETS))


@settings(max_examples=60, deadline=None)
@given(devices(0.8, 1.2), st.integers(0, 20))
def test_a_stopped_search_resumes_where_it_was(device, stop):
    def run(searches, limit=None):
        outcomes = []
        while len(outcomes) != limit and (ask := searches.next()) is not None:
            probe = device.measure(*ask)
            outcomes.append((*ask, probe.fits, probe.peak_bytes))
            searches.report(*outcomes[-1])
        return outcomes

    uninterrupted = device.searches()
    outcomes = run(uninterrupted)
    before = run(device.searches(), limit=stop)
    resumed = device.searches()
    for outcome in before:
        resumed.report(*outcome)
    assert before + run(resumed) == outcomes
    assert all(resumed.result(bucket) == uninterrupted.result(bucket) for bucket in range(NUM_BUCKETS))


def test_a_bucket_that_cannot_fit_even_one_is_known_first():
    device = Device(1200.0)
    searches = device.searches()
    bucket, size = searches.next()
    assert (bucket, size) == (5, 1)
    searches.report(bucket, size, False)
    assert searches.ended(5) and searches.result(5) is None and not searches.done


def test_a_final_answer_never_changes():
    device = Device(90_000.0)
    searches = device.searches()
    while not searches.ended(5):
        bucket, size = searches.next()
        searches.report(bucket, size, True, device.measure(bucket, size).peak_bytes)
    answer = searches.result(5)
    search_buckets(Device(80_000.0).measure, searches)
    assert searches.result(5) == answer


@pytest.mark.parametrize("peak", [1, 500, 10**12])
def test_meaningless_peaks_do_no_harm(peak):
    device, searches = Device(50_000.0), Device(50_000.0).searches()
    for _ in range(200):
        if (ask := searches.next()) is None:
            break
        searches.report(*ask, device.fits(*ask), peak)
    assert searches.done
    assert all(1 <= searches.result(bucket) <= device.largest(bucket) for bucket in range(NUM_BUCKETS))
