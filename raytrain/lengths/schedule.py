"""`BatchSchedule`: which rows every rank trains on at every step, as a pure function of a few numbers.

The rows of a bucket form an endless stream: position p is row number p mod N of epoch p div N, in an order that
a keyed permutation gives. All that changes while training is one position per bucket, so a checkpoint keeps a
few numbers and resumes at any step with any number of workers. At each step all ranks share one bucket, chosen
with a probability proportional to the batches it has left in the epoch, so buckets run out together.

    >>> schedule = BatchSchedule(seed=1, rows_per_bucket=(100, 50), batch_sizes=(8, 4))
    >>> plan, state = schedule.step(schedule.initial(), world_size=2)
    >>> len(schedule.rows(plan, rank=0)) == plan.sizes[0]
    True
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from raytrain.errors import PlanError
from raytrain.lengths.permutation import FeistelPermutation, key_of


@dataclass(frozen=True)
class ScheduleState:
    """Epoch and stream position of every bucket: all that a resumed run needs."""

    epoch: int
    positions: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"epoch": self.epoch, "positions": list(self.positions)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScheduleState:
        """The inverse of `to_dict`."""
        return cls(int(values["epoch"]), tuple(int(position) for position in values["positions"]))


@dataclass(frozen=True)
class StepPlan:
    """One step: its bucket, the first stream position, and how many rows each rank takes from there on."""

    bucket: int
    start: int
    sizes: tuple[int, ...]
    epoch: int


@dataclass(frozen=True)
class BatchSchedule:
    """`rows_per_bucket` from the assignment, `batch_sizes` (per rank) from the profile."""

    seed: int
    rows_per_bucket: tuple[int, ...]
    batch_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.rows_per_bucket) != len(self.batch_sizes):
            raise PlanError(
                "assignment and profile differ in buckets",
                got=f"{len(self.rows_per_bucket)} and {len(self.batch_sizes)}",
                remedy="run assign and oomptimize again",
            )
        if not any(self.rows_per_bucket):
            raise PlanError("the assignment has no rows", remedy="see assignment/rejected for the reasons")

    def initial(self) -> ScheduleState:
        """The state before the first step."""
        return ScheduleState(0, (0,) * len(self.rows_per_bucket))

    def left(self, state: ScheduleState) -> list[int]:
        """Rows of each bucket that the epoch still has to give, remainders of earlier epochs included."""
        return [
            (state.epoch + 1) * rows - position
            for rows, position in zip(self.rows_per_bucket, state.positions, strict=True)
        ]

    def step(self, state: ScheduleState, world_size: int) -> tuple[StepPlan, ScheduleState]:
        """The next step for `world_size` ranks and the state after it.

        A bucket with fewer rows left than ranks gives none: they are its remainder and start the next epoch.
        """
        while True:
            left = self.left(state)
            weights = [
                -(-rows // (world_size * size)) if rows >= world_size else 0
                for rows, size in zip(left, self.batch_sizes, strict=True)
            ]
            total = sum(weights)
            if total:
                break
            state = ScheduleState(state.epoch + 1, state.positions)
        ticket = key_of(self.seed, state.epoch, sum(state.positions)) % total
        bucket = 0
        while ticket >= weights[bucket]:
            ticket -= weights[bucket]
            bucket += 1
        rows = min(left[bucket], world_size * self.batch_sizes[bucket])
        share, extra = divmod(rows, world_size)
        sizes = tuple(share + (rank < extra) for rank in range(world_size))
        start = state.positions[bucket]
        positions = list(state.positions)
        positions[bucket] = start + rows
        return StepPlan(bucket, start, sizes, state.epoch), ScheduleState(state.epoch, tuple(positions))

    def rows(self, plan: StepPlan, rank: int) -> np.ndarray:
        """(sizes[rank],) int64 row numbers of the step's bucket for one rank."""
        first = plan.start + sum(plan.sizes[:rank])
        positions = np.arange(first, first + plan.sizes[rank])
        count = self.rows_per_bucket[plan.bucket]
        numbers = np.empty_like(positions)
        for epoch in np.unique(positions // count).tolist():
            inside = positions // count == epoch
            shuffle = _shuffle(count, key_of(self.seed, plan.bucket, epoch))
            numbers[inside] = shuffle.many(positions[inside] % count)
        return numbers

    def remainder(self, state: ScheduleState) -> int:
        """Rows that are left of the state's epoch (at its end: what starts the next one)."""
        return sum(self.left(state))

    def steps_in_epoch(self, world_size: int) -> int:
        """Steps of the first epoch, counted by going through it."""
        state, steps = self.initial(), 0
        while True:
            plan, state = self.step(state, world_size)
            if plan.epoch > 0:
                return steps
            steps += 1


@lru_cache(maxsize=256)
def _shuffle(count: int, key: int) -> FeistelPermutation:
    return FeistelPermutation(count, key)
