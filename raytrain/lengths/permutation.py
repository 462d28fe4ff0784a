"""`FeistelPermutation`: a keyed shuffle of 0 … n−1 that gives its i-th element without storing any other.

A Feistel network over the next power of four is a bijection whatever its round function (Luby and Rackoff
1988); values that fall outside n walk on until they are inside (cycle walking, Black and Rogaway 2002).

    >>> shuffle = FeistelPermutation(10, key=1)
    >>> sorted(shuffle(i) for i in range(10)) == list(range(10))
    True
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6


def mix(value: np.ndarray | np.uint64) -> np.ndarray:
    """A 64-bit hash of 64-bit integers (SplitMix64's finaliser, Steele et al. 2014)."""
    value = np.asarray(value, np.uint64)
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def key_of(*parts: int) -> int:
    """One 64-bit key from several integers, different for different parts."""
    key = np.uint64(0x9E3779B97F4A7C15)
    for part in parts:
        with np.errstate(over="ignore"):
            key = mix(key + np.uint64(0x9E3779B97F4A7C15) * (np.uint64(part & 0xFFFFFFFFFFFFFFFF) + np.uint64(1)))
    return int(key)


class FeistelPermutation:
    """Bijection of [0, n) chosen by `key`; constant memory, about 1 µs per element in arrays."""

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one element; got {n}")
        self.n = n
        self._half_bits = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._keys = [np.uint64(key_of(key, number)) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """The element at one place."""
        return int(self.many(np.array([index], np.int64))[0])

    def many(self, index: np.ndarray) -> np.ndarray:
        """(N,) int64 elements at (N,) places in [0, n)."""
        index = np.asarray(index, np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.n):
            raise IndexError(f"places run from 0 to {self.n - 1}; got {index.min()} to {index.max()}")
        value = self._network(index.astype(np.uint64))
        outside = value >= self.n
        while outside.any():
            value[outside] = self._network(value[outside])
            outside = value >= self.n
        return value.astype(np.int64)

    def _network(self, value: np.ndarray) -> np.ndarray:
        left, right = value >> self._half_bits, value & self._mask
        for key in self._keys:
            with np.errstate(over="ignore"):
                left, right = right, left ^ (mix(right + key) & self._mask)
        return (left << self._half_bits) | right
