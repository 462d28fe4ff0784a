"""Tracking: JSON lines, a real MLflow store, and a server that is not there."""

import json
import socket
import time

import pytest

from raytrain.cluster.train import keep_metrics_until
from raytrain.tracking import JsonLinesTracker, MultiTracker
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
    again.log_metrics({"loss": 0.5}, 50, 1.0)
    again.close()
    parent.close("FAILED")
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(child.run_id)
    history = client.get_metric_history(child.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(1, 51))
    assert run.data.metrics["loss"] == 0.5 and run.info.status == "FINISHED"
    assert [(p.step, p.value) for p in client.get_metric_history(child.run_id, "wer_by_second")] == [(33, 0.25)]
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert [item.path for item in client.list_artifacts(child.run_id)] == ["a.json"]
    assert client.get_run(parent.run_id).info.status == "FAILED"
    assert len(client.get_run(parent.run_id).data.params) == 150


def test_a_server_that_is_down_warns_and_stops_nothing(caplog):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = time.monotonic()
    tracker = MlflowTracker.open(f"http://127.0.0.1:{port}", "e", "r")
    for step in range(100):
        tracker.log_metrics({"loss": 1.0}, step, 0.0)
    tracker.log_params({"a": 1})
    tracker.close()
    assert time.monotonic() - start < 20
    assert tracker.run_id is None
    assert "is away" in caplog.text and caplog.text.count("WARNING") == 1


@pytest.mark.parametrize("status", ["FINISHED"])
def test_closing_an_idle_run_is_quick(tmp_path, status):
    tracker = MlflowTracker.open(f"sqlite:///{tmp_path / 'm.db'}", "e", "r")
    start = time.monotonic()
    tracker.close(status)
    assert time.monotonic() - start < 10
