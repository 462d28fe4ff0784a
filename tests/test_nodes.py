"""Nodes that go away in mid-training, with notice and without, and a worker that Ray's memory monitor kills.

Each runs on a cluster of its own in a process of its own, beside the one of the other tests.
"""

import json
import os
import shutil
import subprocess
import sys

import psutil
import pytest
from conftest import tiny_config

from raytrain.cluster.pipeline import run_pipeline
from raytrain.console import Console

pytestmark = pytest.mark.timeout(600)
STEPS = 400
TRAIN = {
    "num_workers": [1, 2], "max_steps": STEPS, "checkpoint_every_steps": 10_000, "validate_every_steps": STEPS,
    "max_failures": 2, "learning_rate": 1e-5,
}  # fmt: skip

CLUSTER = """
import contextlib, json, os, sys, threading, time
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from raytrain.cluster.pipeline import run_pipeline
from raytrain.cluster.session import ray_session
from raytrain.config import check_config
from raytrain.console import Console

scenario, path = sys.argv[1:]
config = check_config(json.load(open(path)))
run_dir = config.run_dir
GIB = 1 << 30
head = {"num_cpus": 1, "include_dashboard": False}
if scenario == "memory":
    # The monitor acts when this machine's memory is nearly used up, which it is while this process holds `hog`.
    total = psutil.virtual_memory().total
    threshold = total - psutil.virtual_memory().available + 3 * GIB
    head["_system_config"] = {"memory_monitor_refresh_ms": 100, "memory_usage_threshold": threshold / total}
cluster = Cluster(initialize_head=True, head_node_args=head)


def doing(rank):
    "Process and step of a worker."
    with contextlib.suppress(OSError, ValueError):
        pid, step, *_ = map(int, (run_dir / "faults" / f"doing-{rank}").read_bytes().split()[:2])
        return pid, step
    return 0, 0


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(condition.__name__)
        time.sleep(0.01)


def checkpoints():
    return sorted(int(one.name[5:]) for one in (run_dir / "checkpoints").glob("step_*"))


def lose_node(node, notice):
    wait_for(lambda: doing(1)[1] >= 20)
    seen = {"step": doing(1)[1]}
    if notice:
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        deadline = int(time.time() * 1000) + 30_000
        client = GcsClient(address=cluster.address)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = client.drain_node(node.node_id, reason, "", deadline)
        assert accepted, why
        wait_for(checkpoints)
        seen["saved"] = checkpoints()[0]
    cluster.remove_node(node, allow_graceful=False)
    (run_dir / "seen.json").write_text(json.dumps(seen))


def use_up_memory():
    wait_for(lambda: doing(0)[1] >= 20)
    pid, hog = doing(0)[0], []
    # In small steps near the threshold: the monitor kills as many processes as free what is above it.
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        left = threshold - (total - psutil.virtual_memory().available)
        hog.append(bytes([1]) * max(16 << 20, left - (128 << 20)))
        time.sleep(0.25)
    hog.clear()
    (run_dir / "seen.json").write_text(json.dumps({"killed": pid}))


failed = []


def watched(work, *arguments):
    try:
        work(*arguments)
    except BaseException as error:
        failed.append(repr(error))


try:
    if scenario == "memory":
        thread = threading.Thread(target=watched, args=(use_up_memory,), daemon=True)
    else:
        node = cluster.add_node(num_cpus=1)
        thread = threading.Thread(target=watched, args=(lose_node, node, scenario == "notice"), daemon=True)
    os.environ["RAY_ADDRESS"] = cluster.address
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"
    with ray_session(config.cluster):
        thread.start()
        run_pipeline(config, Console(quiet=True), ("train",))
    thread.join(timeout=30)
    assert not failed, failed
finally:
    cluster.shutdown()
"""


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory, local_ray):
    """A run folder with all that training needs."""
    config = tiny_config(corpus, tmp_path_factory.mktemp("nodes"), train=TRAIN, tracking={"enabled": False})
    run_pipeline(config, Console(quiet=True), ("statistics", "buckets", "assign", "oomptimize"))
    return config


def train_on_cluster(prepared, tmp_path, scenario: str, **train):
    """Train in a copy of the run folder while the scenario happens; what it saw, and the metrics of each step."""
    values = prepared.model_dump(mode="json")
    values["run"] = {"root": str(tmp_path)}
    values["train"] |= train
    shutil.copytree(prepared.run_dir, tmp_path / "tiny")
    (tmp_path / "config.json").write_text(json.dumps(values))
    command = [sys.executable, "-c", CLUSTER, scenario, str(tmp_path / "config.json")]
    environment = {**os.environ, "RAY_TRAIN_V2_ENABLED": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    lines = map(json.loads, (tmp_path / "tiny" / "metrics.jsonl").read_bytes().splitlines())
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))  # none lost, none twice
    return json.loads((tmp_path / "tiny" / "seen.json").read_bytes()), steps


@pytest.mark.slow  # the next test loses a node too
def test_training_goes_on_with_one_node_less(prepared, tmp_path):
    seen, steps = train_on_cluster(prepared, tmp_path, "lost")
    # Whoever is left takes both shares of each step.
    assert all(line["batch_size"] >= 2 for line in steps)
    assert seen["step"] < STEPS


def test_a_notice_that_a_node_goes_saves_a_checkpoint_to_go_on_from(prepared, tmp_path):
    seen, _ = train_on_cluster(prepared, tmp_path, "notice")
    assert seen["step"] <= seen["saved"] < STEPS  # no other checkpoint is due before the end


def test_training_goes_on_after_ray_killed_a_worker_for_its_memory(prepared, tmp_path):
    if psutil.virtual_memory().available < 10 << 30:
        pytest.skip("needs 10 GiB of free memory to use up 3.5 of them")
    seen, _ = train_on_cluster(prepared, tmp_path, "memory", num_workers=1)
    assert seen["killed"]
    assert len(list((tmp_path / "tiny" / "ray").glob("train-*"))) > 1  # Ray Train itself had given up
    # The monitor ends several processes; where the worker's controller went first, nobody knows its bucket.
    lowered = tmp_path / "tiny" / "batch_profile_lowered.json"
    if lowered.exists():
        assert "a worker was killed for its memory" in json.loads(lowered.read_bytes())["notes"][0]
