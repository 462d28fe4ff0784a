"""The run's `metrics.jsonl`: written by training's rank 0, truncated to the checkpoint that training resumes from, and
followed by the driver."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytrain.errors import RaytrainError
from raytrain.storage.artifacts import atomic_write_bytes, lines_of
from raytrain.storage.run_files import METRICS
from raytrain.storage.run_store import RunStore
from raytrain.tracking.base import JsonLinesTracker, MlflowRun, MultiTracker, Tracker, metrics_of, read_metrics
from raytrain.waiting import repeating

Log = Callable[[Mapping[str, float], int, float], None]
_FOLLOW_SECONDS, _FOLLOW_REMOTE_SECONDS = 0.5, 3.0


@contextlib.contextmanager
def metrics_log(store: RunStore, step: int, mlflow: MlflowRun | None) -> Iterator[Log]:
    """A function that logs metrics, a step and seconds of training to the run's metrics file, starting at `step`, and
    to an MLflow run, if there is one."""
    path = store.growing_file(METRICS)
    if store.is_remote:
        path.unlink(missing_ok=True)
        if (shared := store.refresh(METRICS)).exists():
            atomic_write_bytes(path, shared.read_bytes())
    keep_metrics_until(path, step)
    trackers: list[Tracker] = [JsonLinesTracker(path)]
    if mlflow:
        from raytrain.tracking.mlflow import MlflowTracker  # importing it takes seconds

        server = MlflowTracker.open(**asdict(mlflow))
        trackers.append(server)
        if path.exists():
            server.catch_up(read_metrics(path))
    tracker = MultiTracker(*trackers)
    with store.sharing(METRICS, path):
        try:
            yield tracker.log_metrics
        finally:
            tracker.close()


@contextlib.contextmanager
def no_log() -> Iterator[Log]:
    """A function that logs nothing."""
    yield lambda metrics, step, seconds: None


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop lines after the step that training resumes from; they will be written again."""
    if not path.exists():
        return
    kept = []
    for line in lines_of(path):
        metrics = metrics_of(line)  # a killed writer may leave a partial line
        if metrics is not None and metrics["step"] <= step:
            kept.append(line)
    atomic_write_bytes(path, b"".join(kept))


@contextlib.contextmanager
def follow_metrics(store: RunStore, on_metrics: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `on_metrics` for each new line of the run's metrics while the body runs."""
    last = (-1, False)  # a step's validation follows its other metrics

    def read() -> None:
        nonlocal last
        path = store.local / METRICS
        with contextlib.suppress(RaytrainError):  # the next call may succeed
            path = store.refresh(METRICS)
        for line in lines_of(path):
            metrics = metrics_of(line)
            if metrics is None:
                continue
            position = (metrics["step"], "val_loss" in metrics)
            if position > last:
                on_metrics(metrics)
                last = position

    with repeating(read, _FOLLOW_REMOTE_SECONDS if store.is_remote else _FOLLOW_SECONDS):
        yield
