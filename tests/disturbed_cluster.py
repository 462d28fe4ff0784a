"""A pipeline on nodes that share nothing but S3 and a tracking server, and what disturbs it (see test_cluster.py)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from conftest import Nodes, free_port, wait_for

from raytrain.storage.filesystem import list_files

AWAY_SECONDS = 6.0


class Door:
    """A port on 127.0.0.1 that leads to another one, and that can be shut: connections end, new ones are refused."""

    def __init__(self, port: int) -> None:
        self._target, self.port = port, free_port()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self.open()

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        # A thread that waits in accept() keeps the port until it is woken.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._end(pair)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # shut
            threading.Thread(target=self._lead, args=(client,), daemon=True).start()

    def _lead(self, client: socket.socket) -> None:
        pair = (client, socket.create_connection(("127.0.0.1", self._target)))
        with self._lock:
            self._pairs.add(pair)
        back = threading.Thread(target=self._copy, args=pair[::-1], daemon=True)
        back.start()
        self._copy(*pair)
        back.join()
        self._end(pair)

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _end(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            self._pairs.discard(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def shut_for(self, seconds: float) -> None:
        self.shut()
        time.sleep(seconds)
        self.open()


@contextlib.contextmanager
def tracking_server(folder: Path) -> Iterator[int]:
    """Port of an MLflow server on 127.0.0.1, which is ready."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        (folder / "served").as_uri(),
    ]
    experiment = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"

    def answers() -> bool:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(experiment, timeout=60).close()
            return True
        return False

    with open(folder / "mlflow.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        wait_for(answers, "mlflow server", 120, every=0.5)
        yield port
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Kill a process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


def tracked_steps(port: int, experiment: str) -> list[int]:
    """Steps of which the one training run of an experiment has the loss."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
    ids = [client.get_experiment_by_name(experiment).experiment_id]
    (train,) = (run for run in client.search_runs(ids) if run.info.run_name == "train")  # one, also after restarts
    return sorted(point.step for point in client.get_metric_history(train.info.run_id, "loss"))


class Disturbed:
    """Runs `raytrain run` on two added nodes, ends nodes and drivers and shuts doors on the way; `done` says what."""

    def __init__(self, values: dict[str, Any], folder: Path, nodes: Nodes, store: Door, tracking: Door) -> None:
        """`values` are the run's configuration; `store` leads to its S3, which this process reaches past it, and
        `tracking` to its tracking server. `folder` is for logs and caches."""
        self._folder, self._nodes, self._store, self._tracking = folder, nodes, store, tracking
        self._run_dir = f"{values['run']['root']}/{values['name']}"
        self._endpoint = f"http://127.0.0.1:{store.port}"
        self._config = folder / "config.json"
        self._config.write_text(json.dumps(values))
        self._left = [self._add_node(name) for name in ("one", "two")]
        self.attempts, self.done = 0, []
        self._driver = self._start_driver()

    def run(self) -> None:
        """Disturb it in both stages, then wait for its end."""
        try:
            self._disturb_assignment()
            self._disturb_training()
            code = self._driver.wait(300)
            assert code == 0, (self._folder / f"driver-{self.attempts}.log").read_text()[-5000:]
        finally:
            end(self._driver)

    def _disturb_assignment(self) -> None:
        self._wait_for(lambda: self._notes() >= 2, "assignment began")
        refusal = threading.Thread(target=self._store.shut_for, args=(AWAY_SECONDS,))
        refusal.start()
        self.done.append("assign: S3 refuses")
        time.sleep(AWAY_SECONDS / 3)
        self._nodes.lose(self._left.pop())
        self.done.append("assign: node lost")
        refusal.join()
        seen = self._notes()
        self._wait_for(lambda: self._notes() > seen, "assignment resumed")
        self._kill_driver()
        self.done.append("assign: driver killed")

    def _disturb_training(self) -> None:
        self._left.append(self._add_node("three"))
        self._wait_for(lambda: self._checkpoint() > 0, "training began")
        self._nodes.lose(self._left.pop())
        self.done.append("train: node lost")
        seen = self._checkpoint()
        self._wait_for(lambda: self._checkpoint() > seen, "training resumed")
        self._store.shut_for(AWAY_SECONDS)
        self.done.append("train: S3 refuses")
        self._tracking.shut_for(AWAY_SECONDS / 2)
        self.done.append("train: tracking refuses")
        self._kill_driver()
        self.done.append("train: driver killed")

    def _add_node(self, name: str) -> Any:
        """A node with its own cache: nodes see only those of each other's files that are in S3."""
        apart = {"RAYTRAIN_CACHE": str(self._folder / f"cache-{name}"), "AWS_ENDPOINT_URL": self._endpoint}
        return self._nodes.add(num_cpus=1, resources={"apart": 2}, env_vars=apart)

    def _start_driver(self) -> subprocess.Popen:
        self.attempts += 1
        cache = self._folder / f"driver-{self.attempts}"  # each time it starts on another machine
        environment = {
            **os.environ,
            **self._nodes.environment,
            "AWS_ENDPOINT_URL": self._endpoint,
            "RAYTRAIN_CACHE": str(cache),
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
        }
        with open(self._folder / f"driver-{self.attempts}.log", "wb") as log:
            command = [sys.executable, "-m", "raytrain", "run", "--config", str(self._config)]
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def _kill_driver(self) -> None:
        assert self._driver.poll() is None, "it ended too early to be disturbed"
        end(self._driver)
        # Ray keeps what an elastic training has asked for until three minutes after its driver's death.
        with contextlib.suppress(ValueError):  # no request yet
            ray.kill(ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator"))
        self._driver = self._start_driver()

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        wait_for(lambda: condition() or self._driver.poll() is not None, what, every=0.3)
        assert self._driver.poll() is None, f"the driver ended before {what}"

    def _notes(self) -> int:
        return len(list_files(f"{self._run_dir}/assignment/parts", missing_ok=True))

    def _checkpoint(self) -> int:
        """Step of the newest checkpoint, 0 where there is none."""
        files = list_files(f"{self._run_dir}/checkpoints", "meta.json", recursive=True, missing_ok=True)
        return max((int(name.split("/")[-2].removeprefix("step_")) for name in files), default=0)
