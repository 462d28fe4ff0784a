"""How many models decode on a cluster, on which nodes, and what of them each may take."""

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
    """The actors: how many, on GPUs or not, the bytes and the torch threads that each may use, and what of the
    cluster's CPUs an actor and a task that reads audio take. `models` and `readers` are the nodes of both."""

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
    """The nodes for models, and what a pool's tasks and actors can have of their CPUs."""

    models: Placement
    cuda: bool
    nodes: list[Node]
    readers: Placement
    reader_nodes: list[Node]

    @property
    def reader_cpus(self) -> float:
        """CPUs of a task that reads audio. Ray Data hangs silently where actors take all CPUs, and would put reading
        into the actors if both took the same."""
        return 1.0 if any(node["Resources"]["CPU"] >= 2 for node in self.reader_nodes) else 0.5

    @property
    def actor_cpus(self) -> float:
        """CPUs that all actors may take. They may fill one node after another, so what a reader needs stays free on
        each node that reads."""
        reading = {node["NodeID"] for node in self.reader_nodes}
        free = (node["Resources"]["CPU"] - self.reader_cpus * (node["NodeID"] in reading) for node in self.nodes)
        return sum(max(0.0, cpus) for cpus in free)

    def most_workers(self, gpus: int) -> int:
        """Workers that there is room for."""
        most = gpus if self.cuda else max(1, int(self.actor_cpus / _LEAST_ACTOR_CPUS))
        if not self.models.resources:
            return most
        for_reading = self.models is self.readers
        slots = [self.models.slots(node, _LEAST_ACTOR_CPUS, 1.0 if self.cuda else 0.0) for node in self.nodes]
        return min(most, sum(number - for_reading for number in slots))

    def memory_bytes(self, workers_per_node: int) -> int:
        """Bytes for the model and the batches of each worker: a part of a GPU's, or of what Ray may give of the
        smallest node's."""
        if self.cuda:
            return int(_GPU_SHARE * least_bytes(find_gpus(self.models)))
        smallest = min(node["Resources"].get("memory", _DEFAULT_NODE_BYTES) for node in self.nodes)
        return int(_HOST_SHARE * smallest / workers_per_node)

    def threads(self, workers_per_node: int) -> int:
        """Torch threads of each worker."""
        return max(1, int(min(node["Resources"]["CPU"] for node in self.nodes)) // workers_per_node)


def find_pool(
    workers: int | None, device: str, device_memory: int | None, cluster: ClusterSection | None = None
) -> Pool:
    """The pool that the running Ray has room for: by default a worker for each GPU, or one on CPUs. Workers on GPUs
    take the nodes for training, all else those for data.

    `device` is auto, cpu or cuda; `device_memory` bytes for each worker's batches and model, by default 0.9 of a GPU's
    or, on CPUs, half of what Ray may give of the smallest node's. Raises `ConfigError` for what is not there.
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
    """GPUs to decode on. Raises `ConfigError` for a device that is not there."""
    gpus = sum(map(whole_gpus, train.present())) if device != "cpu" else 0
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not gpus):
        raise ConfigError(
            "there is no such device",
            got=device,
            allowed="auto, cpu, and cuda where Ray has a GPU",
            remedy="use --device cpu, or start Ray on nodes with GPUs",
        )
    return gpus


def _find_nodes(readers: Placement, models: Placement, cuda: bool) -> _Nodes:
    with_cpus = [node for node in readers.nodes() if node["Resources"].get("CPU")]
    nodes = [node for node in models.nodes() if node["Resources"].get("CPU") and (not cuda or total([node], "GPU"))]
    return _Nodes(models, cuda, nodes, readers, with_cpus)
