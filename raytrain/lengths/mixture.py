"""`Mixture`: corpora that repeat more or less often than once per epoch, still without sampler state.

Each bucket holds the rows of its corpora one after the other. An epoch draws round(rows · repeats) of each, in one
shuffled order for the whole bucket; the draws of a corpus go through its rows in shuffled passes that continue from
epoch to epoch, so that after any number of epochs two of its rows differ by at most one visit. A draw's number alone
determines its row.

    >>> mixture = Mixture(rows=((4, 2),), repeats=(1.0, 3.0))
    >>> mixture.draws
    ((4, 6),)
    >>> sorted(mixture.numbers(0, np.arange(10), seed=1).tolist())
    [0, 1, 2, 3, 4, 4, 4, 5, 5, 5]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from raytrain.errors import PlanError
from raytrain.lengths.permutation import FeistelPermutation, key_of


@dataclass(frozen=True)
class Mixture:
    """`rows`: for each bucket the number of rows of each corpus, in the order of row numbers. `repeats`: how often an
    epoch visits each row of each corpus."""

    rows: tuple[tuple[int, ...], ...]
    repeats: tuple[float, ...]

    def __post_init__(self) -> None:
        if any(len(bucket) != len(self.repeats) for bucket in self.rows):
            raise PlanError(
                "a mixture needs the rows of every corpus in every bucket",
                got=sorted({len(bucket) for bucket in self.rows}),
                allowed=len(self.repeats),
                remedy="pass in each bucket one number of rows for each of repeats; a corpus without rows counts 0",
            )
        if any(not 0 <= repeat < float("inf") for repeat in self.repeats):
            raise PlanError(
                "repeats must be 0 or more",
                got=self.repeats,
                remedy="correct the weights of the corpora and data.temperature",
            )
        if not any(map(sum, self.rows)):
            raise PlanError("the assignment has no rows", remedy="see assignment/rejected for the reasons")
        if not any(map(sum, self.draws)):
            raise PlanError(
                "no corpus with rows has a weight above 0",
                got=self.repeats,
                remedy="give a corpus of data.train that has rows a weight above 0",
            )

    @classmethod
    def plain(cls, rows_per_bucket: Sequence[int]) -> Mixture:
        """Every row once per epoch."""
        return cls(tuple((rows,) for rows in rows_per_bucket), (1.0,))

    @cached_property
    def draws(self) -> tuple[tuple[int, ...], ...]:
        """For each bucket, how many rows of each corpus an epoch takes; at least 1 if there are any rows."""
        return tuple(
            tuple(
                max(1, round(rows * repeat)) if rows and repeat else 0
                for rows, repeat in zip(bucket, self.repeats, strict=True)
            )
            for bucket in self.rows
        )

    @cached_property
    def draws_per_bucket(self) -> tuple[int, ...]:
        """Rows that an epoch takes from each bucket."""
        return tuple(map(sum, self.draws))

    @cached_property
    def _starts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each bucket, the offsets at which each corpus' draws and rows begin, followed by the totals."""
        return [
            (np.cumsum([0, *draws]), np.cumsum([0, *rows])) for draws, rows in zip(self.draws, self.rows, strict=True)
        ]

    def corpora(self, bucket: int, numbers: np.ndarray) -> np.ndarray:
        """(N,) index of the corpus that row numbers (N,) of a bucket belong to."""
        return np.searchsorted(self._starts[bucket][1], numbers, side="right") - 1

    def numbers(self, bucket: int, positions: np.ndarray, seed: int) -> np.ndarray:
        """(N,) int64 row numbers at stream positions (N,) of a bucket: position p is draw p mod D of epoch p div D."""
        count = self.draws_per_bucket[bucket]
        epochs = positions // count
        rows = np.empty_like(positions)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1) if len(positions) else ():
            inside = slice(None) if epochs[0] == epochs[-1] else epochs == epoch
            draws = shuffle(count, key_of(seed, bucket, epoch)).many(positions[inside] - epoch * count)
            rows[inside] = draws if self.draws[bucket] == self.rows[bucket] else self._rows(bucket, epoch, draws, seed)
        return rows

    def _rows(self, bucket: int, epoch: int, draws: np.ndarray, seed: int) -> np.ndarray:
        first_draws, first_rows = self._starts[bucket]
        corpora = np.searchsorted(first_draws, draws, side="right") - 1
        result = np.empty_like(draws)
        for corpus in np.unique(corpora).tolist():
            mine = corpora == corpus
            rows = self.rows[bucket][corpus]
            # The corpus' position in its own endless stream of shuffled passes.
            positions = draws[mine] - first_draws[corpus] + epoch * self.draws[bucket][corpus]
            passes = positions // rows
            numbers = np.empty_like(positions)
            for number in np.unique(passes).tolist():
                now = passes == number
                order = shuffle(rows, key_of(seed, bucket, corpus, number, 1))
                numbers[now] = order.many(positions[now] - number * rows)
            result[mine] = numbers + first_rows[corpus]
        return result


def sampling_shares(
    hours: Sequence[float], weights: Sequence[float], temperature: float = 1.0, groups: Sequence[str] | None = None
) -> list[float]:
    """Shares ∝ weight · hours · H^(1/temperature − 1), with sum 1, where H is the hours of the corpus' group.

    Without `groups` each corpus is its own group: weight · hours^(1/temperature). Temperature 1 keeps the corpora's own
    proportions, and a higher one evens out the groups (such as languages), as is usual in multilingual training
    (Conneau & Lample, arXiv 1901.07291, who give the exponent). A corpus without hours gets 0.
    """
    names: Sequence[int | str] = range(len(hours)) if groups is None else groups
    total_of: defaultdict[int | str, float] = defaultdict(float)
    for name, hour in zip(names, hours, strict=True):
        total_of[name] += hour
    masses = [
        weight * hour * total_of[name] ** (1 / temperature - 1) if hour > 0 else 0.0
        for name, hour, weight in zip(names, hours, weights, strict=True)
    ]
    total = sum(masses)
    return [mass / total if total else 0.0 for mass in masses]


def repeats_of(hours: Sequence[float], shares: Sequence[float]) -> tuple[float, ...]:
    """How often to repeat corpora with `hours` to get `shares` of the training audio; an epoch stays as long as all of
    them together."""
    total, whole = sum(hours), sum(shares)
    return tuple(share / whole * total / hour if hour > 0 else 0.0 for hour, share in zip(hours, shares, strict=True))


@lru_cache(maxsize=4096)
def shuffle(count: int, key: int) -> FeistelPermutation:
    """A cached permutation: making its keys costs more than a batch of numbers."""
    return FeistelPermutation(count, key)
