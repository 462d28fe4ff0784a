"""The contents of `ablation_predicted.json` and `ablation.json`: `raytrain.experiments` writes them, the report draws
them."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain.lengths.schemes import SCHEMES, GpuPlan, Hardware, SchemeRow


@dataclass(frozen=True)
class ModelPrediction:
    """The schemes for one model, the GPUs each needs, the error of the memory surface relative to the traces, and a
    batch of scheme R: durations (ms) and tokens."""

    schemes: list[SchemeRow]
    gpu_plans: list[GpuPlan]
    memory_fit_error: float
    random_batch: list[tuple[int, int]]


@dataclass(frozen=True)
class PredictedBody:
    """The body of `ablation_predicted.json`: predicted schemes, by model name. Scheme A, the baseline, trains on `gpus`
    for `steps`."""

    utterances: int
    hours: float
    hardware: Hardware
    memory_fraction: float
    gpus: int
    steps: int
    batch_seconds: float
    models: dict[str, ModelPrediction]


@dataclass(frozen=True)
class CurvePoint:
    """A validation: the step, seconds of training, and its measurements."""

    step: int
    seconds: float
    wer: float
    val_loss: float | None


@dataclass(frozen=True)
class TrainingOutcome:
    """A summary of a training run's metrics: its `steps` and `seconds`, the lowest validation WER, when it reached the
    target, the highest memory peak, means over its steps, and all validations."""

    steps: int
    seconds: float | None
    best_wer: float | None
    seconds_to_target: float | None
    steps_to_target: int | None
    memory_gib: float | None
    batch_size: float | None
    audio_padding: float | None
    token_padding: float | None
    audio_seconds_per_second: float | None
    steps_per_second: float | None
    curve: list[CurvePoint]


@dataclass(frozen=True)
class SchemeTrial:
    """Which training run a trial is, and `why` it failed if it did."""

    scheme: str
    label: str
    learning_rate: float
    why: str | None


@dataclass(frozen=True)
class TrialResult(TrainingOutcome, SchemeTrial):
    """A trained scheme. (Fields of the last base come first.)"""


@dataclass(frozen=True)
class AblationBody:
    """The body of `ablation.json`: schemes as planned and as trained, on a device with `device_gib` for a step. `best`
    has the index of each scheme's best trial."""

    target_wer: float
    device_gib: float
    learning_rates: list[float]
    schemes: list[SchemeRow]
    random_batch: list[tuple[int, int]]
    trials: list[TrialResult]
    best: dict[str, int]

    def best_trials(self) -> list[TrialResult]:
        """Each scheme's best trial, in the order in which schemes build on one another."""
        return [self.trials[self.best[scheme]] for scheme in SCHEMES if scheme in self.best]
