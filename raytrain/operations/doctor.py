"""Ask every node of a cluster how it is, and judge the answers; nothing is left behind on any of them.

    report = examine(config, ClusterSection(address="auto"))
    report.ok, report.checks

Without a configuration only the cluster is looked at, not the run's storage, manifests and MLflow.
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

from raytrain.cluster.node_facts import ask_mlflow, auth_mode, has_token, measure_node, measure_storage, versions
from raytrain.cluster.nodes import ask_nodes
from raytrain.cluster.room import describe_worker, find_room, trains_on_gpus
from raytrain.cluster.session import ray_session
from raytrain.config import ClusterSection, Config
from raytrain.errors import RaytrainError
from raytrain.operations import checks
from raytrain.operations.checks import Check, NodeFacts
from raytrain.redaction import without_credentials
from raytrain.storage.filesystem import is_uri
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
    """What was found. `address` is the cluster's, "" where a Ray was started for this alone."""

    address: str
    driver: dict[str, str]
    nodes: tuple[NodeFacts, ...]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; warnings may be there."""
        return all(check.status != checks.FAIL for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"ok": self.ok, **asdict(self)}


def examine(config: Config | None, cluster: ClusterSection, least_nodes: int = 1) -> Report:
    """Reach Ray as the stages do, run two small tasks on every node, and judge.

    Where `least_nodes` is above 1, waits up to five minutes for that many. A Ray that can't be reached, or has fewer
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
                time.sleep(2)  # the head is there before its node is
        _wait_for(least_nodes, deadline)
        nodes = _ask(config)
        return Report(address, driver, tuple(nodes), tuple(judge(nodes, driver, config, least_nodes)))


def judge(nodes: list[NodeFacts], driver: dict[str, str], config: Config | None, least_nodes: int = 1) -> list[Check]:
    """All checks of nodes that were asked; needs Ray for its resources alone."""
    alive = [node for node in nodes if not node.error]
    found = checks.check_nodes(len(nodes), least_nodes)
    for node in nodes:
        found += checks.check_answer(node)
    found += checks.check_versions(alive, driver)
    for node in alive:
        for check in _NODE_CHECKS:
            found += check(node)
    found += checks.check_authentication(alive, auth_mode(), has_token())
    if config is None:
        return found
    found += _check_room(config)
    root, uri = run_root(config), _mlflow_uri(config)
    found += checks.check_storage(alive, root, shared=len(nodes) > 1 and not is_uri(root))
    if not any(node.storage.get("error") for node in alive):
        with contextlib.suppress(RaytrainError):  # the check of the storage says what is wrong
            found += checks.check_owner(config.run_location, describe_owner(config.run_location))
    found += checks.check_manifests(alive)
    return found + checks.check_mlflow(alive, without_credentials(uri or ""), ask_mlflow(uri) if uri else None)


def _check_room(config: Config) -> list[Check]:
    try:
        cuda = trains_on_gpus(config)
        room = find_room(config, cuda)
    except RaytrainError as error:
        return [Check("room", checks.FAIL, "", error.what, error.remedy or "")]
    return checks.check_room(config.train.least_workers, room.workers, describe_worker(config, cuda))


def run_root(config: Config) -> str:
    """The folder or URI that the run's folder lies in."""
    return config.run_location.rpartition("/")[0]


def _mlflow_uri(config: Config) -> str | None:
    if not config.tracking.enabled or (is_uri(run_root(config)) and not config.tracking.uri):
        return None
    return tracking_uri(config, config.run_dir)


def _reach(address: str, deadline: float) -> None:
    """Raises `OSError` where nobody listens: Ray would try for a minute before it says so."""
    if address.startswith("ray://"):
        raise OSError(f"{address} is for Ray's client, which runs neither Ray Train nor this")
    match = re.fullmatch(r"\[?([\w.:-]+?)\]?:(\d+)", address)
    while match:
        try:
            socket.create_connection((match[1], int(match[2])), timeout=_CONNECT_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(f"nobody answers at {address}: {error}") from error
            time.sleep(1)


def _wait_for(least_nodes: int, deadline: float) -> None:
    import ray

    while sum(node["Alive"] for node in ray.nodes()) < least_nodes and time.monotonic() < deadline:
        time.sleep(1)


def _ask(config: Config | None) -> list[NodeFacts]:
    """The facts of every node that Ray counts as alive."""
    import ray
    from ray._private.services import get_webui_url_from_internal_kv
    from ray._private.worker import global_worker

    dashboard = get_webui_url_from_internal_kv()
    temp = global_worker.node.get_temp_dir_path()
    known, wanted = {}, {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        resources = node["Resources"]
        head = "node:__internal_head__" in resources
        known[node["NodeID"]] = NodeFacts(
            host=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            is_head=head,
            cpus=resources.get("CPU", 0),
            ray_gpus=resources.get("GPU", 0),
            object_store=int(resources.get("object_store_memory", 0)),
        )
        # The head asks: the dashboard may listen on its 127.0.0.1 alone.
        jobs = f"http://{dashboard}/api/jobs/" if head and dashboard else None
        wanted[node["NodeID"]] = {"ray_gpus": resources.get("GPU", 0), "temp_folder": temp, "jobs_api": jobs}
    known = _with_own_names(known)
    for node_id, answer, received in ask_nodes(measure_node, wanted, _NODE_SECONDS):
        if isinstance(answer, str):
            known[node_id] = replace(known[node_id], error=answer)
        else:
            values = {**asdict(known[node_id]), **answer, "clock_s": answer["time"] - received}
            known[node_id] = NodeFacts.from_dict(values)
    if config is not None:
        _ask_storage(config, known)
    return sorted(known.values(), key=lambda node: (not node.is_head, node.host))


def _with_own_names(known: dict[str, NodeFacts]) -> dict[str, NodeFacts]:
    """Several nodes on one host (containers, tests) get a part of their id behind it."""
    hosts = [node.host for node in known.values()]
    return {
        node_id: node if hosts.count(node.host) == 1 else replace(node, host=f"{node.host}/{node_id[:6]}")
        for node_id, node in known.items()
    }


def _ask_storage(config: Config, known: dict[str, NodeFacts]) -> None:
    corpora = {corpus.name: corpus for split in ("train", "dev", "test") for corpus in config.data.corpora(split)}
    uri = _mlflow_uri(config)
    with _witness(run_root(config), len(known) > 1) as witness:
        wanted = {
            "root": run_root(config),
            "probe_bytes": PROBE_BYTES,
            "seconds": _PROBE_SECONDS,
            "witness": witness,
            "manifests": [(name, corpus.paths[0]) for name, corpus in corpora.items()],
            "mlflow": uri if uri and not uri.startswith("sqlite:") else None,
        }
        there = {node_id: wanted for node_id, node in known.items() if not node.error}
        for node_id, answer, _ in ask_nodes(measure_storage, there, _STORAGE_SECONDS):
            facts = {"error": answer} if isinstance(answer, str) else answer
            known[node_id] = replace(known[node_id], storage=facts)


@contextlib.contextmanager
def _witness(root: str, several: bool) -> Iterator[tuple[str, str] | None]:
    """A file in a local `run.root` for the nodes to look for, (path, text); folders made for it are removed again."""
    if is_uri(root):
        yield None
        return
    folder = Path(root)
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    path, text = folder / f".doctor-{secrets.token_hex(4)}", secrets.token_hex(8)
    try:
        with contextlib.suppress(OSError):  # the probe says what is wrong
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        yield (str(path), text) if several else None
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for one in made:
                one.rmdir()
