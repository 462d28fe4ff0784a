"""One trial: a training run on Ray Train, in its own run folder, read validation by validation."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.cluster.trainer import run_training
from raytrain.config import Config, check_config
from raytrain.run_folder.lineage import training_key, training_meta
from raytrain.run_folder.scored_rows import check_dev_split
from raytrain.run_folder.training_plan import TrainingPlan
from raytrain.run_folder.trial_folder import TrialJob, with_settings
from raytrain.run_folder.workspace import Workspace
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, content_id, file_id, read_state
from raytrain.storage.run_files import BATCH_PROFILE, METRICS
from raytrain.tracking import read_metrics
from raytrain.tracking.base import MlflowRun
from raytrain.training.checkpoint_meta import CheckpointMeta
from raytrain.training.run_notes import STOP

if TYPE_CHECKING:
    from raytrain.tracking.mlflow import MlflowTracker

DONE_NOTE = "trial.json"
_REPORTED = ("step", "error", "wer", "bleu", "val_loss")
_STOP_SECONDS = 180


def training_inputs(config: Config, run_dir: Path, files: Mapping[str, str] | None = None) -> list[Any]:
    """An id for everything that training on the artifacts in `run_dir` depends on; `files` replace artifacts there."""
    profile = Path((files or {}).get(BATCH_PROFILE, run_dir / BATCH_PROFILE))
    return [training_key(Workspace(config, run_dir)), file_id(profile)]


class RunningTrial:
    """A training run in a thread, which resumes like any training; a finished one is not repeated.

    `params` holds a `job` (see `TrialJob`) and additional `settings`.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        job = TrialJob.from_json(params["job"])
        settings = {**job.settings, **params["settings"]}
        config, run_dir = with_settings(check_config(job.config), settings), Path(job.run_dir)
        meta = training_meta(Workspace(config, run_dir))
        self.folder = job.folder(settings, meta["ids"]["lineage"])
        self._key = content_id(training_inputs(config, run_dir, job.files))
        self._lines: queue.Queue[Mapping[str, Any] | Exception | None] = queue.Queue()
        self._max_steps = config.train.max_steps
        self._result: dict[str, Any] = {"error": math.inf, "best_error": math.inf, "folder": str(self.folder)}
        self._tracker: MlflowTracker | None = None
        self._status, mlflow = "FINISHED", None
        if self._is_done():
            for line in read_metrics(self.folder / METRICS):
                self._update(line)
            self._lines.put(None)
            return
        if config.tracking.enabled and job.parent_run_id:
            self._tracker, mlflow = _open_run(config, job, self.folder, settings)
        self._status = "KILLED"
        self._thread = threading.Thread(target=self._train, args=(config, meta, mlflow), name="training", daemon=True)
        self._thread.start()

    def next(self) -> dict[str, Any]:
        """The newest validation and the best so far, with `done` set once training is over. Raises what training
        raised."""
        while (line := self._lines.get()) is not None:
            if isinstance(line, Exception):
                self._status = "FAILED"
                raise line
            if self._update(line):
                return {**self._result, "done": False}
        self._finish()
        return {**self._result, "done": True}

    def end(self) -> None:
        """Stop training if it is still running, so that nothing is left of it when the next trial begins."""
        if self._status == "KILLED":
            (self.folder / STOP).touch()
            self._thread.join(timeout=_STOP_SECONDS)
            if self._result.get("step", 0) >= self._max_steps:  # Tune may end the trial before it reports completion
                self._finish()
        if self._tracker is not None:
            self._tracker.close(self._status)

    def _finish(self) -> None:
        if self._status == "KILLED":
            self._status = "FINISHED"
            result = {name: value for name, value in self._result.items() if value != math.inf}
            atomic_write_bytes(self.folder / DONE_NOTE, canonical_json({**result, "key": self._key}))

    def _is_done(self) -> bool:
        note = read_state(self.folder / DONE_NOTE, dict[str, Any])
        return note is not None and note.get("key") == self._key

    def _train(self, config: Config, meta: CheckpointMeta, mlflow: MlflowRun | None) -> None:
        try:
            check_dev_split(Workspace(config, self.folder))
            run_training(TrainingPlan(config, str(self.folder), meta, mlflow), self._lines.put)
            self._lines.put(None)
        except Exception as error:
            self._lines.put(error)

    def _update(self, line: Mapping[str, Any]) -> bool:
        """Process a line of metrics; returns whether it belongs to a validation."""
        if "error" not in line:
            return False
        self._result |= {name: line[name] for name in _REPORTED if name in line}
        self._result["best_error"] = min(self._result["best_error"], line["error"])
        return True


def _open_run(
    config: Config, job: TrialJob, folder: Path, settings: Mapping[str, Any]
) -> tuple[MlflowTracker, MlflowRun | None]:
    """The trial's MLflow run (the same one after a resume), and what training needs to write to it."""
    from raytrain.tracking.mlflow import MlflowTracker

    note = folder / "mlflow_run_id"
    noted_id = note.read_bytes().decode(errors="replace") if note.exists() else None
    name, experiment = job.label or folder.name, config.tracking.experiment
    tracker = MlflowTracker.open(job.tracking_uri, experiment, name, run_id=noted_id, parent_run_id=job.parent_run_id)
    if noted_id is None and tracker.run_id:
        tracker.log_params(settings)
        atomic_write_bytes(note, tracker.run_id.encode())
    run = MlflowRun(job.tracking_uri, experiment, name, tracker.run_id) if tracker.run_id else None
    return tracker, run
