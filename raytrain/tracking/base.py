"""The tracker protocol, and trackers that drop everything, write JSON lines, or forward to several trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raytrain.storage.artifacts import is_count, is_number, lines_of, make_folder, storage_error

Line = dict[str, Any]  # `step`, `time_s`, and metrics by name; a loss may be NaN or None


@dataclass(frozen=True)
class MlflowRun:
    """A run on an MLflow server that another process will write to; see `MlflowTracker.open`."""

    tracking_uri: str
    experiment: str
    run_name: str
    run_id: str
    system_metrics: bool = False


class Tracker(Protocol):
    """Receives a run's metrics and files. No method raises because a server is unavailable."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log settings, once."""

    def log_metrics(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Log metrics at an optimizer step and a training time."""

    def log_artifact(self, path: Path) -> None:
        """Log a file worth keeping with the run."""

    def close(self, status: str = "FINISHED") -> None:
        """Write what is still pending; `status` is FINISHED or FAILED."""


class NullTracker:
    """Drops everything."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Drop them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Drop them."""

    def log_artifact(self, path: Path) -> None:
        """Drop it."""

    def close(self, status: str = "FINISHED") -> None:
        """Nothing to close."""


class JsonLinesTracker(NullTracker):
    """Appends one JSON object per call: `step`, `time_s`, and the metrics. Flushed at once."""

    def __init__(self, path: Path) -> None:
        make_folder(Path(path).parent)
        try:
            self._file = open(path, "ab")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise storage_error(path, error) from error
        self._path = path

    def log_metrics(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Append one line. Raises `StorageError` if the disk is full."""
        line = {"step": step, "time_s": round(seconds, 3), **metrics}
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise storage_error(self._path, error) from error

    def close(self, status: str = "FINISHED") -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Line]:
    """The complete lines of a `JsonLinesTracker`, each with `step` and metrics; [] if there is no file.

    Partial or damaged lines, left by a killed writer or a bad disk, are skipped.
    """
    return [line for line in map(metrics_of, lines_of(path)) if line is not None]


def metrics_of(line: bytes) -> Line | None:
    """One line of a `JsonLinesTracker`, or None if it is not valid."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not is_count(values.get("step")) or not is_number(values.get("time_s", 0.0)):
        return None
    # A loss may be NaN.
    return values if all(isinstance(value, int | float | None) for value in values.values()) else None


class MultiTracker:
    """Forwards everything to several trackers in order."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = trackers

    def log_params(self, params: Mapping[str, object]) -> None:
        """Tell all."""
        for tracker in self.trackers:
            tracker.log_params(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Tell all."""
        for tracker in self.trackers:
            tracker.log_metrics(metrics, step, seconds)

    def log_artifact(self, path: Path) -> None:
        """Tell all."""
        for tracker in self.trackers:
            tracker.log_artifact(path)

    def close(self, status: str = "FINISHED") -> None:
        """Close all."""
        for tracker in self.trackers:
            tracker.close(status)
