"""Sections for experiments with whole runs: `raytrain tune` and `raytrain ablate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from raytrain.config.values import BatchSize, Bytes, Section
from raytrain.lengths.schemes import SCHEMES
from raytrain.settings import Range, Setting
from raytrain.training.settings import ErrorRate, LearningRate, Minutes, Steps

End = Annotated[float, Range(-(10**15), 10**15)]


class Distribution(Section):
    """The distribution that `raytrain tune` samples a setting from."""

    choice: Annotated[list[Any] | None, Setting("Sample from this list.")] = Field(None, min_length=1)
    uniform: Annotated[tuple[End, End] | None, Setting("Sample uniformly from [low, high].")] = None
    log_uniform: Annotated[tuple[End, End] | None, Setting("Sample log-uniformly from [low, high].")] = None

    @model_validator(mode="after")
    def _single_distribution(self) -> Distribution:
        given = [name for name in ("choice", "uniform", "log_uniform") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must be one of choice, uniform, log_uniform, got {', '.join(given) or 'none of them'}")
        low, high = self.ends()
        if self.choice is None and not low < high:
            raise ValueError(f"must be [low, high], got {[low, high]}")
        if self.log_uniform is not None and low <= 0:
            raise ValueError(f"log_uniform must be above 0, got {low}")
        return self

    def ends(self) -> tuple[Any, Any]:
        """Lowest and highest value, or first and last choice."""
        values: Sequence[Any] = self.choice or self.uniform or self.log_uniform or ()
        return values[0], values[-1]


class TuneSection(Section):
    """`raytrain tune`: training runs with settings sampled from `space`. After `grace_steps`, and at each
    `reduction_factor` times as many, one in `reduction_factor` trials continues (ASHA, arXiv 1810.05934)."""

    num_trials: Annotated[int, Range(1, 10**6), Setting("Number of trials.", unit="trials")] = 16
    max_steps: Annotated[
        Steps | None, Setting("Maximum steps of a trial; by default those of training.", unit="steps")
    ] = None
    grace_steps: Annotated[
        Steps | None, Setting("No trial is stopped before this; by default a ninth of max_steps.", unit="steps")
    ] = None
    reduction_factor: Annotated[
        int, Range(2, 10**6), Setting("One in this many trials continues at each comparison (ASHA).")
    ] = 3
    max_concurrent: Annotated[
        int | None,
        Range(1, 10**6),
        Setting("Maximum concurrent trials; by default as many as the cluster has room for.", unit="trials"),
    ] = None
    space: Annotated[
        dict[str, Distribution],
        Setting("What to sample each setting from, by dotted name: one of the keys below."),
    ] = {
        "train.learning_rate": Distribution(log_uniform=(1e-4, 5e-3)),
        "train.warmup_steps": Distribution(choice=[100, 300, 1000, 2500]),
        "train.accumulate": Distribution(choice=[1, 2, 4]),
        "model.spec_augment.time_masks": Distribution(choice=[0, 2, 5, 10]),
        "model.spec_augment.freq_masks": Distribution(choice=[0, 1, 2]),
    }


class AblateSection(Section):
    """`raytrain ablate`: batching schemes trained one after the other and compared. They differ only if memory is the
    limit, so this section has its own memory and maximum batch size."""

    schemes: Annotated[
        list[str],
        Setting(f"Batching schemes to compare, distinct values of {', '.join(SCHEMES)}."),
    ] = Field(["R", "A", "B", "C", "D", "D+"], min_length=1)
    learning_rates: Annotated[
        list[LearningRate] | None, Setting("Each scheme is trained at each of these; by default at the run's.")
    ] = Field(None, min_length=1)
    target_wer: Annotated[
        float, Range(0, 100, above=True), Setting("The validation WER (0.2 is 20 %) at which times are compared.")
    ] = 0.2
    stop_at_wer: Annotated[ErrorRate | None, Setting("Training stops at this validation WER.")] = None
    max_minutes: Annotated[
        Minutes | None, Setting("Maximum training time; by default that of train.", unit="minutes")
    ] = None
    max_steps: Annotated[Steps | None, Setting("Maximum training steps; by default those of train.", unit="steps")] = (
        None
    )
    validate_every_steps: Annotated[
        Steps | None, Setting("Steps between validations; by default those of train.", unit="steps")
    ] = None
    device_memory: Annotated[
        Bytes | None, Setting("Replaces oomptimize.device_memory in all schemes.", unit="bytes")
    ] = None
    max_batch_size: Annotated[
        BatchSize | None, Setting("Replaces oomptimize.max_batch_size in all schemes.", unit="utterances")
    ] = None

    @field_validator("schemes")
    @classmethod
    def _different_schemes(cls, value: list[str]) -> list[str]:
        unknown = [name for name in value if name not in SCHEMES]
        if unknown or len(set(value)) < len(value):
            raise ValueError(f"must be distinct values of {', '.join(SCHEMES)}, got {', '.join(value)}")
        return value
