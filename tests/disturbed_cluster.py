"""Runs one pipeline on three nodes, each with a cache of its own, and disturbs it (see test_cluster.py).

    python disturbed_cluster.py calm|disturbed CONFIG FOLDER

The last line of its output is JSON: what was done, how often the driver was started, the steps that MLflow has.
"""

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
from pathlib import Path

from raytrain.data.storage import list_files

NAME, CONFIG, FOLDER = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
        for one in pair:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


class TrackingServer:
    def __init__(self, folder: Path) -> None:
        self._folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
                   "--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}",
                   "--artifacts-destination", (self._folder / "served").as_uri()]  # fmt: skip
        with open(self._folder / "mlflow.log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, start_new_session=True)
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(
                    f"{self.uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default", timeout=60
                ).close()
                return
            time.sleep(0.5)
        raise TimeoutError("mlflow server")

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(20)

    def steps(self, experiment: str) -> list[int]:
        """Steps of which the training run has the loss."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        found = client.get_experiment_by_name(experiment)
        runs = [run for run in client.search_runs([found.experiment_id]) if run.info.run_name == "train"]
        assert len(runs) == 1, "training has one run, also after restarts"
        return sorted(point.step for point in client.get_metric_history(runs[0].info.run_id, "loss"))


def node_arguments(name: str, endpoint: str) -> dict:
    """A node that has a cache of its own: nodes see of each other's files what is in S3."""
    own = {"RAYTRAIN_CACHE": str(FOLDER / f"cache-{name}"), "AWS_ENDPOINT_URL": endpoint}
    return {"num_cpus": 1, "env_vars": own}


def wait_for(condition, what: str, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(what)
        time.sleep(0.05)


def main() -> None:
    from ray.cluster_utils import Cluster

    FOLDER.mkdir(parents=True)
    real = os.environ["AWS_ENDPOINT_URL"]
    door = Door(int(real.rpartition(":")[2]))
    os.environ.update(
        RAY_memory_monitor_refresh_ms="0", RAY_TRAIN_V2_ENABLED="1", RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="15"
    )
    tracking = TrackingServer(FOLDER)
    config = json.loads(CONFIG.read_text())
    config["tracking"]["uri"] = tracking.uri
    CONFIG.write_text(json.dumps(config))
    place = f"{config['run']['root']}/{config['name']}"
    endpoint = f"http://127.0.0.1:{door.port}"  # this process looks past it
    head = {"include_dashboard": False, **node_arguments("head", endpoint)}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(**node_arguments(name, endpoint)) for name in ("one", "two")]
    attempts, done = 0, []

    def start_driver() -> subprocess.Popen:
        nonlocal attempts
        attempts += 1
        cache = str(FOLDER / f"driver-{attempts}")  # each time it starts on another machine
        environment = {**os.environ, "AWS_ENDPOINT_URL": endpoint, "RAY_ADDRESS": cluster.address,
                       "RAYTRAIN_CACHE": cache}  # fmt: skip
        with open(FOLDER / f"driver-{attempts}.log", "wb") as log:
            command = [sys.executable, "-m", "raytrain", "run", "--config", str(CONFIG)]
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def kill_driver(driver: subprocess.Popen) -> subprocess.Popen:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait(20)
        return start_driver()

    def notes() -> int:
        return len(list_files(f"{place}/assignment/parts", missing_ok=True))

    def checkpoints() -> int:
        found = list_files(f"{place}/checkpoints", "meta.json", recursive=True, missing_ok=True)
        return max((int(one.split("/")[-2].removeprefix("step_")) for one in found), default=0)

    def refuse_for(seconds: float) -> None:
        door.shut()
        time.sleep(seconds)
        door.open()

    def disturb(driver: subprocess.Popen) -> subprocess.Popen:
        wait_for(lambda: notes() >= 2, "assignment began")
        refusal = threading.Thread(target=refuse_for, args=(20.0,))
        refusal.start()
        done.append("assign: S3 refuses")
        time.sleep(3)
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        done.append("assign: node lost")
        refusal.join()
        seen = notes()
        wait_for(lambda: notes() > seen, "assignment went on")
        driver = kill_driver(driver)
        done.append("assign: driver killed")
        nodes.append(cluster.add_node(**node_arguments("three", endpoint)))
        wait_for(lambda: checkpoints() >= 10, "training began")
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        done.append("train: node lost")
        seen = checkpoints()
        wait_for(lambda: checkpoints() > seen, "training went on")
        refuse_for(20.0)
        done.append("train: S3 refuses")
        tracking.stop()
        time.sleep(3)
        tracking.start()
        done.append("train: tracking restarted")
        driver = kill_driver(driver)
        done.append("train: driver killed")
        return driver

    driver = start_driver()
    try:
        if NAME == "disturbed":
            driver = disturb(driver)
        code = driver.wait(400)
        if code:
            raise SystemExit((FOLDER / f"driver-{attempts}.log").read_text())
        print(json.dumps({"done": done, "attempts": attempts, "tracked_steps": tracking.steps(NAME)}))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        tracking.stop()
        cluster.shutdown()


if __name__ == "__main__":
    main()
