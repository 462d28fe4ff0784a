"""The command line and the jobs, each as its own process, and what they leave behind."""

import contextlib
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import tiny_values

from raytrain.cluster.pipeline import run_pipeline
from raytrain.cluster.session import ray_session
from raytrain.config import ClusterSection, check_config
from raytrain.console import Console

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
def head(monkeypatch):
    """A Ray head with a Jobs server on 127.0.0.1 and token authentication, ended by process id."""
    before = ray_processes()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    environment = {**os.environ, "RAY_memory_monitor_refresh_ms": "0"}
    arguments = ["--head", "--num-cpus=2", "--port=6399", "--dashboard-host=127.0.0.1", "--dashboard-port=8299",
                 "--node-ip-address=127.0.0.1", "--include-dashboard=true", "--dashboard-agent-listen-port=52399",
                 "--block"]  # fmt: skip
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
            requests.get(f"{address}/api/version", timeout=2)
            return  # any answer: it may ask for the token
        time.sleep(1)
    raise TimeoutError(f"no Jobs server at {address}")


@pytest.fixture
def prepared(corpus, tmp_path):
    """A configuration file whose stages before training have run."""
    path = tmp_path / "a.yaml"
    values = tiny_values(corpus, tmp_path)
    path.write_text(yaml.safe_dump(values))
    with ray_session(ClusterSection(num_cpus=2)):
        run_pipeline(check_config(values), Console(quiet=True), ("statistics", "buckets", "assign", "oomptimize"))
    return path


def test_ray_job_submit_trains(tmp_path, prepared, head):
    wait_for(head)
    command = [Path(sys.executable).with_name("ray"), "job", "submit", "--address", head, "--working-dir", str(ROOT)]
    job = [sys.executable, "-m", "pipelines.train", "--config", str(prepared)]
    for _ in range(20):
        done = subprocess.run([*command, "--", *job], capture_output=True, text=True, timeout=250, cwd=ROOT)
        if "No available agent" not in done.stderr:  # the head's job agent starts after its server
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "SUCCEEDED" in done.stdout + done.stderr or "succeeded" in done.stdout + done.stderr
    assert (tmp_path / "tiny" / "checkpoints" / "last.json").exists()
