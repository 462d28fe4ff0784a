"""The command line in a separate process, and what commands leave behind."""

import os
import subprocess
import sys

import yaml
from conftest import ray_processes, tiny_values, wait_for

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
    wait_for(lambda: not ray_processes() - before, "all Ray processes have ended", 20)
