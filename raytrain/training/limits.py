"""Conditions that end training early: skipped steps, unreadable rows, and validations that stop improving."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from raytrain.errors import TrainingError
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, make_folder
from raytrain.training.optim import learning_rate
from raytrain.training.settings import TrainSettings
from raytrain.training.window import StepRows


class GaveUp(TrainingError):
    """Training gave up, on all ranks at once: restarted from the last checkpoint, it would fail the same way."""


class SkippedSteps:
    """Counts steps with non-finite gradients, and records their rows in `folder`. All ranks skip the same steps; each
    records its own rows."""

    def __init__(self, folder: Path, rank: int, settings: TrainSettings) -> None:
        self._folder, self._rank, self._settings = folder, rank, settings
        self._in_a_row = self.total = 0

    def add(self, last_step: int, steps: Sequence[StepRows], skipped: Sequence[float]) -> None:
        """Count the steps up to `last_step`; `skipped` is 1 where one was skipped."""
        first = last_step - len(skipped) + 1
        for step, step_rows, was_skipped in zip(itertools.count(first), steps, skipped, strict=False):
            if not was_skipped:
                self._in_a_row = 0
                continue
            self.total += 1
            self._in_a_row += 1
            self._note_rows(step, step_rows)

    def _note_rows(self, step: int, step_rows: StepRows) -> None:
        rows = [row._asdict() for row in step_rows.rows]
        body = {"step": step, "rank": self._rank, "bucket": step_rows.bucket, "rows": rows}
        path = make_folder(self._folder) / f"step_{step:08d}_rank_{self._rank}.json"
        atomic_write_bytes(path, canonical_json(body))

    def check(self, step: int) -> None:
        """Raises `GaveUp` after `train.max_skipped_steps` skipped steps in a row."""
        if self._in_a_row >= self._settings.max_skipped_steps:
            raise GaveUp(
                f"the gradients of {self._in_a_row} steps in a row were not finite, up to step {step}",
                got=f"learning rate {learning_rate(step, self._settings):.2e}",
                allowed=f"train.max_skipped_steps: {self._settings.max_skipped_steps}",
                remedy="lower train.learning_rate or raise train.warmup_steps; bad_steps in the run folder has the "
                "steps' rows; training resumes from the last checkpoint",
            )


class ReplacedRows:
    """Counts rows that were replaced because their audio can't be read; at most a fraction `limit` may be."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._rows = self._replaced = 0.0

    def add(self, rows: float, replaced: float, step: int) -> None:
        """Raises `GaveUp` if significantly more than the limit were replaced. For few rows the share is noisy, so the
        test uses the count minus three of its standard deviations."""
        self._rows += rows
        self._replaced += replaced
        if self._replaced - 3 * math.sqrt(self._replaced) > self._limit * self._rows:
            share = f"{self._replaced / self._rows:.1%}"
            raise GaveUp(
                f"the audio of too many rows can't be read, up to step {step}",
                got=f"{self._replaced:.0f} of {self._rows:.0f} rows replaced ({share})",
                allowed=f"data.max_bad_fraction = {self._limit:.2%}",
                remedy="quarantine.jsonl in the run folder names the recordings: fix them or leave their rows out, or "
                "raise the limit; training resumes from the last checkpoint",
            )


class Patience:
    """The best validation so far, and whether to stop because the goal is reached or nothing improves."""

    def __init__(self, settings: TrainSettings, best_error: float, best_step: int) -> None:
        self._settings = settings
        self._best_error, self._best_step = best_error, best_step

    def ends_with(self, metrics: dict[str, float], step: int) -> bool:
        """Record a validation; True if training should end with it. A validation without an error is ignored."""
        error, goal, patience = metrics.get("error"), self._settings.stop_at_wer, self._settings.patience
        if error is None:
            return False
        if error < self._best_error:
            self._best_error, self._best_step = error, step
        if goal is not None and metrics.get("wer", math.inf) <= goal:
            return True
        return patience is not None and step - self._best_step >= patience * self._settings.validate_every_steps
