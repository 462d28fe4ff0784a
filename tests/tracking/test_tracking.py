"""Tracking: JSON lines, a real MLflow store, and a server that is not there."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import free_port, wait_for

from raytrain.errors import StorageError
from raytrain.tracking import JsonLinesTracker, MultiTracker
from raytrain.tracking.metrics_file import keep_metrics_until
from raytrain.tracking.mlflow import MlflowTracker


def test_json_lines_and_cutting_back_to_a_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    tracker = MultiTracker(JsonLinesTracker(path))
    for step in range(1, 6):
        tracker.log_metrics({"loss": 1 / step}, step, step * 2.0)
    tracker.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 6, "lo')  # a writer that was killed
    keep_metrics_until(path, 3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1] == {"step": 2, "time_s": 4.0, "loss": 0.5}


def test_the_machines_load_goes_to_the_same_store_and_goes_on_after_a_restart(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr("raytrain.tracking.mlflow._SYSTEM_SECONDS", 0.2)
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    (tmp_path / "store").mkdir()
    common = {"tracking_uri": uri, "experiment": "e", "run_name": "train", "system_metrics": True}
    client, run_id, steps = MlflowClient(tracking_uri=uri), None, []

    def sent() -> list[int]:
        return sorted(point.step for point in client.get_metric_history(run_id, "system/cpu_utilization_percentage"))

    for _ in range(2):
        tracker = MlflowTracker.open(run_id=run_id, **common)
        run_id, before = tracker.run_id, len(steps)
        wait_for(lambda before=before: len(sent()) > before, "the machine's load", every=0.2)
        tracker.close()
        steps = sent()
        assert steps == list(range(len(steps)))
    assert not (tmp_path / "mlflow.db").exists()  # MLflow's own default


def test_runs_in_a_real_store(tmp_path):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    common = {"tracking_uri": uri, "experiment": "e", "artifact_location": (tmp_path / "art").as_uri()}
    parent = MlflowTracker.open(run_name="parent", **common)
    parent.log_params({f"p{i}": "v" * 600 for i in range(150)})
    child = MlflowTracker.open(run_name="train", parent_run_id=parent.run_id, **common)
    for step in range(1, 50):
        child.log_metrics({"loss": 1 / step}, step, step * 1.0)
    child.log_metrics({"wer": 0.25}, 49, 33.4)
    (tmp_path / "a.json").write_text("{}")
    child.log_artifact(tmp_path / "a.json")
    child.close()
    # A restarted worker sends steps again; the store must have each once.
    again = MlflowTracker.open(run_name="train", run_id=child.run_id, **common)
    again.log_metrics({"loss": 9.0}, 49, 1.0)
    again.catch_up([{"step": step, "time_s": 1.0, "loss": 1 / step, "lr": 0.1} for step in (48, 49)])
    again.log_metrics({"loss": 0.5}, 50, 1.0)
    again.close()
    parent.close("FAILED")
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(child.run_id)
    history = client.get_metric_history(child.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(1, 51))
    assert [point.step for point in client.get_metric_history(child.run_id, "lr")] == [48, 49]  # had not been sent
    assert run.data.metrics["loss"] == 0.5 and run.info.status == "FINISHED"
    assert [(p.step, p.value) for p in client.get_metric_history(child.run_id, "wer_by_second")] == [(33, 0.25)]
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert [item.path for item in client.list_artifacts(child.run_id)] == ["a.json"]
    assert client.get_run(parent.run_id).info.status == "FAILED"
    assert len(client.get_run(parent.run_id).data.params) == 150


def test_a_server_that_is_down_warns_and_stops_nothing(caplog, monkeypatch):
    monkeypatch.setattr("raytrain.tracking.mlflow._LAST_TRIES_SECONDS", 0.5)
    port = free_port()
    start = time.monotonic()
    tracker = MlflowTracker.open(f"http://127.0.0.1:{port}", "e", "r")
    for step in range(100):
        tracker.log_metrics({"loss": 1.0}, step, 0.0)
    tracker.log_params({"a": 1})
    tracker.close()
    assert time.monotonic() - start < 20
    assert tracker.run_id is None
    assert "is unavailable" in caplog.text and caplog.text.count("WARNING") == 1


@pytest.mark.parametrize("status", ["FINISHED"])
def test_closing_an_idle_run_is_quick(tmp_path, status):
    tracker = MlflowTracker.open(f"sqlite:///{tmp_path / 'm.db'}", "e", "r")
    start = time.monotonic()
    tracker.close(status)
    assert time.monotonic() - start < 10


@pytest.fixture
def store(tmp_path: Path) -> dict[str, str]:
    """Arguments of `open` for a SQLite store in the test's folder."""
    return {
        "tracking_uri": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "experiment": "raytrain",
        "artifact_location": (tmp_path / "mlartifacts").as_uri(),
    }


def _client(store: dict[str, str]):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=store["tracking_uri"])


def test_json_lines_name_an_unwritable_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        JsonLinesTracker(tmp_path / "file" / "metrics.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error() -> None:
    with pytest.raises(StorageError):
        JsonLinesTracker(Path("/dev/full")).log_metrics({"loss": 1.0}, 1, 0.0)


@pytest.mark.slow
def test_a_real_server_gets_it_all(tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"]
    command += ["--artifacts-destination", (tmp_path / "served").as_uri()]
    with open(tmp_path / "server.log", "wb") as log:
        # A separate session: the server starts workers, and all of them must end with it.
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    try:
        # /health answers before the store is ready; the first lookup is slow.
        _wait_for(f"{uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default", server)
        tracker = MlflowTracker.open(tracking_uri=uri, experiment="raytrain", run_name="train")
        tracker.log_metrics({"loss": 1.5}, 7, 1.0)
        tracker.close()
        run = _client({"tracking_uri": uri}).get_run(tracker.run_id)
        assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.5})
    finally:
        if server.poll() is None:
            os.killpg(server.pid, 15)
        server.wait(20)


def _wait_for(url: str, server: subprocess.Popen, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=60).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.skip("mlflow server did not start in time")


def test_what_is_refused_costs_that_item_only(store: dict[str, str], tmp_path: Path) -> None:
    tracker = MlflowTracker.open(**store, run_name="train")
    tracker.log_params({"a": 1})
    tracker.log_params({"a": 2})  # MLflow lets no parameter change
    tracker.log_artifact(tmp_path / "missing.json")
    tracker.log_metrics({"loss": 1.0, "nothing": None}, 1, 0.0)  # type: ignore[dict-item]
    tracker.close()
    run = _client(store).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics, run.data.params) == ("FINISHED", {"loss": 1.0}, {"a": "1"})


def test_a_server_that_comes_back_is_used_again(store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from raytrain.tracking import mlflow as module

    start_run = module._start_run
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.2)
    monkeypatch.setattr(module, "_start_run", _away)
    tracker = MlflowTracker.open(**store, run_name="train")
    tracker.log_metrics({"loss": 9.0}, 1, 0.0)
    assert tracker.run_id is None
    monkeypatch.setattr(module, "_start_run", start_run)
    time.sleep(0.3)
    tracker.log_metrics({"loss": 1.0}, 2, 0.0)
    tracker.close()
    run = _client(store).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})


def _away(*_: object) -> str:
    raise ConnectionError("nobody is there")
