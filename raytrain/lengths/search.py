"""Which batch size to try next, from what fit, what failed and how much memory each step took. It only decides; callers
run the steps.

`BatchSizeSearch` is NeMo's rule for one bucket: start somewhere, double while it fits (halve while it does not), then
bisect until the gap is within the tolerance. `inform` narrows it by knowledge from elsewhere.

    >>> search = BatchSizeSearch(start=8, max_size=1000)
    >>> while (size := search.next()) is not None:
    ...     search.report(size, fits=size <= 37)
    >>> search.result
    37

`BucketSearches` (in `bucket_searches`) runs such a search for every bucket, and `SharedBrackets` is what they learn
from each other.
"""

from __future__ import annotations

import math
import statistics

from raytrain.errors import PlanError


class BatchSizeSearch:
    """Largest size in 1 … `max_size` that fits, to within `tolerance` of the smallest that fails.

    `growth` is the factor of the first step away from `start`, up while it fits and down while it fails; it is squared
    from step to step, up to 2. By default it follows from `tolerance`, for a start that is a prediction: if that is
    right, the second size ends the search. 2 is NeMo's rule, for a start that is a guess.
    """

    def __init__(
        self, start: int = 32, max_size: int = 4096, tolerance: float = 0.05, growth: float | None = None
    ) -> None:
        if max_size < 1 or start < 1:
            raise PlanError(
                "batch sizes start at 1",
                got=f"start {start}, max_size {max_size}",
                remedy="pass start and max_size from 1 on",
            )
        if not 0 <= tolerance < 1:
            raise PlanError(
                "the tolerance must be a fraction",
                got=f"tolerance {tolerance}",
                allowed="0 ≤ tolerance < 1",
                remedy="set oomptimize.tolerance within these bounds",
            )
        if growth is None:
            growth = min(2.0, 1 / (1 - max(tolerance, 0.01)))
        if growth <= 1:
            raise PlanError(
                "the search needs a growth factor above 1",
                got=f"growth {growth}",
                allowed="more than 1",
                remedy="pass a growth above 1, or None for the tolerance's",
            )
        self._growth = growth
        self._aim, self._max_size, self._tolerance = min(start, max_size), max_size, tolerance
        self._fit, self._failure = 0, max_size + 1
        self._implied_fit, self._implied_failure = 0, max_size + 1
        self._ceiling: int | None = None
        self._measured = False

    @property
    def largest_fit(self) -> int:
        """The largest size known to fit, 0 if there is none. An implied fit is ignored if a probe at or below it
        failed."""
        return max(self._fit, self._implied_fit if self._implied_fit < self._failure else 0)

    @property
    def smallest_failure(self) -> int:
        """The smallest size known to fail, max_size + 1 if there is none; always above the largest known fit."""
        return max(min(self._failure, self._implied_failure), self.largest_fit + 1)

    def inform(
        self,
        largest_fit: int = 0,
        smallest_failure: int | None = None,
        aim: int | None = None,
        ceiling: int | None = None,
        measured: bool = False,
    ) -> None:
        """Narrow the bracket by what other buckets' probes imply, and set the size to try next (`aim`) and the largest
        that can fit by the measured peaks (`ceiling`); see `SharedBrackets`. Where peaks are `measured`, a size that is
        implied to fit is still probed, since its peak may end the search."""
        self._implied_fit = max(self._implied_fit, min(largest_fit, self._max_size))
        if smallest_failure is not None:
            self._implied_failure = min(self._implied_failure, smallest_failure)
        if aim is not None:
            self._aim = min(aim, self._max_size)
        self._ceiling = None if ceiling is None else min(ceiling, self._max_size)
        self._measured = measured

    def next(self) -> int | None:
        """The size to try, or None when the search has ended."""
        low, high = self.largest_fit, self.smallest_failure
        top = high if self._ceiling is None else min(high, self._ceiling + 1)
        if self._is_close(low, high, top):
            return None
        if self._measured and self._aim <= low and self._fit < low:
            return low
        if low < self._aim < high:
            return self._aim
        if self._aim <= low:
            size = max(low + 1, int(low * self._growth))
            if size < top or top > self._max_size:
                return min(size, self._max_size)
        else:
            size = min(high - 1, math.ceil(high / self._growth))
            if size > low:
                return size
        return (low + top) // 2

    def _is_close(self, low: int, high: int, top: int) -> bool:
        """Whether nothing above `low` is worth a probe: `high` fails, and nothing from `top` up can fit."""
        if top - low <= 1:
            return True
        if low and high <= self._max_size and (high - low) / high <= self._tolerance:
            return True
        return self._ceiling is not None and self._ceiling - low <= self._tolerance * self._ceiling

    def report(self, size: int, fits: bool) -> None:
        """Report the outcome of a size. Raises `PlanError` if it contradicts an earlier probe of this bucket."""
        if fits and size >= self._failure or not fits and size <= self._fit:
            raise PlanError(
                f"batch size {size} {'fits' if fits else 'fails'}, which contradicts an earlier probe",
                got=f"largest fit {self._fit}, smallest failure {self._failure}",
                why="memory use is not repeatable",
                remedy="make sure that nothing else uses the device",
            )
        if self._fit or self._failure <= self._max_size:
            self._growth = min(max(2.0, self._growth), self._growth**2)
        if fits:
            self._fit = max(self._fit, size)
        else:
            self._failure = min(self._failure, size)

    @property
    def done(self) -> bool:
        """Whether the search has ended."""
        return self.next() is None

    @property
    def result(self) -> int | None:
        """The largest size known to fit; None if none is (yet)."""
        return self.largest_fit or None


FIRST_SHARE = 0.9  # of the budget for the very first probe: predictions have been within a tenth of the measurements
_GAP_SHARE = 0.02  # the allocator's gaps: what it reserves is this much above what a step's tensors take
_ALIKE = 0.1  # the scale, in ln(bytes per utterance), over which buckets cease to be alike in how they deviate


class SharedBrackets:
    """What all buckets' searches have learned from each other's probes, and from the peaks that they measured.

    What fits can only shrink as either edge of a bucket grows. And where the device takes more or less than predicted,
    it does so in nearly the same way in all buckets: `start` corrects a bucket's prediction by what other buckets
    measured, most by those whose utterances take about as much.

    A probe's peak lies on a line of bytes over batch size, whose slope is either the prediction's scaled as a whole, or
    scaled without its base (weights, gradients, moments), depending on the cause of the deviation. The flatter line
    gives the largest size that can fit (`ceiling`), since peaks are convex in the batch size; the steeper gives the
    size to try next, less a margin, since a device runs out of memory when what its allocator reserves, not what the
    step takes, reaches the budget. If probes fail below the budget by their peaks' lines, that becomes the budget, but
    never less than the peak of a probe that fit.

    `edges` are (max_duration_ms, max_tokens) of the buckets by number, `needs` their predicted bytes as (base, per
    utterance), `budget` the nominal bytes available. Without peaks, what fits and fails in one bucket corrects the
    next.

        >>> shared = SharedBrackets([(1000, 10), (2000, 10), (2000, 20)])
        >>> shared.report(1, 40, fits=True); shared.report(1, 50, fits=False)
        >>> shared.bracket(0), shared.bracket(2)
        ((40, None), (0, 50))

    Two buckets on a device that takes 8 % less than predicted:

        >>> shared = SharedBrackets([(1000, 10), (2000, 10)], [(100.0, 1.0), (100.0, 2.0)], budget=1000.0)
        >>> shared.start(1)
        400
        >>> shared.report(1, 400, fits=True, peak_bytes=828)
        >>> shared.start(1), shared.ceiling(1), shared.start(0)
        (482, 494, 965)
    """

    def __init__(
        self,
        edges: list[tuple[int, int]],
        needs: list[tuple[float, float]] | None = None,
        budget: float = 0.0,
        tolerance: float = 0.05,
    ) -> None:
        self._edges, self._budget = list(edges), budget
        self._needs = [(base, max(slope, 1.0)) for base, slope in needs or ()]
        self._fits = [0] * len(edges)
        self._fails: list[int | None] = [None] * len(edges)
        self._peaks: dict[int, tuple[int, float]] = {}  # bucket: its largest measured fit, and its peak
        self._margin = min(_GAP_SHARE, tolerance / 2)

    def report(self, bucket: int, size: int, fits: bool, peak_bytes: float | None = None) -> None:
        """One probe of a bucket; `peak_bytes` if the device reports it."""
        if not fits:
            smallest = self._fails[bucket]
            self._fails[bucket] = size if smallest is None else min(smallest, size)
            return
        self._fits[bucket] = max(self._fits[bucket], size)
        if peak_bytes and size >= self._peaks.get(bucket, (0, 0.0))[0]:
            self._peaks[bucket] = size, float(peak_bytes)

    def bracket(self, bucket: int) -> tuple[int, int | None]:
        """(largest size that fits, smallest that fails) according to all probes; 0 and None if unknown."""
        duration, tokens = self._edges[bucket]
        fits = [
            size
            for (long, many), size in zip(self._edges, self._fits, strict=True)
            if long >= duration and many >= tokens
        ]
        fails = [
            size
            for (long, many), size in zip(self._edges, self._fails, strict=True)
            if size is not None and long <= duration and many <= tokens
        ]
        return max(fits, default=0), min(fails, default=None)

    def start(self, bucket: int) -> int | None:
        """The size to try next in a bucket, at least 1: one that should just fit. None without predictions."""
        if not self._needs:
            return None
        base, slope = self._needs[bucket]
        if bucket in self._peaks:
            size, peak = self._peaks[bucket]
            room = self._limit() * (1 - self._margin) - peak
            return max(1, min(2 * size, size + int(room / self._slopes(bucket)[1])))
        if self._peaks:
            budget = self._limit() * (1 - self._margin) / self._ratio(bucket)
            return max(1, int((budget - base) / slope))
        return max(1, int((self._effective_budget() - base) / slope))

    def ceiling(self, bucket: int) -> int | None:
        """The largest size that can fit by the bucket's measured peak, at least the measured size; None without a
        measured peak."""
        if not self._needs or bucket not in self._peaks:
            return None
        size, peak = self._peaks[bucket]
        return size + max(0, int((self._limit() - peak) / self._slopes(bucket)[0]))

    def hints(self, bucket: int) -> tuple[int, int | None, int | None, int | None, bool]:
        """All of the above, as `BatchSizeSearch.inform` takes it."""
        return *self.bracket(bucket), self.start(bucket), self.ceiling(bucket), bool(self._peaks)

    def _slopes(self, bucket: int) -> tuple[float, float]:
        """Bytes per further utterance, at least and at most, by the bucket's measured peak."""
        base, slope = self._needs[bucket]
        size, peak = self._peaks[bucket]
        scaled = slope * peak / (base + size * slope)
        without_base = (peak - base) / size
        if without_base < scaled / 2:  # a peak barely above the base says nothing about an utterance
            return scaled, scaled
        return min(scaled, without_base), max(scaled, without_base)

    def _limit(self) -> float:
        """Measured bytes at which the device runs out: the budget, or less if probes failed below it."""
        fails = [
            peak + (smallest - size) * self._slopes(bucket)[1]
            for bucket, (size, peak) in self._peaks.items()
            if (smallest := self._fails[bucket]) is not None
        ]
        fits = max(peak for _, peak in self._peaks.values())
        return min(self._budget, max(fits, min(fails, default=self._budget)))

    def _ratio(self, bucket: int) -> float:
        """Measured over predicted bytes, the mean over measured buckets, weighted by similarity."""
        weight = mean = 0.0
        for measured, (size, peak) in self._peaks.items():
            base, slope = self._needs[measured]
            distance = abs(math.log(slope / self._needs[bucket][1]))
            share = math.exp(-distance / _ALIKE)
            weight += share
            mean += share * peak / (base + size * slope)
        return mean / weight

    def _effective_budget(self) -> float:
        """The budget in predicted bytes, without peaks: between what fit and what failed, over all buckets that know
        both."""
        if not any(self._fits) and not any(self._fails):
            return FIRST_SHARE * self._budget
        bounds = [
            (base + fits * slope, base + fails * slope)
            for (base, slope), fits, fails in zip(self._needs, self._fits, self._fails, strict=True)
            if fits and fails is not None
        ]
        if not bounds:
            return self._budget
        low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
        if low < high:
            return (low + high) / 2
        return statistics.median((low + high) / 2 for low, high in bounds)
