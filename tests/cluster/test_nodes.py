"""Nodes that go away in mid-training, with notice and without, and a worker that Ray's memory monitor kills."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import wait_for

from raytrain.config import Config
from raytrain.console import Console
from raytrain.stages.pipeline import run_pipeline

pytestmark = pytest.mark.timeout(600)
TRAIN = {
    "num_workers": [1, 2],
    "max_steps": 150,
    "checkpoint_every_steps": 10_000,
    "validate_every_steps": 150,
    "max_failures": 2,
    "learning_rate": 1e-5,
}


def step_of(config: Config, rank: int) -> int:
    """The step that a rank is in, 0 before the first."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((config.run_dir / "faults" / f"doing-{rank}").read_bytes().split()[1])
    return 0


def steps_of(config: Config) -> list[dict]:
    """Metrics of all steps: none lost, none twice."""
    lines = map(json.loads, (config.run_dir / "metrics.jsonl").read_bytes().splitlines())
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, config.train.max_steps + 1))
    return steps


def train_while(config: Config, disturb: Callable[[], None]) -> None:
    """Train, and call `disturb` in a thread once that two workers do. Raises what either raises."""
    errors: list[BaseException] = []

    def watch() -> None:
        try:
            wait_for(lambda: step_of(config, 1) >= 10, "training with two workers")
            disturb()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    run_pipeline(config, Console(quiet=True), ("train",))
    thread.join(timeout=30)
    assert not errors and not thread.is_alive(), errors


@pytest.fixture
def apart(nodes, copy_of, monkeypatch):
    """A run that trains on two added nodes with room for one worker each, and one of them."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    _, node = (nodes.add(num_cpus=1, resources={"apart": 1}) for _ in range(2))
    return copy_of("nodes", train=TRAIN, cluster={"train_resources": {"apart": 1}}), node


@pytest.mark.slow  # the next test loses a node too
def test_training_goes_on_with_one_node_less(apart, nodes):
    config, node = apart
    seen = []

    def lose() -> None:
        seen.append(step_of(config, 1))
        nodes.lose(node)

    train_while(config, lose)
    # The remaining worker takes both shares of each step.
    assert all(line["batch_size"] >= 2 for line in steps_of(config))
    assert seen[0] < config.train.max_steps


def test_a_notice_that_a_node_goes_saves_a_checkpoint_to_go_on_from(apart, nodes, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    config, node = apart
    seen = []

    def checkpoints() -> list[int]:
        return sorted(int(path.name[5:]) for path in (config.run_dir / "checkpoints").glob("step_*"))

    def announce_and_lose() -> None:
        seen.append(step_of(config, 1))
        nodes.announce_loss(node, seconds=30)
        wait_for(checkpoints, "a checkpoint")
        seen.append(checkpoints()[0])
        nodes.lose(node)

    train_while(config, announce_and_lose)
    steps_of(config)
    step, saved = seen
    assert step <= saved < config.train.max_steps  # no other checkpoint is due before the end


MEMORY = """
import json, sys, threading, time

import psutil
from conftest import wait_for
from ray.cluster_utils import Cluster

from raytrain.stages.pipeline import run_pipeline
from raytrain.cluster.session import ray_session
from raytrain.config import ClusterSection, check_config
from raytrain.console import Console

config = check_config(json.load(open(sys.argv[1])))
# The monitor acts when this machine's memory is nearly used up, which it is while this process holds `hog`.
total = psutil.virtual_memory().total
threshold = total - psutil.virtual_memory().available + (3 << 30)
monitor = {"memory_monitor_refresh_ms": 100, "memory_usage_threshold": threshold / total}
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": monitor}
)


def doing():
    "Process and step of the worker."
    try:
        return tuple(map(int, (config.run_dir / "faults" / "doing-0").read_bytes().split()[:2]))
    except (OSError, ValueError):
        return 0, 0


def use_up_memory():
    wait_for(lambda: doing()[1] >= 10, "training began")
    pid, hog = doing()[0], []
    # In small steps near the threshold: the monitor kills as many processes as free what is above it.
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        left = threshold - (total - psutil.virtual_memory().available)
        hog.append(bytes([1]) * max(16 << 20, left - (128 << 20)))
        time.sleep(0.25)
    hog.clear()
    (config.run_dir / "killed").write_text(str(pid))


try:
    with ray_session(ClusterSection(address=cluster.address)):
        thread = threading.Thread(target=use_up_memory, daemon=True)
        thread.start()
        run_pipeline(config, Console(quiet=True), ("train",))
    thread.join(timeout=30)
finally:
    cluster.shutdown()
"""


@pytest.mark.slow  # needs much memory and an otherwise idle machine
def test_training_goes_on_after_ray_killed_a_worker_for_its_memory(copy_of, tmp_path):
    if psutil.virtual_memory().available < 10 << 30:
        pytest.skip("needs 10 GiB of free memory to use up 3.5 of them")
    config = copy_of("memory", train={**TRAIN, "num_workers": 1, "max_failures": 5})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    # A separate cluster next to the local Ray: the monitor is a setting of a whole cluster.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "RAY_TRAIN_V2_ENABLED": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "config.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    assert (config.run_dir / "killed").exists()
    steps_of(config)
    assert len(list((config.run_dir / "ray").glob("train-*"))) > 1  # Ray Train itself had given up
    # The monitor kills several processes; if the worker's controller died first, the bucket is unknown.
    lowered = config.run_dir / "batch_profile_lowered.json"
    if lowered.exists():
        assert "a worker ran out of host memory and was killed" in json.loads(lowered.read_bytes())["notes"][0]
