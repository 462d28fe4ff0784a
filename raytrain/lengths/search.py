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

from raytrain.errors import PlanError


class BatchSizeSearch:
    """Largest size in 1 … `max_size` that fits, to within `tolerance` of the smallest that fails.

    `growth` is the factor upwards while nothing failed yet: 2 where `start` is a guess, little more than 1 where
    it is a prediction.
    """

    def __init__(self, start: int = 32, max_size: int = 4096, tolerance: float = 0.05, growth: float = 2.0) -> None:
        if max_size < 1 or start < 1:
            raise PlanError("batch sizes start at 1", got=f"start {start}, max_size {max_size}")
        if growth <= 1:
            raise PlanError("the search must grow", got=f"growth {growth}", allowed="more than 1")
        self._growth = growth
        self._start, self._max_size, self._tolerance = min(start, max_size), max_size, tolerance
        self.largest_fit = 0
        self.smallest_failure = max_size + 1

    def next(self) -> int | None:
        """The size to try, or None when the search has ended."""
        low, high = self.largest_fit, self.smallest_failure
        if high - low <= 1:
            return None
        untried_above, untried_below = high == self._max_size + 1, low == 0
        if untried_above and untried_below:
            return self._start
        if untried_above:
            return min(max(low + 1, int(low * self._growth)), self._max_size)
        if untried_below:
            return high // 2
        if (high - low) / high <= self._tolerance:
            return None
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
        if fits:
            self.largest_fit = max(self.largest_fit, size)
        else:
            self.smallest_failure = min(self.smallest_failure, size)

    @property
    def done(self) -> bool:
        """Whether there is nothing left to try."""
        return self.next() is None

    @property
    def result(self) -> int | None:
        """The largest size known to fit; None if none is (yet)."""
        return self.largest_fit or None
