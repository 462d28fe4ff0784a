"""`LengthHistogram`: counts of utterances by duration and tokens, in bounded space.

Durations are counted in cells of 10 ms, and a cell stands for its upper edge; tokens are exact. Histograms add:
parts of a corpus can be counted anywhere in any order.

    >>> import numpy as np
    >>> a = LengthHistogram.from_lengths(np.array([1001, 1010]), np.array([7, 7]))
    >>> (a + a).total, a.cells.tolist(), a.counts.tolist()
    (4, [1010], [2])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raytrain.errors import DataError

DURATION_CELL_MS = 10


@dataclass(frozen=True, eq=False)
class LengthHistogram:
    """Sparse counts, sorted by (duration, tokens).

    `cells`: (N,) int64, upper edge of the duration cell in ms; `tokens`, `counts`: (N,) int64;
    `real_duration_ms`: exact sum of all durations.
    """

    cells: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    real_duration_ms: int = 0

    @classmethod
    def empty(cls) -> LengthHistogram:
        """An empty histogram, the neutral element of `+`."""
        none = np.zeros(0, np.int64)
        return cls(none, none, none)

    @classmethod
    def from_lengths(cls, duration_ms: np.ndarray, tokens: np.ndarray) -> LengthHistogram:
        """Count utterances of given durations (ms) and tokens, (N,) integers ≥ 1 each."""
        duration_ms, tokens = np.asarray(duration_ms, np.int64), np.asarray(tokens, np.int64)
        if duration_ms.shape != tokens.shape:
            raise DataError(
                "durations and tokens differ in number",
                got=f"{duration_ms.shape} and {tokens.shape}",
                remedy="pass one number of tokens for each duration",
            )
        if duration_ms.size and (duration_ms.min() < 1 or tokens.min() < 1):
            raise DataError(
                "lengths must be at least 1",
                got=f"{duration_ms.min()} ms, {tokens.min()} tokens",
                remedy="leave out utterances without audio or tokens before they are counted",
            )
        cells = -(-duration_ms // DURATION_CELL_MS) * DURATION_CELL_MS
        return cls.from_arrays(cells, tokens, np.full_like(tokens, 1), int(duration_ms.sum()))

    @classmethod
    def from_arrays(
        cls, cells: np.ndarray, tokens: np.ndarray, counts: np.ndarray, real_duration_ms: int
    ) -> LengthHistogram:
        """From cells in any order; equal cells are merged. (N,) integers ≥ 0 each."""
        if not len(cells):
            return cls.empty()
        cells, tokens, counts = (np.asarray(values, np.int64) for values in (cells, tokens, counts))
        width = int(tokens.max()) + 1
        if int(cells.max()) >= np.iinfo(np.int64).max // width:
            raise DataError(
                "lengths are too large to count",
                got=f"{cells.max()} ms, {tokens.max()} tokens",
                why="a cell's duration times its tokens must fit 64 bits",
                remedy="leave out utterances with such lengths; durations are in milliseconds",
            )
        # One integer per cell sorts fast, and a stable sort merges two sorted histograms in linear time.
        keys = cells * width + tokens
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        first = order[starts]
        return cls(cells[first], tokens[first], np.add.reduceat(counts[order], starts), int(real_duration_ms))

    def __add__(self, addend: LengthHistogram) -> LengthHistogram:
        return LengthHistogram.sum((self, addend))

    @classmethod
    def sum(cls, parts: Sequence[LengthHistogram]) -> LengthHistogram:
        """The sum of all parts, merged in one pass."""
        if not parts:
            return cls.empty()
        return cls.from_arrays(
            np.concatenate([part.cells for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.counts for part in parts]),
            sum(part.real_duration_ms for part in parts),
        )

    def __eq__(self, right: object) -> bool:
        if not isinstance(right, LengthHistogram):
            return NotImplemented
        pairs = ((self.cells, right.cells), (self.tokens, right.tokens), (self.counts, right.counts))
        return self.real_duration_ms == right.real_duration_ms and all(np.array_equal(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]  # compared by value, and arrays have no hash

    @property
    def total(self) -> int:
        """Number of utterances."""
        return int(self.counts.sum())

    @property
    def hours(self) -> float:
        """Exact sum of all durations in hours."""
        return self.real_duration_ms / 3.6e6

    def select(self, chosen: np.ndarray) -> LengthHistogram:
        """The cells where the (N,) mask is true; their exact duration is unknown, so the cells' edges stand in for
        it."""
        cells, counts = self.cells[chosen], self.counts[chosen]
        return LengthHistogram(cells, self.tokens[chosen], counts, int((cells * counts).sum()))

    def quantile(self, q: float) -> int:
        """Smallest cell edge (ms) that at least a share `q` of the utterances does not exceed; 0 if empty."""
        if not len(self.cells):
            return 0
        reached = np.cumsum(self.counts)
        return int(self.cells[np.searchsorted(reached, q * reached[-1], side="left").clip(max=len(self.cells) - 1)])
