"""Go through a schedule without audio: the padding, agreement, shares and cost that training would see."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raytrain.errors import PlanError
from raytrain.lengths.padding import padded_sizes, padding_fraction
from raytrain.lengths.schedule import BatchSchedule, ScheduleState, StepPlan

_CHECKED_RANKS = 8


@dataclass(frozen=True)
class Simulation:
    """Statistics of `steps` steps of `world_size` ranks.

    Padding is the empty part of the ranks' padded batches. `bucket_agreement` is the share of steps in which ranks that
    computed the schedule independently were in the same bucket. `audio_share` is each corpus' part of the audio.
    `remainder` counts rows of the last epoch that have not been drawn yet, `seconds_per_batch` what one rank's row
    numbers cost, `slowest_rank` the longest rank's padded audio over the mean.
    """

    steps: int
    world_size: int
    epochs: float
    rows: int
    mean_batch: float
    audio_padding: float
    token_padding: float
    bucket_agreement: float
    slowest_rank: float
    audio_share: tuple[float, ...]
    remainder: int
    seconds_per_batch: float


def simulate(
    schedule: BatchSchedule,
    lengths: Sequence[tuple[np.ndarray, np.ndarray]],
    world_size: int,
    steps: int,
    on_step: Callable[[int], None] = lambda done: None,
) -> Simulation:
    """`lengths` are durations (ms) and tokens of each bucket's rows by row number. A finite schedule ends the
    simulation early.

    Raises `PlanError` for a schedule without a step.
    """
    ranks, tally = _IndependentRanks(schedule, world_size), _Tally(len(schedule.mixture.repeats))
    state, spent = schedule.initial(), 0.0
    while tally.steps < steps and not schedule.is_last(state, world_size):
        start = time.perf_counter()
        plan, state = schedule.step(state, world_size)
        schedule.rows(plan, tally.steps % world_size)
        spent += time.perf_counter() - start
        numbers = schedule.all_rows(plan)
        durations, tokens = (values[numbers] for values in lengths[plan.bucket])
        tally.add(plan, durations, tokens, schedule.mixture.corpora(plan.bucket, numbers))
        tally.agreed += ranks.step() <= {plan.bucket}
        on_step(tally.steps)
    if not tally.steps:
        raise PlanError(
            f"the schedule has no step for {world_size} worker(s)",
            got=f"{sum(schedule.draws_per_bucket)} rows in an epoch",
            remedy="train with fewer workers or on more rows, or raise train.max_epochs",
        )
    return tally.simulation(schedule, state, world_size, seconds_per_batch=spent / tally.steps)


class _IndependentRanks:
    """Ranks that each compute the schedule independently, as in training."""

    def __init__(self, schedule: BatchSchedule, world_size: int) -> None:
        number = max(0, min(_CHECKED_RANKS, world_size) - 1)
        self._schedules = [
            BatchSchedule(schedule.seed, schedule.mixture, schedule.batch_sizes, schedule.num_epochs)
            for _ in range(number)
        ]
        self._states = [rank.initial() for rank in self._schedules]
        self._world_size = world_size

    def step(self) -> set[int]:
        """The bucket of each rank at the next step."""
        steps = [rank.step(state, self._world_size) for rank, state in zip(self._schedules, self._states, strict=True)]
        self._states = [state for _, state in steps]
        return {plan.bucket for plan, _ in steps}


class _Tally:
    """Sums over steps: `real` and `padded` are (audio in ms, tokens), `audio` is ms by corpus."""

    def __init__(self, num_corpora: int) -> None:
        self.steps = self.rows = self.agreed = 0
        self.real, self.padded, self.audio = np.zeros(2), np.zeros(2), np.zeros(num_corpora)
        self.imbalance = 0.0

    def add(self, plan: StepPlan, durations: np.ndarray, tokens: np.ndarray, corpora: np.ndarray) -> None:
        """Add a step: lengths and corpora of all ranks' rows, one rank after the other."""
        audio = padded_sizes(durations, plan.sizes)
        self.real += durations.sum(), tokens.sum()
        self.padded += audio.sum(), padded_sizes(tokens, plan.sizes).sum()
        self.imbalance += audio.max() / audio.mean()
        self.audio += np.bincount(corpora, durations, len(self.audio))
        self.rows += len(durations)
        self.steps += 1

    def simulation(
        self, schedule: BatchSchedule, state: ScheduleState, world_size: int, seconds_per_batch: float
    ) -> Simulation:
        """The result of the steps up to `state`; at least one."""
        return Simulation(
            steps=self.steps,
            world_size=world_size,
            epochs=self.rows / sum(schedule.draws_per_bucket),
            rows=self.rows,
            mean_batch=self.rows / self.steps / world_size,
            audio_padding=padding_fraction(float(self.real[0]), float(self.padded[0])),
            token_padding=padding_fraction(float(self.real[1]), float(self.padded[1])),
            bucket_agreement=self.agreed / self.steps,
            slowest_rank=float(self.imbalance / self.steps),
            audio_share=tuple((self.audio / self.audio.sum()).tolist()),
            remainder=schedule.remainder(state),
            seconds_per_batch=seconds_per_batch,
        )
