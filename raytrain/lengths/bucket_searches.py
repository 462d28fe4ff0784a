"""`BucketSearches`: the searches of all buckets as one decision, for one probing process or many.

A coordinator asks it for work and reports the outcomes; it holds no device, process or clock.

    >>> edges, needs = [(1000, 10), (2000, 10), (2000, 20)], [(100.0, 1.0), (100.0, 1.9), (100.0, 2.0)]
    >>> searches = BucketSearches(edges, needs, budget=1000.0)
    >>> while (probe := searches.next()) is not None:
    ...     bucket, size = probe
    ...     peak = 92 + size * 0.92 * needs[bucket][1]  # a device that takes 8 % less than predicted
    ...     searches.report(bucket, size, fits=peak <= 1000, peak_bytes=peak)
    >>> [searches.result(bucket) for bucket in range(3)], searches.num_probes, searches.done
    ([965, 508, 482], (1, 1, 2), True)
"""

from __future__ import annotations

from raytrain.errors import PlanError
from raytrain.lengths.search import BatchSizeSearch, SharedBrackets


class BucketSearches:
    """The largest size of every bucket that fits, by as few probes as the measured peaks allow.

    `edges` are (max_duration_ms, max_tokens) of the buckets by number, `needs` their predicted bytes as (base, per
    utterance), `budget` the bytes that a step may take, and `max_size` the largest batch. An answer has been probed to
    fit, in its bucket or in one of longer edges; where peaks are measured, it is within `tolerance` of the largest that
    their line allows, else of the smallest that failed.

    Heavy buckets come first: a bucket that can't hold even one utterance shows at once, and a size that fits there fits
    in all shorter buckets. A bucket that is being probed is not handed out a second time; `release` takes back a probe
    whose process died before reporting it. To resume after a stop, `report` the earlier outcomes to a new object in
    their order. A bucket's answer is final once its search has ended, and later probes leave it as it is, so that its
    times can be measured while other buckets are searched.
    """

    def __init__(
        self,
        edges: list[tuple[int, int]],
        needs: list[tuple[float, float]],
        budget: float,
        max_size: int = 4096,
        tolerance: float = 0.05,
    ) -> None:
        if len(edges) != len(needs):
            raise PlanError(
                "buckets and predictions differ in number",
                got=f"{len(edges)} and {len(needs)}",
                remedy="pass one prediction of needs for each of edges",
            )
        self._shared = SharedBrackets(edges, needs, budget, tolerance)
        self._searches = [BatchSizeSearch(1, max_size, tolerance) for _ in edges]
        self._order = sorted(range(len(edges)), key=lambda bucket: edges[bucket], reverse=True)
        self._in_flight: set[int] = set()
        self._answers: dict[int, int | None] = {}
        self._num_probes = [0] * len(edges)

    def next(self) -> tuple[int, int] | None:
        """(bucket, size) to probe now; None if every remaining bucket is being probed, or none remains (`done`)."""
        for bucket in self._order:
            if bucket in self._in_flight or self.ended(bucket):
                continue
            size = self._searches[bucket].next()
            if size is not None:
                self._in_flight.add(bucket)
                return bucket, size
        return None

    def report(self, bucket: int, size: int, fits: bool, peak_bytes: float | None = None) -> None:
        """The outcome of a probe. Raises `PlanError` if it contradicts an earlier probe of the same bucket."""
        self.release(bucket)
        self._searches[bucket].report(size, fits)
        self._shared.report(bucket, size, fits, peak_bytes)
        self._num_probes[bucket] += 1
        self.ended(bucket)  # fixes the answer by the reports so far: the same reports give the same answers

    def release(self, bucket: int) -> None:
        """Hand out a bucket again whose probe will not be reported."""
        self._in_flight.discard(bucket)

    def ended(self, bucket: int) -> bool:
        """Whether the bucket needs no further probe; its `result` is final then."""
        if bucket in self._answers:
            return True
        if bucket in self._in_flight:
            return False
        search = self._searches[bucket]
        search.inform(*self._shared.hints(bucket))
        if search.done:
            self._answers[bucket] = search.result
        return search.done

    def result(self, bucket: int) -> int | None:
        """The largest size that is sure to fit, final once the bucket has `ended`; None if not even 1 fits (yet)."""
        return self._answers[bucket] if self.ended(bucket) else self._searches[bucket].result

    @property
    def num_buckets(self) -> int:
        """Number of buckets."""
        return len(self._searches)

    @property
    def num_probes(self) -> tuple[int, ...]:
        """Reported probes by bucket."""
        return tuple(self._num_probes)

    @property
    def done(self) -> bool:
        """Whether all buckets have ended."""
        return all(self.ended(bucket) for bucket in self._order)
