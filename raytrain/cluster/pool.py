"""How many models decode on a cluster, on which nodes, and the resources each may use."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain.cluster.gpus import find_gpus, least_bytes, whole_gpus
from raytrain.cluster.placement import ANYWHERE, Node, Placement, total
from raytrain.config import ClusterSection
from raytrain.errors import ConfigError

_GPU_SHARE, _HOST_SHARE = 0.9, 0.5  # of a device's memory for a model and its batches
_LEAST_ACTOR_CPUS, _MOST_ACTOR_CPUS = 0.1, 0.4
_DEFAULT_NODE_BYTES = 2**32


@dataclass(frozen=True)
class Pool:
    """The pool's actors: how many, whether on GPUs, the bytes and torch threads each may use, and the CPUs reserved per
    actor and per audio-reading task. `models` and `readers` are the placements of actors and reading tasks."""

    workers: int
    cuda: bool
    budget_bytes: int
    threads: int
    actor_cpus: float
    reader_cpus: float
    models: Placement = ANYWHERE
    readers: Placement = ANYWHERE


@dataclass(frozen=True)
class _Nodes:
    """The nodes for models, and how a pool's tasks and actors share their CPUs."""

    models: Placement
    cuda: bool
    nodes: list[Node]
    readers: Placement
    reader_nodes: list[Node]

    @property
    def reader_cpus(self) -> float:
        """CPUs of a task that reads audio. Ray Data hangs silently if actors take all CPUs, and would fuse reading into
        the actors if both requested the same amount."""
        return 1.0 if any(node["Resources"]["CPU"] >= 2 for node in self.reader_nodes) else 0.5

    @property
    def actor_cpus(self) -> float:
        """CPUs that all actors together may take. Actors may be packed onto one node after another, so every reading
        node keeps enough CPUs free for a reader."""
        reading = {node["NodeID"] for node in self.reader_nodes}
        free = (node["Resources"]["CPU"] - self.reader_cpus * (node["NodeID"] in reading) for node in self.nodes)
        return sum(max(0.0, cpus) for cpus in free)

    def most_workers(self, gpus: int) -> int:
        """The number of workers that fit."""
        most = gpus if self.cuda else max(1, int(self.actor_cpus / _LEAST_ACTOR_CPUS))
        if not self.models.resources:
            return most
        for_reading = self.models is self.readers
        slots = [self.models.slots(node, _LEAST_ACTOR_CPUS, 1.0 if self.cuda else 0.0) for node in self.nodes]
        return min(most, sum(number - for_reading for number in slots))

    def memory_bytes(self, workers_per_node: int) -> int:
        """Bytes for each worker's model and batches: a fraction of a GPU's memory, or of the memory that Ray may
        allocate on the smallest node."""
        if self.cuda:
            return int(_GPU_SHARE * least_bytes(find_gpus(self.models)))
        smallest = min(node["Resources"].get("memory", _DEFAULT_NODE_BYTES) for node in self.nodes)
        return int(_HOST_SHARE * smallest / workers_per_node)

    def threads(self, workers_per_node: int) -> int:
        """Torch threads per worker."""
        return max(1, int(min(node["Resources"]["CPU"] for node in self.nodes)) // workers_per_node)


def find_pool(
    workers: int | None, device: str, device_memory: int | None, cluster: ClusterSection | None = None
) -> Pool:
    """The pool that fits the running Ray: by default one worker per GPU, or one on CPUs. GPU workers run on the nodes
    for training, everything else on the nodes for data.

    `device` is auto, cpu or cuda; `device_memory` bytes for each worker's batches and model, by default 0.9 of a GPU's
    memory or, on CPUs, half of the memory that Ray may allocate on the smallest node. Raises `ConfigError` for an
    unavailable device or too many workers.
    """
    cluster = cluster or ClusterSection()
    readers, train = Placement.data(cluster), Placement.train(cluster)
    gpus = _count_gpus(device, train)
    nodes = _find_nodes(readers, train if gpus else readers, cuda=gpus > 0)
    most, workers = nodes.most_workers(gpus), workers or max(1, gpus)
    if workers > most or not nodes.nodes:
        raise ConfigError(
            "Ray has no room for so many workers",
            got=workers,
            allowed=f"at most {most}",
            remedy="lower --workers, or add nodes",
        )
    workers_per_node = -(-workers // len(nodes.nodes))
    return Pool(
        workers=workers,
        cuda=nodes.cuda,
        budget_bytes=nodes.memory_bytes(workers_per_node) if device_memory is None else device_memory,
        threads=nodes.threads(workers_per_node),
        actor_cpus=min(_MOST_ACTOR_CPUS, int(nodes.actor_cpus / workers * 1000) / 1000),
        reader_cpus=nodes.reader_cpus,
        models=nodes.models,
        readers=readers,
    )


def _count_gpus(device: str, train: Placement) -> int:
    """Number of GPUs to decode on. Raises `ConfigError` for an unavailable device."""
    gpus = sum(map(whole_gpus, train.present())) if device != "cpu" else 0
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not gpus):
        raise ConfigError(
            "the device is unavailable",
            got=device,
            allowed="auto, cpu, or cuda if Ray has a GPU",
            remedy="use --device cpu, or start Ray on nodes with GPUs",
        )
    return gpus


def _find_nodes(readers: Placement, models: Placement, cuda: bool) -> _Nodes:
    with_cpus = [node for node in readers.nodes() if node["Resources"].get("CPU")]
    nodes = [node for node in models.nodes() if node["Resources"].get("CPU") and (not cuda or total([node], "GPU"))]
    return _Nodes(models, cuda, nodes, readers, with_cpus)
