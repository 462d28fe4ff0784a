"""`BucketGrid`: the only code that compares lengths with bucket edges. Edges are inclusive.

>>> grid = BucketGrid((Bucket(2000, 10), Bucket(2000, 20), Bucket(5000, 30)))
>>> grid.assign(2000, 10), grid.assign(2000, 11), grid.assign(2001, 11), grid.assign(2000, 21)
(0, 1, 2, -1)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raytrain.errors import PlanError


@dataclass(frozen=True, order=True)
class Bucket:
    """Upper, inclusive edges of one cell of the grid."""

    max_duration_ms: int
    max_tokens: int


@dataclass(frozen=True)
class BucketGrid:
    """Buckets sorted by duration, then tokens; each duration edge has its own token edges."""

    buckets: tuple[Bucket, ...]

    def __post_init__(self) -> None:
        if not self.buckets:
            raise PlanError(
                "a bucket grid needs at least one bucket",
                remedy="pass at least one Bucket; from a run folder: run `raytrain buckets` again",
            )
        if list(self.buckets) != sorted(set(self.buckets)):
            raise PlanError(
                "buckets must be in strictly ascending order of duration, then tokens",
                got=self.buckets,
                remedy="pass each Bucket once, sorted; from a run folder: run `raytrain buckets` again",
            )

    @cached_property
    def _edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        durations = np.array([bucket.max_duration_ms for bucket in self.buckets], np.int64)
        edges, starts = np.unique(durations, return_index=True)
        return edges, starts, np.array([bucket.max_tokens for bucket in self.buckets], np.int64)

    @property
    def duration_edges(self) -> tuple[int, ...]:
        """Distinct duration edges in ms, ascending."""
        return tuple(self._edges[0].tolist())

    def duration_index(self, duration_ms: np.ndarray) -> np.ndarray:
        """(N,) index of the duration bucket, `len(duration_edges)` for utterances that are too long."""
        return np.searchsorted(self._edges[0], duration_ms, side="left")

    def assign_many(self, duration_ms: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """(N,) bucket numbers; -1 if the utterance is too long or has too many tokens for its duration."""
        edges, starts, max_tokens = self._edges
        index = self.duration_index(duration_ms)
        inside = index < len(edges)
        first = starts[np.where(inside, index, 0)]
        ends = np.append(starts[1:], len(self.buckets))[np.where(inside, index, 0)]
        bucket = first.copy()
        for _ in range(int((ends - first).max(initial=1)) - 1):
            bucket = np.where((max_tokens[bucket] < tokens) & (bucket + 1 < ends), bucket + 1, bucket)
        return np.where(inside & (tokens <= max_tokens[bucket]), bucket, -1)

    def assign(self, duration_ms: int, tokens: int) -> int:
        """Bucket number of one utterance, or -1."""
        return int(self.assign_many(np.array([duration_ms]), np.array([tokens]))[0])
