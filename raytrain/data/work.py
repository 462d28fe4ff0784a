"""Work of a training step before its audio is read: its rows, and the state to resume from after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raytrain.data.assignment import Assignment, Row
from raytrain.data.batch import StepState
from raytrain.lengths.permutation import key_of
from raytrain.lengths.schedule import BatchSchedule, ScheduleState, StepPlan


@dataclass(frozen=True)
class StepWork:
    """One share of a step (a micro-batch) before its audio is read, and the state after the step.

    `rows` and `keys` (the augmentation seeds) are parallel. `numbers` are the rows' numbers in the assignment, from
    which a broken recording is replaced; without them another row of the same share is used.
    """

    plan: StepPlan
    state: StepState
    is_last: bool
    rows: Sequence[Row]
    keys: Sequence[int]
    numbers: Sequence[int] | None = None


@dataclass(frozen=True)
class PlannedStep:
    """A step, the schedule's state after it, and whether the schedule ends there."""

    plan: StepPlan
    state: ScheduleState
    is_last: bool


def planned_steps(schedule: BatchSchedule, state: ScheduleState, num_shares: int) -> Iterator[PlannedStep]:
    """The schedule's steps from `state` on, of `num_shares` each."""
    is_last = schedule.is_last(state, num_shares)
    while not is_last:
        plan, state = schedule.step(state, num_shares)
        is_last = schedule.is_last(state, num_shares)
        yield PlannedStep(plan, state, is_last)


def scheduled_work(
    assignment: Assignment, schedule: BatchSchedule, state: ScheduleState, shares: Sequence[int], num_shares: int
) -> Iterator[StepWork]:
    """A worker's `shares` of the schedule's steps from `state` on, one after the other; each step has `num_shares`."""
    for step in planned_steps(schedule, state, num_shares):
        for share in shares:
            yield work_of(assignment, schedule, step.plan, share, step.state, step.is_last)


def work_of(
    assignment: Assignment, schedule: BatchSchedule, plan: StepPlan, share: int, state: ScheduleState, is_last: bool
) -> StepWork:
    """One share of a planned step."""
    numbers = schedule.rows(plan, share).tolist()
    first = plan.start + sum(plan.sizes[:share])
    keys = [key_of(schedule.seed, plan.bucket, position, 2) for position in range(first, first + len(numbers))]
    return StepWork(plan, state, is_last, assignment.rows(plan.bucket, numbers), keys, numbers)
