"""Outcomes of training runs: a summary of a trial's metrics, and each scheme's best trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from raytrain.report.ablation_results import CurvePoint, TrainingOutcome, TrialResult
from raytrain.storage.run_files import METRICS
from raytrain.tracking import read_metrics

_MEANS = ("batch_size", "audio_padding", "token_padding", "audio_seconds_per_second", "steps_per_second")


def read_outcome(folder: Path | None, target_wer: float) -> TrainingOutcome:
    """A summary of the metrics in a trial's folder; for a trial without a folder, of no training."""
    lines = read_metrics(folder / METRICS) if folder else []
    steps = [line for line in lines if {"loss", "time_s", *_MEANS} <= line.keys()]
    validations = [line for line in lines if {"wer", "val_loss", "time_s"} <= line.keys()]
    at_target = next((line for line in validations if line["wer"] <= target_wer), None)
    means = {name: sum(line[name] for line in steps) / len(steps) if steps else None for name in _MEANS}
    return TrainingOutcome(
        steps=steps[-1]["step"] if steps else 0,
        seconds=validations[-1]["time_s"] if validations else None,
        best_wer=min((line["wer"] for line in validations), default=None),
        seconds_to_target=at_target["time_s"] if at_target else None,
        steps_to_target=at_target["step"] if at_target else None,
        memory_gib=max((line["memory_gib"] for line in steps if "memory_gib" in line), default=None),
        **means,
        curve=[CurvePoint(line["step"], line["time_s"], line["wer"], line["val_loss"]) for line in validations],
    )


def best_trials(trials: Sequence[TrialResult]) -> dict[str, int]:
    """The index of each scheme's trial that reached the target first, or else that has the lowest WER."""

    def rank(index: int) -> tuple[float, float]:
        seconds, wer = trials[index].seconds_to_target, trials[index].best_wer
        return (math.inf if seconds is None else seconds, math.inf if wer is None else wer)

    best: dict[str, int] = {}
    for index, trial in enumerate(trials):
        if trial.scheme not in best or rank(index) < rank(best[trial.scheme]):
            best[trial.scheme] = index
    return best
