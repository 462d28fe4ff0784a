"""The GPUs of a cluster, as seen by processes on its nodes.

    for kind in find_gpus(Placement.train(config.cluster)):
        kind.name, kind.total_bytes, kind.num_gpus

A small task that reserves no CPU or GPU queries every node, so a busy GPU causes no delay, and a node whose GPUs torch
can't use is reported, with the reason, before any work is sent there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from raytrain.cluster.gpu_driver import installed_gpus
from raytrain.cluster.nodes import NoAnswer, ask_nodes
from raytrain.cluster.placement import Node, Placement, total
from raytrain.cluster.session import ray_session
from raytrain.config import Config
from raytrain.errors import ClusterError
from raytrain.model.device import Device, emulated_gpu, visible_gpus

_SECONDS = 120.0  # importing torch on a cold node can take tens of seconds


@dataclass(frozen=True)
class GpuKind:
    """GPUs with the same name and memory: `nodes` lists (node id, number of GPUs); see `raytrain.model.device` for
    `is_emulated`."""

    name: str
    total_bytes: int
    nodes: tuple[tuple[str, int], ...]
    is_emulated: bool = False

    @property
    def num_gpus(self) -> int:
        """GPUs of this kind on all nodes."""
        return sum(number for _, number in self.nodes)

    def placements(self, placement: Placement) -> list[Placement]:
        """`placement` restricted to one of these GPUs' nodes, once per GPU."""
        return [placement.on_node(node) for node, number in self.nodes for _ in range(number)]


# The last answer, keyed by Ray job and the GPUs of its nodes.
_ANSWERS: dict[tuple[str, tuple[tuple[str, int], ...]], list[GpuKind]] = {}


def has_gpus(placement: Placement) -> bool:
    """Whether Ray has GPUs on the nodes of `placement`. Raises `ClusterError` if a node has a fractional GPU."""
    return any(whole_gpus(node) for node in placement.present())


def whole_gpus(node: Node) -> int:
    """Number of GPUs that Ray offers on a node. Raises `ClusterError` for a fractional GPU."""
    gpus = total([node], "GPU")
    if gpus % 1:
        raise ClusterError(
            f"Ray offers {gpus:g} GPUs on {node['NodeManagerHostname']}",
            allowed="a whole number",
            why="a model and its batches need a whole GPU",
            remedy="start Ray with a whole number of GPUs (--num-gpus), or set train.device: cpu",
        )
    return int(gpus)


def find_gpus(placement: Placement) -> list[GpuKind]:
    """The kinds of GPU on the nodes of `placement`, sorted by name; empty if Ray has none.

    Raises `ClusterError` if torch can't use a node's GPUs, or if a node has several kinds.
    """
    import ray

    counts = {node["NodeID"]: (whole_gpus(node), node["NodeManagerHostname"]) for node in placement.nodes()}
    counts = {node: (number, host) for node, (number, host) in counts.items() if number}
    session = ray.get_runtime_context().get_job_id()
    key = (session, tuple(sorted((node, number) for node, (number, _) in counts.items())))
    if key not in _ANSWERS:
        _ANSWERS.clear()
        _ANSWERS[key] = _ask_kinds(counts)
    return _ANSWERS[key]


def _ask_kinds(counts: dict[str, tuple[int, str]]) -> list[GpuKind]:
    """The kinds of GPU on nodes, given as node id → (number of GPUs, hostname)."""
    kinds: dict[Device, list[tuple[str, int]]] = {}
    for node, answer, _ in ask_nodes(_gpus_here, dict.fromkeys(counts), _SECONDS):
        number, host = counts[node]
        device = _single_kind(answer, host)
        kinds.setdefault(device, []).append((node, number))
    return [
        GpuKind(device.name, device.total_bytes, tuple(sorted(nodes)), device.is_emulated)
        for device, nodes in sorted(kinds.items(), key=lambda item: item[0].name)
    ]


def _gpus_here(_: None) -> list[Device] | ClusterError:
    try:
        return visible_gpus()
    except ClusterError as error:
        return error


def _single_kind(answer: list[Device] | ClusterError | NoAnswer, host: str) -> Device:
    if isinstance(answer, NoAnswer):
        raise ClusterError(f"the GPUs of {host} can't be queried", why=answer.why, remedy="run `raytrain doctor`")
    if isinstance(answer, ClusterError):
        raise ClusterError(f"{answer.what} (on {host})", why=answer.why, remedy=answer.remedy)
    kinds = {replace(device, torch_name=device.torch.type) for device in answer}
    if len(kinds) > 1:
        raise ClusterError(
            f"{host} has several kinds of GPU",
            got=", ".join(sorted(f"{kind.name} ({kind.total_bytes / 2**30:.0f} GiB)" for kind in kinds)),
            why="Ray does not say which one a worker gets, and their batch sizes differ",
            remedy="start Ray once per kind, each with its own CUDA_VISIBLE_DEVICES, or expose only one kind",
        )
    return kinds.pop()


def may_train_on_gpus(config: Config) -> bool:
    """Whether training may run on GPUs of the Ray that a command would use; does not start Ray."""
    import ray

    cluster = config.cluster
    if config.train.device == "cpu":
        return False
    if ray.is_initialized() or cluster.address or os.environ.get("RAY_ADDRESS"):
        return True
    return emulated_gpu() is not None or installed_gpus() > 0


def device_names(config: Config) -> list[str]:
    """Name and memory of the kinds of GPU that training would run on, which batch sizes depend on. None on CPU."""
    if not may_train_on_gpus(config):
        return []
    with ray_session(config.cluster):
        placement = Placement.train(config.cluster)
        kinds = find_gpus(placement) if has_gpus(placement) else []
    return [f"{kind.name}, {kind.total_bytes} bytes" for kind in kinds]


def backend(config: Config, cuda: bool) -> str:
    """The `torch.distributed` backend of training. Raises what `find_gpus` raises, before training starts."""
    if not cuda:
        return "gloo"
    kinds = find_gpus(Placement.train(config.cluster))  # none while an autoscaler has yet to add them
    return "gloo" if any(kind.is_emulated for kind in kinds) else "nccl"


def least_bytes(kinds: list[GpuKind]) -> int:
    """The memory available to a worker on every one of these GPUs."""
    return min(kind.total_bytes for kind in kinds)
