"""Shared by all tests: one small spoken corpus, one local Ray, and configurations for both."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytrain.config import ClusterSection, Config, check_config
from raytrain.model.device import EMULATED_GPU

SHARED = Path(os.environ.get("RAYTRAIN_SHARED") or Path(__file__).parents[2] / "shared")

_MARK = "TESTS_OF_RAYTRAIN"  # tells the Ray of these tests from what else runs on this machine
os.environ[_MARK] = str(os.getpid())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what shares the local Ray or the head: one process runs these, another one the rest (see the Makefile)."""
    for item in items:
        if {"local_ray", "head"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("ray")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train, dev and test manifests of real synthesised speech in two languages."""
    from raytrain.demo.speech import make_corpus

    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, {"train": 96, "dev": 8, "test": 10}, seed=3, languages=("en", "de"))
    return folder


@pytest.fixture(scope="session")
def local_ray(s3) -> Iterator[None]:
    """One local Ray with two CPUs for the whole session; its workers reach the S3 server."""
    from raytrain.cluster.session import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5"
        )  # also the interval at which it checks whether all workers are done
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more for each training
        patch.setenv("RAY_health_check_period_ms", "1000")  # a node is considered lost after five of these
        if (Path.home() / ".ray" / "auth_token").exists():  # which may change or go in the meantime
            patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with ray_session(ClusterSection(num_cpus=2)):
            yield


class Nodes:
    """Additional nodes of the local Ray, on this machine, added and removed at will."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._cluster, self._number = Cluster(), 1
        self._cluster.head_node = ray._private.worker.global_worker.node
        # What a process of its own needs to join: without the switch Ray would look for another address of this machine
        # than 127.0.0.1, on which alone a local Ray listens.
        self.environment = {"RAY_ADDRESS": self._cluster.address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

    def add(self, **arguments: Any) -> Any:
        """Start a node; `arguments` are those of `ray.cluster_utils.Cluster.add_node`."""
        # With an address of its own: a process that joins looks for the node that has its own, that of the local Ray.
        self._number += 1
        return self._cluster.add_node(node_ip_address=f"127.0.0.{self._number}", **arguments)

    def lose(self, node: Any) -> None:
        """End a node's processes as a power cut does."""
        self._cluster.remove_node(node, allow_graceful=False)

    def announce_loss(self, node: Any, seconds: float) -> None:
        """Tell Ray that a node goes after some time, as a cloud does with a spot instance."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        client, deadline = GcsClient(address=self._cluster.address), int(1000 * (time.time() + seconds))
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = client.drain_node(node.node_id, reason, "", deadline)
        assert accepted, why

    def remove_all(self) -> None:
        """Have the local Ray as it was."""
        import ray

        for node in list(self._cluster.worker_nodes):
            self._cluster.remove_node(node)
        wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 1, "the nodes are gone")


@pytest.fixture
def nodes(local_ray) -> Iterator[Nodes]:
    """Nodes that this test adds to the local Ray. Their CPUs are for work that asks for what they have beside them."""
    added = Nodes()
    yield added
    added.remove_all()


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 240, every: float = 0.02) -> None:
    """Return once that `condition` holds, which is looked at `every` so many seconds. Raises `TimeoutError` with `what`
    after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(what)
        time.sleep(every)


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory, local_ray) -> Config:
    """A configuration whose run folder has all that training needs, without tracking; for all tests, so only to be
    read and copied."""
    from raytrain.console import Console
    from raytrain.stages.pipeline import run_pipeline

    config = tiny_config(corpus, tmp_path_factory.mktemp("prepared"), tracking={"enabled": False})
    run_pipeline(config, Console(quiet=True), ("statistics", "buckets", "assign", "oomptimize"))
    return config


@pytest.fixture
def copy_of(prepared, tmp_path) -> Callable[..., Config]:
    """`copy(name, train={…}, …)`: the prepared run in a separate folder, with other settings by section."""

    def copy(name: str, **sections: dict) -> Config:
        return copied(prepared, tmp_path / name, **sections)

    return copy


def copied(config: Config, root: Path, **sections: dict) -> Config:
    """The run of `config` as it is, in a folder below `root` and with other settings by section. One that is there
    already is left as it is."""
    values = config.model_dump(mode="json")
    for name, settings in {"run": {"root": str(root)}, **sections}.items():
        values[name] = {**values[name], **settings}
    copy = check_config(values)
    if not copy.run_dir.exists():
        shutil.copytree(config.run_dir, copy.run_dir)
    return copy


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """URI of an empty bucket on an S3 server on this machine, which new processes reach too (`os.environ`)."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "RAYTRAIN_CACHE": str(tmp_path_factory.mktemp("cache")),
        }.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="speech")
        yield "s3://speech"
    server.stop()


def ray_processes() -> set[int]:
    """Ids of the raylets and GCS servers that these tests started, themselves or by other processes."""
    processes = set()
    for process in psutil.process_iter(["name"]):
        if process.info["name"] in ("raylet", "gcs_server"):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if process.environ().get(_MARK) == os.environ[_MARK]:
                    processes.add(process.pid)
    return processes


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A Ray head with a Jobs server on 127.0.0.1 and token authentication, which claims a GPU; ended by process id."""
    from raytrain.cluster import authentication

    before, port = ray_processes(), free_port()
    address = f"http://127.0.0.1:{port}"
    temp_folder = tempfile.mkdtemp(prefix="head-", dir="/tmp")
    arguments = [
        "--head",
        "--num-cpus=2",
        "--num-gpus=1",
        f"--port={free_port()}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=true",
        f"--dashboard-agent-listen-port={free_port()}",
        # Jobs join the cluster that the file ray_current_cluster in this folder names; in Ray's default folder a head
        # of another test session may have replaced it. A short path, since sockets lie below it.
        f"--temp-dir={temp_folder}",
        "--block",
    ]
    program = Path(sys.executable).with_name("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        # Where this process has a Ray of its own, that one's token, which Ray remembers; else one that it must look at.
        existing_token = authentication.token_header().get("Authorization", "").removeprefix("Bearer ")
        patch.setenv("RAY_AUTH_TOKEN", existing_token or secrets.token_hex(32))
        authentication.refresh()
        variables = {"RAY_memory_monitor_refresh_ms": "0", EMULATED_GPU: f"Emulated L4:{2 << 30}"}
        process = subprocess.Popen(
            [program, "start", *arguments],
            env={**os.environ, **variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(lambda: _answers(address), f"a Jobs server at {address}", 120, every=0.5)
            yield address
        finally:
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for child in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.terminate()
            _, alive = psutil.wait_procs(family, timeout=5)
            for child in alive:
                child.kill()
            psutil.wait_procs(alive, timeout=10)
            process.wait(10)
            shutil.rmtree(temp_folder, ignore_errors=True)
    authentication.refresh()
    assert ray_processes() - before == set()


def _answers(address: str) -> bool:
    """Whether there is a web server; its answer may ask for the token."""
    import requests

    with contextlib.suppress(requests.RequestException):
        requests.get(f"{address}/api/version", timeout=2)
        return True
    return False


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def upload(folder: Path, uri: str) -> str:
    """Copy a folder's files to a URI, which is given back."""
    import pyarrow.fs

    pyarrow.fs.copy_files(str(folder), uri)
    return uri


def tiny_values(corpus: Path, root: Path, **sections: dict) -> dict:
    """Plain configuration of a run that takes seconds; `sections` are merged in by section."""
    values = {
        "name": "tiny",
        "run": {"root": str(root)},
        "data": {"root": str(corpus), "train": ["train.jsonl"], "dev": ["dev.jsonl"], "test": ["test.jsonl"]},
        "tokenizer": {"vocab_size": 32},
        "buckets": {"num_duration_buckets": 2, "num_token_buckets": 2, "max_duration_ms": 8000, "max_tokens": 64},
        "oomptimize": {"device_memory": "64MiB", "max_batch_size": 8},
        "model": {
            "encoder_layers": 1,
            "encoder_width": 32,
            "encoder_heads": 2,
            "subsampling_channels": 8,
            "decoder_layers": 1,
            "decoder_width": 32,
            "decoder_heads": 2,
            "max_positions": 96,
        },
        "train": {
            "num_workers": 2,
            "max_steps": 6,
            "warmup_steps": 2,
            "learning_rate": 1e-3,
            "ctc_weight": 0.5,
            "validate_every_steps": 6,
            "checkpoint_every_steps": 3,
            "log_every_steps": 1,
            "compile": "never",  # tracing as compiled takes seconds in each process
        },
        "evaluate": {"batch_size": 5, "max_generation_delta": 5},
    }
    for name, settings in sections.items():
        values[name] = {**values.get(name, {}), **settings}
    return values


def tiny_config(corpus: Path, root: Path, **sections: dict) -> Config:
    """`tiny_values`, checked."""
    return check_config(tiny_values(corpus, root, **sections))
