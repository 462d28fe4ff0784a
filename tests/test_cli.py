"""The command line and the jobs, each as its own process, and what they leave behind."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import tiny_values

ROOT = Path(__file__).parents[1]
RAYTRAIN = [sys.executable, "-m", "raytrain"]


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*RAYTRAIN, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **environment},
    )


def ray_processes() -> set[int]:
    """Ids of all raylets and GCS servers on this machine."""
    found = set()
    for process in psutil.process_iter(["name"]):
        if process.info["name"] in ("raylet", "gcs_server"):
            found.add(process.pid)
    return found


def test_help_names_every_command():
    done = call("--help")
    assert done.returncode == 0
    for name in (
        "run",
        "statistics",
        "buckets",
        "assign",
        "oomptimize",
        "train",
        "evaluate",
        "report",
        "demo",
        "ui",
    ):
        assert f" {name} " in done.stdout


def test_an_expected_error_is_one_message_and_exit_code_one(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: a\ndata: {train: [a.jsonl]}\ntrian: {}\n")
    done = call("run", "--config", str(path))
    assert done.returncode == 1
    assert "did you mean train?" in done.stderr and "Traceback" not in done.stderr


def test_a_command_leaves_no_ray_process(corpus, tmp_path):
    before = ray_processes()
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(tiny_values(corpus, tmp_path)))
    done = call("statistics", "--config", str(path))
    assert done.returncode == 0, done.stderr
    assert "96 utterances" in done.stderr
    again = call("statistics", "--config", str(path))
    assert "nothing to do" in again.stderr
    deadline = time.monotonic() + 20
    while ray_processes() - before and time.monotonic() < deadline:
        time.sleep(0.5)
    assert ray_processes() - before == set()


@pytest.fixture
def head():
    """A Ray head with a Jobs server on 127.0.0.1, ended by process id."""
    before = ray_processes()
    environment = {**os.environ, "RAY_memory_monitor_refresh_ms": "0"}
    arguments = ["--head", "--num-cpus=2", "--port=6399", "--dashboard-host=127.0.0.1", "--dashboard-port=8299",
                 "--node-ip-address=127.0.0.1", "--include-dashboard=true", "--block"]  # fmt: skip
    program = Path(sys.executable).with_name("ray")
    process = subprocess.Popen(
        [program, "start", *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    yield "http://127.0.0.1:8299"
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
    psutil.wait_procs(alive, timeout=10)
    assert ray_processes() - before == set()


def wait_for(address: str) -> None:
    import requests

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{address}/api/version", timeout=2).ok:
                return
        time.sleep(1)
    raise TimeoutError(f"no Jobs server at {address}")


def test_ray_job_submit_trains(corpus, tmp_path, head):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(tiny_values(corpus, tmp_path)))
    for stage in ("statistics", "buckets", "assign", "oomptimize"):
        assert call(stage, "--config", str(path)).returncode == 0
    wait_for(head)
    program = Path(sys.executable).with_name("ray")
    done = subprocess.run(
        [program, "job", "submit", "--address", head, "--working-dir", str(ROOT), "--",
         sys.executable, "-m", "pipelines.train", "--config", str(path)],
        capture_output=True, text=True, timeout=250, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "SUCCEEDED" in done.stdout + done.stderr or "succeeded" in done.stdout + done.stderr
    assert (tmp_path / "tiny" / "checkpoints" / "last.json").exists()
