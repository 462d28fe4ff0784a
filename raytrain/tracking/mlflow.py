"""MLflow behind a queue: training never waits for the tracking server and never fails because of it.

One background thread sends the queue's entries. When the server does not answer, it warns once, keeps unsent entries
and retries, including opening the run; only entries that do not fit in a full queue are lost (metrics.jsonl has
everything). If the server or the disk refuses an entry (a missing artifact, a changed parameter), only that entry is
lost.

    tracker = MlflowTracker.open(tracking_uri="sqlite:////runs/a/mlflow.db", experiment="raytrain", run_name="a")
    child = MlflowTracker.open(..., run_name="train", parent_run_id=tracker.run_id)
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import numbers
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from raytrain.errors import first_line
from raytrain.redaction import redacted, with_credentials

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient


_LOG = logging.getLogger("raytrain.tracking")
_RETRY_SECONDS = 30.0
_SYSTEM_SECONDS = 10.0
_CLOSE_SECONDS = 20.0
_LAST_TRIES_SECONDS = 8.0  # of those, spent on an unavailable server
_MAX_QUEUED = 10_000
_MAX_BATCH = 500  # metrics in one request; the server takes 1000
_UNAVAILABLE = "MLflow is unavailable (%s); metrics.jsonl keeps everything"
_DAMAGED = "MLflow's database is damaged (%s); move it away to have a new one created; metrics.jsonl keeps everything"
# The server answered with a refusal: the next entry may succeed.
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}


@dataclass(frozen=True)
class _End:
    status: str


# Metrics (which may share a request), a call, or the end marker.
_Item: TypeAlias = "list[Metric] | Callable[[], object] | _End | None"


class MlflowTracker:
    """One MLflow run, created by `open`; `run_id` is None if the server was unavailable at that time."""

    def __init__(self, connect: Callable[[], tuple[MlflowClient, str, dict[str, int]]], patience: float = 0.0) -> None:
        """`connect` returns the client, the run id and the last step of each metric; if it raises it is retried, for up
        to `patience` seconds before this returns."""
        self._connect = connect
        self._client: Any = None  # an `MlflowClient` once the run is open
        self.run_id: str | None = None
        self._last_steps: dict[str, int] = {}
        self._queue: queue.Queue[_Item] = queue.Queue(_MAX_QUEUED)
        self._give_up_at = time.monotonic() + patience
        self._given_up = False
        self._warned: set[str] = set()
        self._closed = threading.Event()
        self._insist(lambda: None)  # opens the run now, so that children can refer to it
        self._give_up_at = math.inf
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
        system_metrics: bool = False,
        patience: float = 0.0,
    ) -> MlflowTracker:
        """Start a run, or resume `run_id` if the server has it; metrics up to the steps already there are not sent
        again. With `system_metrics`, also log this machine's CPU, memory, disk, network and GPU load every ten seconds.
        A server that does not answer is retried for `patience` seconds; after that the run is opened in the
        background."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        for name in ("alembic", "mlflow", "urllib3"):
            logging.getLogger(name).setLevel(logging.ERROR)

        def connect() -> tuple[MlflowClient, str, dict[str, int]]:
            from mlflow.tracking import MlflowClient

            client = MlflowClient(tracking_uri=with_credentials(tracking_uri))
            if run_id is None or not _is_resumed(client, run_id):
                return client, _start_run(client, experiment, run_name, parent_run_id, artifact_location), {}
            return client, run_id, _last_steps(client, run_id)

        tracker = cls(connect, patience)
        if system_metrics:
            tracker._watch_system(tracking_uri)
        return tracker

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log flat settings, with secrets redacted; values are truncated to MLflow's limit."""
        from mlflow.entities import Param

        entries = [Param(str(key), redacted(str(value))[:500]) for key, value in params.items()]
        for start in range(0, len(entries), 100):
            part = entries[start : start + 100]
            self._put(functools.partial(self._send_batch, params=part))

    def log_metrics(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Log metrics by step; WER also by wall time, as `wer_by_second`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # A None would raise here, in the training loop, and MLflow can't store it.
        new = {
            key: float(value)
            for key, value in metrics.items()
            if isinstance(value, numbers.Real) and step > self._last_steps.get(key, -1)
        }
        points = [Metric(key, value, now, step) for key, value in new.items()]
        if "wer" in new:
            points.append(Metric("wer_by_second", new["wer"], now, int(seconds)))
        self._put(points)

    def catch_up(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Log the metrics in `metrics.jsonl` that the run lacks: a killed process may not have sent everything."""
        if self._client is None:
            return
        for line in lines:
            metrics = {key: value for key, value in line.items() if key not in ("step", "time_s")}
            if any(line["step"] > self._last_steps.get(key, -1) for key in metrics):
                self.log_metrics(metrics, line["step"], line.get("time_s", 0.0))

    def log_artifact(self, path: Path) -> None:
        """Copy a file to the run's artifacts."""
        self._put(lambda: self._client.log_artifact(self.run_id, str(path)))

    def _watch_system(self, tracking_uri: str) -> None:
        """MLflow's own monitor would stop at the first failed request, so its readings go through the queue."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self.run_id, tracking_uri=with_credentials(tracking_uri))
        first = max((step for key, step in self._last_steps.items() if key.startswith("system/")), default=-1) + 1

        def watch() -> None:
            for number in itertools.count(first):
                if self._closed.wait(_SYSTEM_SECONDS):
                    return
                monitor.collect_metrics()
                metrics = {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
                for sensor in monitor.monitors:
                    sensor.clear_metrics()
                self.log_metrics(metrics, number, 0.0)

        threading.Thread(target=watch, name="system metrics", daemon=True).start()

    def close(self, status: str = "FINISHED") -> None:
        """Send what is queued, for at most 20 s, and end the run."""
        self._give_up_at = time.monotonic() + _LAST_TRIES_SECONDS
        self._closed.set()
        until = time.monotonic() + _CLOSE_SECONDS
        try:
            self._queue.put(_End(status), timeout=_CLOSE_SECONDS)
        except queue.Full:
            self._warn("its queue is full")
        self._thread.join(max(0.0, until - time.monotonic()))

    def _put(self, item: _Item) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._warn("its queue is full")

    def _send(self) -> None:
        ended = False
        while not ended:
            points: list[Metric] = []
            item = self._queue.get()
            # Combine all pending metrics into one request; other entries keep their order.
            while isinstance(item, list):
                points += item
                full = len(points) >= _MAX_BATCH
                item = None if full or self._queue.empty() else self._queue.get()
            if points:
                # If a response was lost and a point is sent twice, MLflow treats it as the same point.
                self._insist(functools.partial(self._send_batch, metrics=points))
            if isinstance(item, _End):
                ended = True
                self._insist(functools.partial(self._end_run, item.status))
            elif item is not None:
                self._insist(item)

    def _send_batch(self, **entries: Sequence[Metric | Param]) -> None:
        self._client.log_batch(self.run_id, **entries)

    def _end_run(self, status: str) -> None:
        self._client.set_terminated(self.run_id, status)

    def _insist(self, call: Callable[[], object]) -> None:
        """Call until the server accepts or refuses, or until time runs out; at the end, also give up on all later
        entries."""
        wait = 0.5
        while not self._given_up and not self._try(call):
            if time.monotonic() > self._give_up_at:
                self._given_up = self._closed.is_set()
                return
            time.sleep(0.5) if self._closed.is_set() else self._closed.wait(wait)
            wait = min(2 * wait, _RETRY_SECONDS)

    def _try(self, call: Callable[[], object]) -> bool:
        """Whether the server answered, by accepting or refusing."""
        try:
            if self._client is None:
                self._client, self.run_id, self._last_steps = self._connect()
            call()
        except Exception as error:
            refused = isinstance(error, FileNotFoundError) or getattr(error, "error_code", "") in _REFUSALS
            if refused and self._client is not None:
                self._warn(_short(error), "MLflow refused an entry (%s)")
                return True
            if (damage := _damage(error)) is not None:
                self._warn(_short(damage), _DAMAGED)
                self._given_up = True  # retrying would not help
                return False
            self._warn(_short(error))
            return False
        return True

    def _warn(self, why: str, text: str = _UNAVAILABLE) -> None:
        if text not in self._warned:
            self._warned.add(text)
            _LOG.warning(text, why)


def _damage(error: BaseException | None) -> sqlite3.DatabaseError | None:
    """SQLite's message about a damaged file or one that is not a database; None for any other error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        original = getattr(error, "orig", None)  # SQLAlchemy's errors wrap the database's
        for candidate in (error, original):
            # An OperationalError may be temporary: a lock, a full disk.
            if type(candidate) is sqlite3.DatabaseError:
                return candidate
        error = error.__cause__ or error.__context__
    return None


def _is_resumed(client: MlflowClient, run_id: str) -> bool:
    """Whether a run is on the server and was set to running again; false after the database was moved away."""
    from mlflow.exceptions import MlflowException

    try:
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def _last_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    keys = client.get_run(run_id).data.metrics
    return {key: max(point.step for point in client.get_metric_history(run_id, key)) for key in keys}


def _start_run(client: MlflowClient, experiment: str, run_name: str, parent: str | None, location: str | None) -> str:
    existing = client.get_experiment_by_name(experiment)
    # Otherwise the UI opens in its chat application view, without the list of runs.
    kind = {"mlflow.experimentKind": "custom_model_development"}
    experiment_id = existing.experiment_id if existing else client.create_experiment(experiment, location, tags=kind)
    tags = {"mlflow.parentRunId": parent} if parent else {}
    return client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id


def _short(error: Exception) -> str:
    return redacted(first_line(error))[:160]
