"""What the ranks of a Ray Train run agree on: the checkpoint to resume from, their batch sizes, and when to save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from raytrain.errors import CheckpointError
from raytrain.lengths.profile import BatchProfile, choose_profile, least_sizes
from raytrain.model.device import Device
from raytrain.training.checkpoint import Checkpoint, CheckpointFolder
from raytrain.training.limits import GaveUp

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """The values of all ranks, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree_on_checkpoint(checkpoints: CheckpointFolder, rank: int, meta: Mapping[str, Any]) -> Checkpoint | None:
    """The newest complete checkpoint, the same on all ranks. Raises `GaveUp` on all of them if its lineage differs from
    that in `meta`: a restart would not help."""
    from ray.train.collective import broadcast_from_rank_zero

    lineage = meta.get("ids", {}).get("lineage")
    newest, refusal = checkpoints.newest() if rank == 0 else None, None
    try:
        if newest is not None:
            newest.check_lineage(lineage)
    except CheckpointError as error:
        refusal = error.to_dict()
    step, refusal = broadcast_from_rank_zero((newest.step if newest else None, refusal))
    if refusal is not None:
        raise GaveUp(**refusal)
    if rank == 0 or step is None:
        return newest
    checkpoint = checkpoints.at(step)
    checkpoint.check_lineage(lineage)
    return checkpoint


def agree_on_batch_sizes(profiles: Sequence[BatchProfile], device: Device) -> tuple[int, ...]:
    """Batch sizes by bucket: those of the profile for the ranks' device, or, if ranks have different GPUs, sizes that
    fit all of them."""
    devices = gather((device.name or None, device.total_bytes / 2**30))
    return tuple(least_sizes([choose_profile(profiles, name, gib) for name, gib in devices]))


class PreemptionNotices:
    """Ray's notices that a node of this run is about to be preempted."""

    def __init__(self) -> None:
        self._nodes: set[str] = set()

    def has_new(self) -> bool:
        """Whether there is a new notice since the last call. All ranks must call it."""
        from ray.train import get_preemption_info

        notice = get_preemption_info()
        nodes = set(notice.preempted_node_ids) if notice is not None else set()
        new, self._nodes = nodes - self._nodes, self._nodes | nodes
        return bool(new)
