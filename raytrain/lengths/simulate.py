"""Go through a schedule without audio: padding, agreement, shares and cost of what training would see."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raytrain.errors import PlanError
from raytrain.lengths.schedule import BatchSchedule, StepPlan

_CHECKED_RANKS = 8


@dataclass(frozen=True)
class Simulation:
    """What `steps` steps of `world_size` ranks look like.

    Padding is the part of the ranks' padded batches that holds nothing. `bucket_agreement` is the share of steps in
    which ranks that each went through the schedule on their own were in one bucket. `audio_share` is each corpus' part
    of the audio. `remainder` are rows of the last epoch that are not given yet, `seconds_per_batch` what one rank's row
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
    """`lengths` are durations (ms) and tokens of each bucket's rows by row number. A finite schedule ends it early.

    Raises `PlanError` for a schedule without a step.
    """
    mixture = schedule.mixture
    others = [
        BatchSchedule(schedule.seed, mixture, schedule.batch_sizes, schedule.num_epochs) for _ in range(_CHECKED_RANKS)
    ]
    others = others[: max(0, min(_CHECKED_RANKS, world_size) - 1)]
    states = [one.initial() for one in others]
    state, done, agreed, rows = schedule.initial(), 0, 0, 0
    real, padded, imbalance, spent = np.zeros(2), np.zeros(2), 0.0, 0.0
    audio = np.zeros(len(mixture.repeats))
    while done < steps and not schedule.is_last(state, world_size):
        start = time.perf_counter()
        plan, state = schedule.step(state, world_size)
        schedule.rows(plan, done % world_size)
        spent += time.perf_counter() - start
        buckets = {plan.bucket}
        for index, one in enumerate(others):
            own, states[index] = one.step(states[index], world_size)
            buckets.add(own.bucket)
        agreed += len(buckets) == 1
        numbers = schedule.all_rows(plan)
        durations, tokens = (values[numbers] for values in lengths[plan.bucket])
        longest = _padded(plan, durations)
        real += durations.sum(), tokens.sum()
        padded += longest.sum(), _padded(plan, tokens).sum()
        imbalance += longest.max() / longest.mean()
        audio += np.bincount(mixture.corpora(plan.bucket, numbers), durations, len(audio))
        rows += len(numbers)
        done += 1
        on_step(done)
    if not done:
        raise PlanError(
            f"the schedule has no step for {world_size} worker(s)",
            got=f"{sum(schedule.draws_per_bucket)} rows in an epoch",
            remedy="train with fewer workers or on more rows, or raise train.max_epochs",
        )
    per_epoch = sum(schedule.draws_per_bucket)
    return Simulation(
        steps=done,
        world_size=world_size,
        epochs=rows / per_epoch,
        rows=rows,
        mean_batch=rows / done / world_size,
        audio_padding=float(1 - real[0] / padded[0]),
        token_padding=float(1 - real[1] / padded[1]),
        bucket_agreement=agreed / done,
        slowest_rank=float(imbalance / done),
        audio_share=tuple((audio / audio.sum()).tolist()),
        remainder=schedule.remainder(state),
        seconds_per_batch=spent / done,
    )


def _padded(plan: StepPlan, values: np.ndarray) -> np.ndarray:
    """(world_size,) padded sizes of the ranks' batches: number of rows times the largest."""
    starts = np.cumsum((0, *plan.sizes[:-1]))
    return np.maximum.reduceat(values, starts) * np.array(plan.sizes)
