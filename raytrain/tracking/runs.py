"""MLflow for a pipeline: one parent run and a child run per stage; nothing is read back from it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from raytrain.config import Config
from raytrain.redaction import MLFLOW_VARIABLE, without_credentials
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, read_state
from raytrain.storage.run_files import MLFLOW_RUN
from raytrain.tracking import NullTracker, Tracker
from raytrain.tracking.base import MlflowRun

if TYPE_CHECKING:
    from raytrain.tracking.mlflow import MlflowTracker

_PATIENCE_SECONDS = 60.0


def tracking_uri(config: Config, run_dir: Path) -> str:
    """The configured server, or an absolute SQLite URI, since workers have different working directories.

    Credentials are removed because the URI is written to files; `MlflowTracker` finds them in the environment.
    """
    return _server(config) or f"sqlite:///{run_dir / 'mlflow.db'}"


def _server(config: Config) -> str:
    return config.tracking.uri or without_credentials(os.environ.get(MLFLOW_VARIABLE, ""))


@dataclass(frozen=True)
class RunNote:
    """The body of `mlflow_run.json`: the server, the run's id there, and those of its stages."""

    uri: str
    run_id: str
    stages: dict[str, str] = field(default_factory=dict)


class RunTracking:
    """Opens the parent run when the first stage runs, so that a run with nothing to do leaves no trace."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir
        self._parent: MlflowTracker | None = None
        self.current: Tracker = NullTracker()
        self._child_id: str | None = None
        self._status = "FINISHED"

    def __enter__(self) -> RunTracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._parent is not None:
            self._parent.close("FAILED" if kind else "FINISHED")

    @contextlib.contextmanager
    def stage(self, name: str, resumes: bool = False) -> Iterator[None]:
        """Context with a child run for a stage, reusing the previous run if it `resumes`; FAILED if the body raises."""
        if not self._config.tracking.enabled:
            yield
            return
        if self._parent is None:
            self._parent = self._open_parent()
        note = self._note()
        earlier = note.stages.get(name) if note and resumes else None
        child = self._open(name, self._parent.run_id, run_id=earlier)
        if child.run_id:
            note = self._note()
            if note is not None:
                self._write_note(replace(note, stages={**note.stages, name: child.run_id}))
        self.current, self._child_id = child, child.run_id
        status = "FAILED"
        try:
            yield
            status = "FINISHED"
        finally:
            child.close(status)
            self.current, self._child_id = NullTracker(), None

    @property
    def child_id(self) -> str | None:
        """The current stage's run, or None without tracking."""
        return self._child_id

    @contextlib.contextmanager
    def trial(self, name: str) -> Iterator[Tracker]:
        """A child run of the stage's run, for one of its trials."""
        if self._child_id is None:
            yield NullTracker()
            return
        tracker = self._open(name, self._child_id)
        try:
            yield tracker
        finally:
            tracker.close()

    def training_run(self) -> MlflowRun | None:
        """The current child run, for rank 0 to write to; None without tracking."""
        if self._child_id is None:
            return None
        uri, experiment = tracking_uri(self._config, self._run_dir), self._config.tracking.experiment
        return MlflowRun(uri, experiment, "train", self._child_id, system_metrics=True)

    def _open_parent(self) -> MlflowTracker:
        note = self._note()
        earlier = note.run_id if note else None
        parent = self._open(self._config.name, None, run_id=earlier)
        if parent.run_id and parent.run_id != earlier:
            self._write_note(RunNote(tracking_uri(self._config, self._run_dir), parent.run_id))
            parent.log_params(_flat(self._config.model_dump(mode="json")))
        return parent

    def _note(self) -> RunNote | None:
        """Ids of this run folder's runs on the configured server, used to resume them."""
        values = read_state(self._run_dir / MLFLOW_RUN, RunNote)
        if not values or values["uri"] != tracking_uri(self._config, self._run_dir):
            return None
        return RunNote(values["uri"], values["run_id"], values.get("stages", {}))

    def _write_note(self, note: RunNote) -> None:
        values = asdict(note)
        if not note.stages:
            del values["stages"]
        atomic_write_bytes(self._run_dir / MLFLOW_RUN, canonical_json(values))

    def _open(self, name: str, parent: str | None, run_id: str | None = None) -> MlflowTracker:
        from raytrain.tracking.mlflow import MlflowTracker

        location = None if _server(self._config) else (self._run_dir / "mlartifacts").as_uri()
        return MlflowTracker.open(
            tracking_uri(self._config, self._run_dir),
            self._config.tracking.experiment,
            name,
            run_id=run_id,
            parent_run_id=parent,
            artifact_location=location,
            # A server that already has these runs is expected to recover.
            patience=_PATIENCE_SECONDS if run_id or parent else 0.0,
        )


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
