"""A step's memory by batch size, longest utterance and most tokens, through a few traced shapes.

surface = MemorySurface.through(edges, lines)      # of traced buckets
surface(np.array([8]), np.array([4000]), np.array([40]))      # bytes

In the batch size a step's bytes are close to a line, and the slope of that line, the bytes per utterance, is close to a
polynomial in seconds and tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

Powers = tuple[tuple[int, int], ...]  # of seconds and of tokens / 10, by term
# Frames and frames² of attention, tokens, frames·tokens; and the tokens' squares, which matter less.
_SMALL: Powers = ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1))
_WHOLE: Powers = ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 1))


@dataclass(frozen=True)
class MemoryLine:
    """Peak bytes as an affine function of the batch size: `base_bytes + batch_size · slope_bytes`."""

    base_bytes: float
    slope_bytes: float

    @classmethod
    def through(cls, small: int, small_peak: int, large: int, large_peak: int) -> MemoryLine:
        """The line through two traced points; `small` and `large` are batch sizes."""
        slope = (large_peak - small_peak) / (large - small)
        return cls(base_bytes=small_peak - small * slope, slope_bytes=slope)

    def at(self, batch_size: int) -> int:
        """Bytes of a batch size."""
        return round(self.base_bytes + batch_size * self.slope_bytes)

    def largest_batch(self, budget_bytes: int) -> int:
        """The largest batch size on the line within the budget, at least 1."""
        return max(1, int((budget_bytes - self.base_bytes) // max(self.slope_bytes, 1.0)))


@dataclass(frozen=True)
class SlopePolynomial:
    """Bytes per utterance as a polynomial in seconds and tokens / 10: `weights` of the terms with these `powers`."""

    powers: Powers
    weights: tuple[float, ...]

    @classmethod
    def through(cls, edges: Sequence[tuple[int, int]], lines: Sequence[MemoryLine], powers: Powers) -> SlopePolynomial:
        """Fitted to the slopes of at least as many shapes (ms, tokens) as there are terms. It minimizes relative
        errors, since the largest size that fits is proportional to 1 / slope."""
        slopes = np.array([line.slope_bytes for line in lines])
        durations, tokens = np.array(edges, np.float64).T
        terms = _terms(durations, tokens, powers)
        weights = np.linalg.lstsq(terms / slopes[:, None], np.ones(len(slopes)), rcond=None)[0]
        return cls(powers, tuple(weights.tolist()))

    def __call__(self, duration_ms: ArrayLike, tokens: ArrayLike) -> np.ndarray:
        """(N,) bytes per utterance of these shapes, (N,) each."""
        return _terms(duration_ms, tokens, self.powers) @ np.array(self.weights)


def _terms(duration_ms: ArrayLike, tokens: ArrayLike, powers: Powers) -> np.ndarray:
    seconds, tens = np.asarray(duration_ms, np.float64) / 1000, np.asarray(tokens, np.float64) / 10
    return np.stack([_power(seconds, first) * _power(tens, second) for first, second in powers], axis=-1)


def _power(values: np.ndarray, exponent: int) -> np.ndarray:
    result = np.full_like(values, 1.0)
    for _ in range(exponent):
        result = result * values
    return result


@dataclass(frozen=True)
class MemorySurface:
    """Peak bytes: `base_bytes` and, for each utterance, its `slope`. `error` is the largest relative error in a traced
    shape's bytes per utterance; calls add it, to err on the high side."""

    base_bytes: float
    slope: SlopePolynomial
    error: float

    @classmethod
    def through(cls, edges: Sequence[tuple[int, int]], lines: Sequence[MemoryLine]) -> MemorySurface:
        """Fitted to the lines of at least six shapes (ms, tokens)."""
        slope = SlopePolynomial.through(edges, lines, _WHOLE)
        traced = np.array([line.slope_bytes for line in lines])
        error = float(np.abs(slope(*np.array(edges, np.float64).T) / traced - 1).max())
        return cls(max(line.base_bytes for line in lines), slope, error)

    def __call__(self, batch_size: ArrayLike, duration_ms: ArrayLike, tokens: ArrayLike) -> np.ndarray:
        """(N,) bytes of steps of these shapes, (N,) each."""
        slope = np.maximum(self.slope(duration_ms, tokens), 0)
        return self.base_bytes + np.asarray(batch_size) * slope * (1 + self.error)


@dataclass
class NeighborLines:
    """The lines of buckets predicted so far, and an estimate for the next."""

    edges: list[tuple[int, int]] = field(default_factory=list)
    lines: list[MemoryLine] = field(default_factory=list)

    def add(self, max_duration_ms: int, max_tokens: int, line: MemoryLine) -> None:
        """Add a bucket's line."""
        self.edges.append((max_duration_ms, max_tokens))
        self.lines.append(line)

    def guess(self, max_duration_ms: int, max_tokens: int) -> MemoryLine | None:
        """The expected line for a bucket; None before the first line."""
        if not self.lines:
            return None
        latest = self.lines[-1]
        if len(self.lines) < len(_SMALL):
            return MemoryLine(latest.base_bytes, latest.slope_bytes * max_duration_ms / self.edges[-1][0])
        polynomial = SlopePolynomial.through(self.edges, self.lines, _SMALL)
        slope = float(polynomial(max_duration_ms, max_tokens))
        return MemoryLine(latest.base_bytes, slope if slope > 0 else latest.slope_bytes)
