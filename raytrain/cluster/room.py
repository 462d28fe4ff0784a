"""How many training workers fit in the cluster; checked first because Ray would wait for resources silently."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain.cluster.gpus import has_gpus, whole_gpus
from raytrain.cluster.placement import Node, Placement
from raytrain.config import Config
from raytrain.errors import TrainingError

Workers = int | tuple[int, int]


@dataclass(frozen=True)
class Room:
    """Training workers that fit in the cluster: on the nodes that are up, on their currently free resources, and at
    most, with the nodes that an autoscaler may add. `strays` says that Ray Train would also count nodes without the
    configured labels (`Placement.misled`)."""

    workers: int
    free: int
    most: int
    strays: bool = False


def choose_workers(wanted: Workers, room: Room, each: str) -> Workers:
    """The `num_workers` to give Ray Train: as configured, or fewer if that is a range. `each` describes what a worker
    takes.

    Raises `TrainingError` if there is no room for even the smallest number.
    """
    least, most = (wanted, wanted) if isinstance(wanted, int) else wanted
    if room.most < least:
        raise TrainingError(
            f"the cluster does not have room for that many training workers ({each} each)",
            got=least,
            allowed=room.most,
            remedy="lower train.num_workers ([least, most] uses what is available), or add nodes",
        )
    if isinstance(wanted, int) or least == most:
        return least
    if not room.strays:
        return least, most
    if room.workers < least:
        raise TrainingError(
            "train.num_workers is a range, and nodes without cluster.train_labels also have room for workers",
            why="Ray Train chooses the number of workers by resources alone, and would wait for the rest of them",
            remedy="start the training nodes with a custom resource and name it in cluster.train_resources, or set "
            "a fixed number of workers",
        )
    return min(most, room.workers)


def waiting_for(wanted: Workers, room: Room, each: str) -> str | None:
    """What training will wait for, as a line to print; None if it can start now."""
    least = wanted if isinstance(wanted, int) else wanted[0]
    if room.workers < least:
        return f"waiting for nodes: {least} workers ({each} each), the cluster has room for {room.workers} so far"
    if room.free < least:
        return f"waiting for other work to end: {least} workers ({each} each), there is room for {room.free} now"
    return None


def trains_on_gpus(config: Config) -> bool:
    """Whether training runs on GPUs. Raises `TrainingError` if it must and the cluster has none, and `ClusterError` for
    a fractional GPU."""
    if config.train.device == "cpu":
        return False
    placement = Placement.train(config.cluster)
    cuda = has_gpus(placement) or _most(placement, 1.0) > 0
    if config.train.device == "cuda" and not cuda:
        raise TrainingError("train.device is cuda, but the cluster has no GPU", remedy="set train.device to cpu")
    return cuda


def find_room(config: Config, cuda: bool) -> Room:
    """The running Ray's room for training workers."""
    placement, gpus = Placement.train(config.cluster), 1.0 if cuda else 0.0
    nodes = placement.present()
    for node in nodes:
        if cuda:
            whole_gpus(node)
    workers = sum(placement.slots(node, placement.cpus, gpus) for node in nodes)
    free = sum(placement.slots(node, placement.cpus, gpus) for node in _with_free_resources(nodes))
    return Room(workers, free, max(workers, _most(placement, gpus)), bool(placement.misled(gpus)))


def describe_worker(config: Config, cuda: bool) -> str:
    """What a worker reserves, for messages."""
    placement = Placement.train(config.cluster)
    parts = [f"{placement.cpus:g} CPU" + ("s" if placement.cpus != 1 else "")]
    parts += ["1 GPU"] if cuda else []
    parts += [f"{amount:g} {name}" for name, amount in placement.resources.items()]
    return ", ".join(parts)


def _with_free_resources(nodes: list[Node]) -> list[Node]:
    """The nodes with their free instead of their total resources; Ray is queried once for all of them."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [{**node, "Resources": free.get(node["NodeID"], {})} for node in nodes]


def _most(placement: Placement, gpus: float) -> int:
    """Workers on all nodes that an autoscaler may start; 0 if there is no autoscaler or it has no limit."""
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config()
    if not most:
        return 0
    taken = {"CPU": placement.cpus, **({"GPU": gpus} if gpus else {}), **placement.resources}
    return int(min(most.get(name, 0) / amount for name, amount in taken.items() if amount))
