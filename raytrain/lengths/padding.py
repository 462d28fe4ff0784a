"""Padding: the part of a batch that holds neither speech nor text, since all its utterances get the longest one's
length.

>>> padded_sizes(np.array([900, 1000, 400]), np.array([2, 1])).tolist()
[2000, 400]
>>> padding_fraction(2300, 2400)
0.04166666666666663
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def padding_fraction(real: float, padded: float) -> float:
    """The share of `padded` milliseconds, samples, tokens or operations that is not `real`."""
    return 1 - real / padded


def padded_sizes(lengths: np.ndarray, batch_sizes: np.ndarray | Sequence[int]) -> np.ndarray:
    """(B,) padded sizes of batches that hold `lengths` (N,) one after the other: number of utterances times the
    longest."""
    starts = np.cumsum((0, *batch_sizes[:-1]))
    return np.maximum.reduceat(lengths, starts) * np.asarray(batch_sizes)
