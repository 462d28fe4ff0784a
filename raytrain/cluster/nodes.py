"""The nodes of a cluster as Ray lists them, and running a small function on each even while they are busy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from raytrain.cluster.placement import alive
from raytrain.errors import last_line

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ClusterNode:
    """A node that is up, with the resources that Ray offers on it; `object_store` in bytes."""

    id: str
    host: str
    address: str
    is_head: bool
    cpus: float
    gpus: float
    object_store: int


@dataclass(frozen=True)
class NoAnswer:
    """Why a node did not answer: the function raised, the node was lost, or it timed out."""

    why: str


def alive_nodes() -> list[ClusterNode]:
    """All nodes that are up."""
    return [
        ClusterNode(
            id=node["NodeID"],
            host=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            is_head="node:__internal_head__" in node["Resources"],
            cpus=node["Resources"].get("CPU", 0),
            gpus=node["Resources"].get("GPU", 0),
            object_store=int(node["Resources"].get("object_store_memory", 0)),
        )
        for node in alive()
    ]


def wait_for_nodes(least_nodes: int, deadline: float) -> None:
    """Wait until that many nodes are up, or until `deadline` (`time.monotonic()`)."""
    while len(alive()) < least_nodes and time.monotonic() < deadline:
        time.sleep(1)


def jobs_api() -> str | None:
    """The URL at which the head's Jobs API lists jobs, or None if no dashboard runs."""
    from ray._private.services import get_webui_url_from_internal_kv

    dashboard = get_webui_url_from_internal_kv()
    return f"http://{dashboard}/api/jobs/" if dashboard else None


def ask_nodes(
    function: Callable[[Question], Answer], questions: Mapping[str, Question], seconds: float
) -> Iterator[tuple[str, Answer | NoAnswer, float]]:
    """Call `function` once on each node of `questions` (node id → argument), in a short-lived process that reserves
    neither CPUs nor GPUs.

    Yields (node, answer, arrival time as `time.time()`) in order of arrival.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pending: dict[ray.ObjectRef[Answer], str] = {}
    for node_id, question in questions.items():
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        # A process that has initialized the GPUs must not be reused for a task to which Ray assigns only some of them.
        task: Any = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(function)
        pending[task.options(scheduling_strategy=strategy).remote(question)] = node_id
    deadline = time.monotonic() + seconds
    while pending and (left := deadline - time.monotonic()) > 0:
        ready, _ = ray.wait(list(pending), timeout=left)
        received = time.time()
        for reference in ready:
            node_id = pending.pop(reference)
            try:
                yield node_id, ray.get(reference), received
            except Exception as error:
                yield node_id, NoAnswer(last_line(error)), received
    for reference, node_id in pending.items():
        with contextlib.suppress(Exception):
            ray.cancel(reference, force=True)
        yield node_id, NoAnswer(f"no answer within {seconds:.0f} s"), time.time()
