"""A step's memory as a function of batch size, longest utterance and most tokens, through a few traced shapes.

surface = MemorySurface.through(edges, lines)      # of traced buckets
surface(np.array([8]), np.array([4000]), np.array([40]))      # bytes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raytrain.training.memory.tracer import MemoryLine


@dataclass(frozen=True)
class MemorySurface:
    """Peak bytes: `base_bytes` and, for each utterance, a polynomial in seconds and tokens (attention's squares and
    cross-attention's products included) with these `weights`. `error` is the largest relative error in a traced shape's
    bytes per utterance; calls add it, so that they rather say too much."""

    base_bytes: float
    weights: tuple[float, ...]
    error: float

    @classmethod
    def through(cls, edges: Sequence[tuple[int, int]], lines: Sequence[MemoryLine]) -> MemorySurface:
        """Fitted to the lines of at least as many shapes (ms, tokens) as there are weights, by relative error."""
        slopes = np.array([line.slope_bytes for line in lines])
        durations, tokens = np.array(edges, np.float64).T
        terms = _terms(durations, tokens)
        weights = np.linalg.lstsq(terms / slopes[:, None], np.ones(len(slopes)), rcond=None)[0]
        error = float(np.abs(terms @ weights / slopes - 1).max())
        return cls(max(line.base_bytes for line in lines), tuple(weights.tolist()), error)

    def __call__(self, batch_size: np.ndarray, duration_ms: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """(N,) bytes of steps of these shapes, (N,) each."""
        slope = _terms(duration_ms, tokens) @ np.array(self.weights)
        return self.base_bytes + np.asarray(batch_size) * np.maximum(slope, 0) * (1 + self.error)


def _terms(duration_ms: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    seconds, tens = np.asarray(duration_ms, np.float64) / 1000, np.asarray(tokens, np.float64) / 10
    return np.stack([np.ones_like(seconds), seconds, seconds**2, tens, tens**2, seconds * tens], axis=-1)
