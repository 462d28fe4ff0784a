"""`BatchSizeSearch`: which size to try next, fed with `fits` or not. It decides; others act.

NeMo's rule: start somewhere, double while it fits (halve while it does not), then bisect until the gap is
within the tolerance.

    >>> search = BatchSizeSearch(start=8, max_size=1000)
    >>> while (size := search.next()) is not None:
    ...     search.report(size, fits=size <= 37)
    >>> search.result
    37
"""

from __future__ import annotations

import math
import statistics

from raytrain.errors import PlanError


class BatchSizeSearch:
    """Largest size in 1 … `max_size` that fits, to within `tolerance` of the smallest that fails.

    `growth` is the factor of the first step away from `start`, up while it fits and down while it fails; it is squared
    from step to step, up to 2. By default it is the `tolerance`'s, for a start that is a prediction: where that is
    right, the second size ends the search. 2 is NeMo's rule, for a start that is a guess.
    """

    def __init__(
        self, start: int = 32, max_size: int = 4096, tolerance: float = 0.05, growth: float | None = None
    ) -> None:
        if max_size < 1 or start < 1:
            raise PlanError("batch sizes start at 1", got=f"start {start}, max_size {max_size}")
        if not 0 <= tolerance < 1:
            raise PlanError("the tolerance is a share", got=f"tolerance {tolerance}", allowed="0 ≤ tolerance < 1")
        if growth is None:
            growth = min(2.0, 1 / (1 - max(tolerance, 0.01)))
        if growth <= 1:
            raise PlanError("the search must grow", got=f"growth {growth}", allowed="more than 1")
        self._growth = growth
        self._start, self._max_size, self._tolerance = min(start, max_size), max_size, tolerance
        self.largest_fit = 0
        self.smallest_failure = max_size + 1

    def inform(self, largest_fit: int, smallest_failure: int | None) -> None:
        """Narrow the bracket by what other buckets' probes imply; see `SharedBrackets`. Own probes win."""
        self.largest_fit = max(self.largest_fit, min(largest_fit, self._max_size, self.smallest_failure - 1))
        if smallest_failure is not None:
            self.smallest_failure = max(min(self.smallest_failure, smallest_failure), self.largest_fit + 1)

    def next(self) -> int | None:
        """The size to try, or None when the search has ended."""
        low, high = self.largest_fit, self.smallest_failure
        untried_above, untried_below = high == self._max_size + 1, low == 0
        if high - low <= 1:
            return None
        if not (untried_above or untried_below) and (high - low) / high <= self._tolerance:
            return None
        if low < self._start < high:
            return self._start
        if self._start <= low:
            size = max(low + 1, int(low * self._growth))
            if size < high or untried_above:
                return min(size, self._max_size)
        else:
            size = min(high - 1, math.ceil(high / self._growth))
            if size > low:
                return size
        return (low + high) // 2

    def report(self, size: int, fits: bool) -> None:
        """Tell the outcome of a size. Raises `PlanError` where it contradicts an earlier one."""
        if fits and size >= self.smallest_failure or not fits and size <= self.largest_fit:
            raise PlanError(
                f"batch size {size} {'fits' if fits else 'fails'}, which contradicts an earlier probe",
                got=f"largest fit {self.largest_fit}, smallest failure {self.smallest_failure}",
                why="memory use is not repeatable",
                remedy="see that nothing else uses the device",
            )
        if size != self._start:
            self._growth = min(max(2.0, self._growth), self._growth**2)
        if fits:
            self.largest_fit = size
        else:
            self.smallest_failure = size

    @property
    def done(self) -> bool:
        """Whether there is nothing left to try."""
        return self.next() is None

    @property
    def result(self) -> int | None:
        """The largest size known to fit; None if none is (yet)."""
        return self.largest_fit or None


class SharedBrackets:
    """What all buckets' searches have learnt from each other's probes.

    What fits can only shrink as either edge of a bucket grows. And where the device takes more or less than a
    prediction says, it does so in all buckets alike: `start` corrects a bucket's prediction by what others found.

    `edges` are (max_duration_ms, max_tokens) of the buckets by number, `needs` their predicted bytes as (base, per
    utterance), `budget` the bytes there should be.

        >>> shared = SharedBrackets([(1000, 10), (2000, 10), (2000, 20)])
        >>> shared.report(1, 40, fits=True); shared.report(1, 50, fits=False)
        >>> shared.bracket(0), shared.bracket(2)
        ((40, None), (0, 50))
    """

    def __init__(
        self, edges: list[tuple[int, int]], needs: list[tuple[float, float]] | None = None, budget: float = 0.0
    ) -> None:
        self._edges, self._needs, self._budget = list(edges), needs, budget
        self._fits = [0] * len(edges)
        self._fails: list[int | None] = [None] * len(edges)

    def report(self, bucket: int, size: int, fits: bool) -> None:
        """One probe of a bucket."""
        if fits:
            self._fits[bucket] = max(self._fits[bucket], size)
        else:
            known = self._fails[bucket]
            self._fails[bucket] = size if known is None else min(known, size)

    def bracket(self, bucket: int) -> tuple[int, int | None]:
        """(largest size that fits, smallest that fails) as far as all probes tell; 0 and None where nothing does."""
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
        """The size that should just fit a bucket, at least 1; None without predictions."""
        if self._needs is None:
            return None
        base, slope = self._needs[bucket]
        return max(1, int((self._effective_budget() - base) / max(slope, 1.0)))

    def _effective_budget(self) -> float:
        """The budget in predicted bytes: between what fitted and what failed, in as many buckets as know both."""
        known = [
            (base + fits * slope, base + fails * slope)
            for (base, slope), fits, fails in zip(self._needs, self._fits, self._fails, strict=True)
            if fits and fails is not None
        ]
        if not known:
            return self._budget
        low, high = max(low for low, _ in known), min(high for _, high in known)
        if low < high:
            return (low + high) / 2
        return statistics.median((low + high) / 2 for low, high in known)
