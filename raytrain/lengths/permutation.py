"""`FeistelPermutation`: a keyed shuffle of 0 … n−1 that gives its i-th element without storing any other.

A Feistel network over pairs (high, low) that adds a hash of one half to the other, modulo its size, is a bijection for
any hash function (Luby and Rackoff 1988, in the additive form of Black and Rogaway 2002). The pairs are at most √n more
than n; values that fall outside are permuted again until they are inside (cycle walking, Black and Rogaway 2002).

    >>> shuffle = FeistelPermutation(10, key=1)
    >>> sorted(shuffle(i) for i in range(10)) == list(range(10))
    True
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 4


_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit hash of 64-bit integers (SplitMix64's finalizer, Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def key_of(*parts: int) -> int:
    """One 64-bit key from several integers, different for different parts; the same hash on Python's integers."""
    key = _GOLDEN
    for part in parts:
        key = (key + _GOLDEN * ((part & _MASK) + 1)) & _MASK
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK
        key ^= key >> 31
    return key


class FeistelPermutation:
    """Bijection of [0, n) chosen by `key`; constant memory, under 1 µs per element in arrays."""

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one element; got {n}")
        self.n = n
        high = math.isqrt(n - 1) + 1
        self._high, self._low = np.uint64(high), np.uint64(-(-n // high))
        self._keys = [np.uint64(key_of(key, number)) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """The element at one position."""
        return int(self.many(np.array([index], np.int64))[0])

    def many(self, index: np.ndarray) -> np.ndarray:
        """(N,) int64 elements at (N,) positions in [0, n)."""
        index = np.asarray(index, np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.n):
            raise IndexError(f"positions run from 0 to {self.n - 1}; got {index.min()} to {index.max()}")
        value = self._network(index.astype(np.uint64))
        outside = value >= self.n
        while outside.any():
            value[outside] = self._network(value[outside])
            outside = value >= self.n
        return value.astype(np.int64)

    def _network(self, value: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = value // self._low, value % self._low
        for number in range(0, _ROUNDS, 2):
            high = (high + mix(low + self._keys[number]) % self._high) % self._high
            low = (low + mix(high + self._keys[number + 1]) % self._low) % self._low
        return high * self._low + low
