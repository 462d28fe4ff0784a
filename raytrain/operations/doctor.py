"""Collect facts from every node of a cluster and check them; nothing is left behind on the nodes.

    report = examine(config, ClusterSection(address="auto"))
    report.ok, report.checks

Without a configuration only the cluster is checked, not the run's storage, manifests and MLflow.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raytrain.cluster.authentication import auth_mode, has_token
from raytrain.cluster.nodes import ClusterNode, NoAnswer, alive_nodes, ask_nodes, jobs_api, wait_for_nodes
from raytrain.cluster.room import describe_worker, find_room, trains_on_gpus
from raytrain.cluster.session import ray_session, temp_folder
from raytrain.config import ClusterSection, Config
from raytrain.errors import RaytrainError
from raytrain.operations import checks
from raytrain.operations.checks import Check
from raytrain.operations.facts import NodeFacts, Storage
from raytrain.operations.machine import NodeQuestion, measure_node, versions
from raytrain.operations.run_storage import StorageQuestion, Witness, ask_mlflow, measure_storage
from raytrain.redaction import without_credentials
from raytrain.storage.locations import is_uri
from raytrain.storage.ownership import describe_owner
from raytrain.tracking.runs import tracking_uri

PROBE_BYTES = 64 << 20
WAIT_SECONDS = 300.0
_NODE_SECONDS = 150.0
_PROBE_SECONDS = 20.0
_STORAGE_SECONDS = 120.0
_CONNECT_SECONDS = 5.0
_NODE_CHECKS: tuple[Callable[[NodeFacts], list[Check]], ...] = (
    checks.check_gpus,
    checks.check_shared_memory,
    checks.check_open_files,
    checks.check_clock,
    checks.check_disks,
    checks.check_decoders,
    checks.check_memory_monitor,
)


@dataclass(frozen=True)
class Report:
    """The facts and the resulting checks. `address` is the cluster's, or "" if Ray was started just for this."""

    address: str
    driver: dict[str, str]
    nodes: tuple[NodeFacts, ...]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; there may be warnings."""
        return all(check.status != checks.FAIL for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        return {
            "ok": self.ok,
            "address": self.address,
            "driver": self.driver,
            "nodes": [node.to_dict() for node in self.nodes],
            "checks": [asdict(check) for check in self.checks],
        }


def examine(config: Config | None, cluster: ClusterSection, least_nodes: int = 1) -> Report:
    """Start or join Ray as the stages do, run two small tasks on every node, and check the answers.

    If `least_nodes` is above 1, waits up to five minutes for that many nodes. A Ray that can't be reached, or has fewer
    nodes, is a failed check, not an exception.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS") or ""
    driver = versions()
    deadline = time.monotonic() + (WAIT_SECONDS if least_nodes > 1 else 0)
    with contextlib.ExitStack() as stack:
        while True:
            try:
                _reach(address, deadline)
                stack.enter_context(ray_session(cluster))
                break
            except Exception as error:
                if time.monotonic() > deadline:
                    why = " ".join(str(error).split())[:400]
                    return Report(address, driver, (), (checks.check_connection(why),))
                time.sleep(2)  # the head is up before its node is
        wait_for_nodes(least_nodes, deadline)
        nodes = _ask(config)
        return Report(address, driver, tuple(nodes), tuple(judge(nodes, driver, config, least_nodes)))


def judge(nodes: list[NodeFacts], driver: dict[str, str], config: Config | None, least_nodes: int = 1) -> list[Check]:
    """All checks of the queried nodes; needs Ray only for its resources."""
    alive = [node for node in nodes if not node.error]
    results = checks.check_nodes(len(nodes), least_nodes)
    for node in nodes:
        results += checks.check_answer(node)
    results += checks.check_versions(alive, driver)
    for node in alive:
        for check in _NODE_CHECKS:
            results += check(node)
    results += checks.check_authentication(alive, auth_mode(), has_token())
    return results if config is None else results + _judge_run(alive, config, is_shared=len(nodes) > 1)


def _judge_run(alive: list[NodeFacts], config: Config, is_shared: bool) -> list[Check]:
    """A run's checks on the nodes that answered; `is_shared` says that there are several."""
    results = _check_room(config)
    root, uri = run_root(config), _mlflow_uri(config)
    results += checks.check_storage(alive, root, shared=is_shared and not is_uri(root))
    if not any(node.storage and node.storage.problem for node in alive):
        with contextlib.suppress(RaytrainError):  # the storage check reports what is wrong
            results += checks.check_owner(config.run_location, describe_owner(config.run_location))
    results += checks.check_manifests(alive)
    return results + checks.check_mlflow(alive, without_credentials(uri or ""), ask_mlflow(uri) if uri else None)


def _check_room(config: Config) -> list[Check]:
    try:
        cuda = trains_on_gpus(config)
        room = find_room(config, cuda)
    except RaytrainError as error:
        return [Check("room", checks.FAIL, "", error.what, error.remedy or "")]
    return checks.check_room(config.train.least_workers, room.workers, describe_worker(config, cuda))


def run_root(config: Config) -> str:
    """The folder or URI that contains the run folder."""
    return config.run_location.rpartition("/")[0]


def _mlflow_uri(config: Config) -> str | None:
    if not config.tracking.enabled or (is_uri(run_root(config)) and not config.tracking.uri):
        return None
    return tracking_uri(config, config.run_dir)


def _reach(address: str, deadline: float) -> None:
    """Raises `OSError` if nothing listens there: Ray would try for a minute before reporting it."""
    if address.startswith("ray://"):
        raise OSError(f"{address} is a Ray Client address, which supports neither Ray Train nor this check")
    match = re.fullmatch(r"\[?([\w.:-]+?)\]?:(\d+)", address)
    while match:
        try:
            socket.create_connection((match[1], int(match[2])), timeout=_CONNECT_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(f"nothing answers at {address}: {error}") from error
            time.sleep(1)


def _ask(config: Config | None) -> list[NodeFacts]:
    """The facts of every node that Ray considers alive."""
    facts: dict[str, NodeFacts] = {}
    questions: dict[str, NodeQuestion] = {}
    api, folder = jobs_api(), temp_folder()
    for node, host in _with_unique_hosts(alive_nodes()):
        facts[node.id] = NodeFacts(
            host=host,
            address=node.address,
            is_head=node.is_head,
            cpus=node.cpus,
            ray_gpus=node.gpus,
            object_store=node.object_store,
        )
        # The head makes the request: the dashboard may listen only on its 127.0.0.1.
        questions[node.id] = NodeQuestion(facts[node.id], folder, api if node.is_head else None)
    for node_id, answer, received in ask_nodes(measure_node, questions, _NODE_SECONDS):
        if isinstance(answer, NoAnswer):
            facts[node_id] = replace(facts[node_id], error=answer.why)
        else:
            measured, clock = answer
            facts[node_id] = replace(measured, clock_s=clock - received)
    if config is not None:
        _ask_storage(config, facts)
    return sorted(facts.values(), key=lambda node: (not node.is_head, node.host))


def _with_unique_hosts(nodes: list[ClusterNode]) -> Iterator[tuple[ClusterNode, str]]:
    """Each node and its hostname, with part of the node id if several nodes share a host (containers)."""
    hosts = [node.host for node in nodes]
    for node in nodes:
        yield node, node.host if hosts.count(node.host) == 1 else f"{node.host}/{node.id[:6]}"


def _ask_storage(config: Config, facts: dict[str, NodeFacts]) -> None:
    """Add each responding node's view of the run's files."""
    corpora = {corpus.name: corpus for split in ("train", "dev", "test") for corpus in config.data.corpora(split)}
    uri = _mlflow_uri(config)
    with _witness(run_root(config), len(facts) > 1) as witness:
        question = StorageQuestion(
            root=run_root(config),
            probe_bytes=PROBE_BYTES,
            seconds=_PROBE_SECONDS,
            witness=witness,
            manifests=tuple((name, corpus.paths[0]) for name, corpus in corpora.items()),
            mlflow=uri if uri and not uri.startswith("sqlite:") else None,
        )
        questions = {node_id: question for node_id, node in facts.items() if not node.error}
        for node_id, answer, _ in ask_nodes(measure_storage, questions, _STORAGE_SECONDS):
            storage = Storage(error=answer.why) if isinstance(answer, NoAnswer) else answer
            facts[node_id] = replace(facts[node_id], storage=storage)


@contextlib.contextmanager
def _witness(root: str, several: bool) -> Iterator[Witness | None]:
    """A file in a local `run.root` for the nodes to check; folders created for it are removed again."""
    if is_uri(root):
        yield None
        return
    folder = Path(root)
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    path, text = folder / f".doctor-{secrets.token_hex(4)}", secrets.token_hex(8)
    try:
        with contextlib.suppress(OSError):  # the probe reports what is wrong
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        yield Witness(str(path), text) if several else None
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
