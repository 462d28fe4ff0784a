"""MLflow behind a queue: training never waits for the tracking server and never fails because of it.

One background thread sends what the queue holds. When the server does not answer, it warns once, drops what it
could not send (metrics.jsonl has it all) and tries again half a minute later.

    tracker = MlflowTracker.open(tracking_uri="sqlite:////runs/a/mlflow.db", experiment="raytrain", run_name="a")
    child = MlflowTracker.open(..., run_name="train", parent_run_id=tracker.run_id)
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("raytrain.tracking")
_RETRY_SECONDS = 30.0
_CLOSE_SECONDS = 20.0
_MAX_QUEUED = 10_000
_MAX_BATCH = 500  # metrics in one request; the server takes 1000


class MlflowTracker:
    """One MLflow run. Made by `open`; `run_id` is None where the server was away at that time."""

    def __init__(self, client: Any, run_id: str | None, last_steps: dict[str, int] | None = None) -> None:
        self._client, self.run_id = client, run_id
        self._last_steps = last_steps or {}
        self._queue: queue.Queue = queue.Queue(_MAX_QUEUED)
        self._silent_until = 0.0
        self._warned = False
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        tracking_uri: str,
        experiment: str,
        run_name: str,
        *,
        run_id: str | None = None,
        parent_run_id: str | None = None,
        artifact_location: str | None = None,
    ) -> MlflowTracker:
        """Start a run, or go on with `run_id`; metrics up to the steps already there are not sent again."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        for name in ("alembic", "mlflow", "urllib3"):
            logging.getLogger(name).setLevel(logging.ERROR)
        from mlflow.tracking import MlflowClient

        client, last_steps = None, {}
        try:
            client = MlflowClient(tracking_uri=tracking_uri)
            if run_id is None:
                run_id = _start_run(client, experiment, run_name, parent_run_id, artifact_location)
            else:
                client.update_run(run_id, status="RUNNING")
                for key in client.get_run(run_id).data.metrics:
                    last_steps[key] = max(point.step for point in client.get_metric_history(run_id, key))
        except Exception as error:
            _LOG.warning("MLflow at %s is away (%s); metrics go to metrics.jsonl only", tracking_uri, _short(error))
            client = None
        return cls(client, run_id if client else None, last_steps)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Flat settings; values are cut at MLflow's limit."""
        from mlflow.entities import Param

        entries = [Param(str(key), str(value)[:500]) for key, value in params.items()]
        for start in range(0, len(entries), 100):
            part = entries[start : start + 100]
            self._put(lambda part=part: self._client.log_batch(self.run_id, params=part))

    def log_metrics(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Numbers by step; WER also by wall time, as `wer_by_second`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [
            Metric(key, float(value), now, step)
            for key, value in metrics.items()
            if step > self._last_steps.get(key, -1)
        ]
        if "wer" in metrics and step > self._last_steps.get("wer", -1):
            points.append(Metric("wer_by_second", float(metrics["wer"]), now, int(seconds)))
        self._put(points)

    def log_artifact(self, path: Path) -> None:
        """Copy a file to the run's artefacts."""
        self._put(lambda: self._client.log_artifact(self.run_id, str(path)))

    def close(self, status: str = "FINISHED") -> None:
        """Send what is queued, for at most 20 s, and end the run."""
        self._put(lambda: self._client.set_terminated(self.run_id, status))
        self._put(None)
        self._thread.join(_CLOSE_SECONDS)

    def _put(self, item: list | Callable | None) -> None:
        if self._client is None and item is not None:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._warn("its queue is full")

    def _send(self) -> None:
        ended = False
        while not ended:
            points: list = []
            item = self._queue.get()
            # Take all metrics that wait into one request; anything else keeps its place in the order.
            while isinstance(item, list):
                points += item
                full = len(points) >= _MAX_BATCH
                item = _NOTHING if full or self._queue.empty() else self._queue.get()
            if points:
                self._try(lambda points=points: self._client.log_batch(self.run_id, metrics=points))
            if item is None:
                ended = True
            elif item is not _NOTHING:
                self._try(item)

    def _try(self, call: Callable[[], Any]) -> None:
        if time.monotonic() < self._silent_until:
            return
        try:
            call()
        except Exception as error:
            self._silent_until = time.monotonic() + _RETRY_SECONDS
            self._warn(_short(error))

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning("MLflow does not answer (%s); metrics.jsonl keeps everything", why)


_NOTHING = object()


def _start_run(client: Any, experiment: str, run_name: str, parent: str | None, location: str | None) -> str:
    found = client.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else client.create_experiment(experiment, location)
    tags = {"mlflow.parentRunId": parent} if parent else {}
    return client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]
