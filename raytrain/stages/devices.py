"""The devices that batch sizes are for: the kinds of GPU in the cluster, or a hypothetical device given by its
memory."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain.cluster.gpus import GpuKind, find_gpus, has_gpus, least_bytes
from raytrain.cluster.placement import Placement
from raytrain.config import Config
from raytrain.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class TargetDevice:
    """GPUs of the cluster (`kinds`), or, if there are none, a hypothetical device.

    There are several kinds if weights are sharded over all of them: sizes must then fit the smallest.
    """

    name: str
    total_bytes: int
    kinds: tuple[GpuKind, ...] = ()

    @property
    def is_real(self) -> bool:
        """Whether the cluster has the device."""
        return bool(self.kinds)

    def budget(self, config: Config) -> int:
        """Bytes that a training step may use."""
        return int(self.total_bytes * config.oomptimize.memory_fraction)

    def step_device(self, config: Config) -> str:
        """The device type that training steps run on: cuda or cpu."""
        return "cuda" if self.is_real or config.train.device == "cuda" else "cpu"


def traced_device(total_bytes: int) -> TargetDevice:
    """A device that the cluster does not have."""
    return TargetDevice(f"traced for {total_bytes / GIB:g} GiB", total_bytes)


def find_devices(config: Config) -> list[TargetDevice]:
    """The kinds of GPU in the training nodes, or the configured hypothetical device if there are none.

    Raises `ConfigError` if there is neither a GPU nor a configured device, if the objective requires timing on a GPU,
    or if there is no training node; `ClusterError` if torch can't use a node's GPUs.
    """
    named = config.oomptimize.device_memory
    if config.train.device != "cpu" and has_gpus(Placement.train(config.cluster)):
        return _real_devices(config, find_gpus(Placement.train(config.cluster)))
    if named is None:
        raise ConfigError(
            "no GPU is available to measure memory on",
            remedy="set the memory of the device to plan for, for example oomptimize.device_memory: 16GiB",
        )
    if config.oomptimize.objective == "throughput":
        raise ConfigError(
            "oomptimize.objective: throughput needs a GPU",
            why="without one a step's memory can be traced, but not its duration",
            remedy="set it to memory, or run on a cluster with GPUs",
        )
    return [traced_device(named)]


def _real_devices(config: Config, kinds: list[GpuKind]) -> list[TargetDevice]:
    def planned(total_bytes: int) -> int:
        return min(config.oomptimize.device_memory or total_bytes, total_bytes)

    world_size = sharded_world(config)
    if world_size == 1:
        return [TargetDevice(kind.name, planned(kind.total_bytes), (kind,)) for kind in kinds]
    gpus = sum(kind.num_gpus for kind in kinds)
    if gpus < world_size:
        raise ConfigError(
            "train.shard spreads the model over more workers than there are GPUs to probe it on",
            got=f"train.num_workers {world_size}, {gpus} GPUs",
            remedy="lower train.num_workers, or add GPUs",
        )
    smallest = min(kinds, key=lambda kind: kind.total_bytes)
    return [TargetDevice(smallest.name, planned(least_bytes(kinds)), tuple(kinds))]


def sharded_world(config: Config) -> int:
    """The minimum number of workers that the model's weights are sharded over; 1 if they are not sharded."""
    return config.train.least_workers if config.train.shard else 1


def probe_placements(config: Config, device: TargetDevice, num_buckets: int) -> list[Placement]:
    """Where the probing processes run: one per GPU, but no more than there are buckets; one group for sharded
    weights."""
    train = Placement.train(config.cluster)
    if sharded_world(config) > 1:
        return [train]
    (kind,) = device.kinds
    return kind.placements(train)[:num_buckets]
