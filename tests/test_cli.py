"""The command line and the jobs, each as its own process, and what they leave behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ray_processes, tiny_values

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
        "submit",
        "status",
        "logs",
        "stop",
        "ui",
    ):
        assert f" {name} " in done.stdout


def test_run_knows_its_stages(tmp_path):
    done = call("run", "--config", str(tmp_path / "a.yaml"), "statistic")
    assert done.returncode == 2 and "statistic" in done.stderr and "oomptimize" in done.stderr


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
def prepared(corpus, tmp_path):
    """A configuration file whose stages before training have run."""
    path = tmp_path / "a.yaml"
    values = tiny_values(corpus, tmp_path)
    path.write_text(yaml.safe_dump(values))
    with ray_session(ClusterSection(num_cpus=2)):
        run_pipeline(check_config(values), Console(quiet=True), ("statistics", "buckets", "assign", "oomptimize"))
    return path


def test_ray_job_submit_trains(tmp_path, prepared, head):
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
