"""`BatchSchedule`: which rows every rank trains on at every step, as a pure function of a few numbers.

The rows of a bucket form an endless stream: position p is row number p mod N of epoch p div N, in the order of a keyed
permutation (`Mixture` does the same for corpora with weights). The only state that changes during training is one
position per bucket, so a checkpoint keeps a few numbers and resumes at any step with any number of workers. At each
step all ranks share one bucket, chosen with probability proportional to its batches left in the epoch, so buckets run
out together.

    >>> schedule = BatchSchedule(seed=1, mixture=(100, 50), batch_sizes=(8, 4))
    >>> plan, state = schedule.step(schedule.initial(), world_size=2)
    >>> len(schedule.rows(plan, rank=0)) == plan.sizes[0]
    True
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypedDict

import numpy as np

from raytrain.errors import PlanError
from raytrain.lengths.mixture import Mixture
from raytrain.lengths.permutation import key_of


class ScheduleStateBody(TypedDict):
    """A `ScheduleState` as a checkpoint keeps it."""

    epoch: int
    positions: list[int]


@dataclass(frozen=True)
class ScheduleState:
    """Epoch and stream position of every bucket: the whole state that a resumed run needs."""

    epoch: int
    positions: tuple[int, ...]

    def to_dict(self) -> ScheduleStateBody:
        """JSON values."""
        return {"epoch": self.epoch, "positions": list(self.positions)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScheduleState:
        """The inverse of `to_dict`."""
        try:
            return cls(int(values["epoch"]), tuple(int(position) for position in values["positions"]))
        except KeyError as error:
            raise PlanError(
                "a checkpoint has no schedule position",
                why="it was made by training on a stream",
                remedy="restore data.stream, or give the run another name",
            ) from error


@dataclass(frozen=True)
class StepPlan:
    """One step: its bucket, the first stream position, and how many rows each rank takes starting there."""

    bucket: int
    start: int
    sizes: tuple[int, ...]
    epoch: int


class BatchSchedule:
    """`mixture` from the assignment (rows by bucket, and by corpus where corpora have weights), `batch_sizes` (per
    rank) from the profile, `num_epochs` None for an endless one.

    A state is valid for other batch sizes and numbers of ranks too.
    """

    def __init__(
        self, seed: int, mixture: Mixture | Sequence[int], batch_sizes: Sequence[int], num_epochs: int | None = None
    ) -> None:
        self.mixture = mixture if isinstance(mixture, Mixture) else Mixture.plain(mixture)
        self.seed, self.batch_sizes, self.num_epochs = seed, tuple(batch_sizes), num_epochs
        self.draws_per_bucket = self.mixture.draws_per_bucket
        if len(self.draws_per_bucket) != len(self.batch_sizes):
            raise PlanError(
                "assignment and profile differ in buckets",
                got=f"{len(self.draws_per_bucket)} and {len(self.batch_sizes)}",
                remedy="run assign and oomptimize again",
            )

    def restored(self, values: Mapping[str, Any]) -> ScheduleState:
        """The state of a checkpoint. Raises `PlanError` if its buckets differ."""
        state = ScheduleState.from_dict(values)
        if len(state.positions) != len(self.draws_per_bucket):
            raise PlanError(
                "the checkpoint and the assignment differ in buckets",
                got=f"{len(state.positions)} and {len(self.draws_per_bucket)}",
                remedy="remove the checkpoints of the other assignment, and train from the start",
            )
        return state

    def initial(self) -> ScheduleState:
        """The state before the first step."""
        return ScheduleState(0, (0,) * len(self.draws_per_bucket))

    def left(self, state: ScheduleState) -> list[int]:
        """Rows of each bucket left in the epoch, including remainders of earlier epochs."""
        epochs = state.epoch + 1
        return [epochs * rows - position for rows, position in zip(self.draws_per_bucket, state.positions, strict=True)]

    def step(self, state: ScheduleState, world_size: int) -> tuple[StepPlan, ScheduleState]:
        """The next step for `world_size` ranks and the state after it.

        A bucket with fewer rows left than ranks is skipped: they are its remainder and start the next epoch. Raises
        `StopIteration` when the last epoch has ended.
        """
        while True:
            if self.num_epochs is not None and state.epoch >= self.num_epochs:
                raise StopIteration
            left = self.left(state)
            # Batches left, counted up.
            weights = [
                -(-rows // (world_size * size)) if rows >= world_size else 0
                for rows, size in zip(left, self.batch_sizes, strict=True)
            ]
            total = sum(weights)
            if total:
                break
            state = ScheduleState(state.epoch + 1, state.positions)
        ticket = key_of(self.seed, state.epoch, sum(state.positions)) % total
        bucket = bisect_right(list(accumulate(weights)), ticket)
        rows = min(left[bucket], world_size * self.batch_sizes[bucket])
        share, extra = divmod(rows, world_size)
        sizes = (share + 1,) * extra + (share,) * (world_size - extra)
        start = state.positions[bucket]
        positions = (*state.positions[:bucket], start + rows, *state.positions[bucket + 1 :])
        return StepPlan(bucket, start, sizes, state.epoch), ScheduleState(state.epoch, positions)

    def is_last(self, state: ScheduleState, world_size: int) -> bool:
        """Whether a state is the end of training."""
        if self.num_epochs is None:
            return False
        last = ScheduleState(self.num_epochs - 1, state.positions)
        return all(rows < world_size for rows in self.left(last))

    def rows(self, plan: StepPlan, rank: int) -> np.ndarray:
        """(sizes[rank],) int64 row numbers of the step's bucket for one rank."""
        first = plan.start + sum(plan.sizes[:rank])
        return self.mixture.numbers(plan.bucket, np.arange(first, first + plan.sizes[rank]), self.seed)

    def all_rows(self, plan: StepPlan) -> np.ndarray:
        """(sum of sizes,) int64 row numbers of all ranks, one after the other."""
        return self.mixture.numbers(plan.bucket, np.arange(plan.start, plan.start + sum(plan.sizes)), self.seed)

    def remainder(self, state: ScheduleState) -> int:
        """Rows left in the state's epoch (at its end: those that start the next one)."""
        return sum(self.left(state))


def shares_of(rank: int, world_size: int, num_shares: int) -> range:
    """Which of a step's shares a worker takes: all of them are dealt out evenly, and some workers have one more.

    A share is what one worker takes of a step with as many workers as shares. Fewer workers take several, one after the
    other (gradient accumulation), and the step stays the same.
    """
    return range(num_shares * rank // world_size, num_shares * (rank + 1) // world_size)
