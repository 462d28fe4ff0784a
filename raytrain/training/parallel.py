"""The model that training calls, on one rank of several: DDP or FSDP2, the same for training and for memory probes.

model = Canary(config).to(device)
wrapped = parallel_model(model, settings, world_size, device)    # before the optimizer is made
optimizer = make_optimizer(model, settings)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrain.errors import TrainingError
from raytrain.model.canary import Canary
from raytrain.training.settings import TrainSettings

# DDP's buckets: 25 MiB, as by default, are latency-bound from 64 GPUs on; much larger buckets leave more to reduce
# after the backward pass (`benchmarks.reduction`, docs/scale.md).
BUCKET_MIB = 100


def backend_of(device_type: str) -> str:
    """The communication backend of ranks on `device_type` (cuda or cpu)."""
    return "nccl" if device_type == "cuda" else "gloo"


def join_alone(device_type: str) -> None:
    """A group of just this process, unless there is a group already: DDP then allocates buckets as it does among
    several."""
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch exports it without declaring so
        dist.init_process_group(backend_of(device_type), store=store, rank=0, world_size=1)


def is_sharded(settings: TrainSettings, world_size: int) -> bool:
    """Whether ranks hold parts of the model; one rank alone holds it whole."""
    return settings.shard and world_size > 1


def micro_batches(settings: TrainSettings, world_size: int) -> int:
    """The number of micro-batches with which a rank's step takes as much memory as training's: 1, or 2 if there are
    more.

    If `num_workers` is a range, fewer ranks than its maximum accumulate more, so that steps stay the same.
    """
    shares = settings.accumulate * settings.most_workers if world_size >= settings.least_workers else world_size
    return min(2, max(settings.accumulate, -(-shares // world_size)))


def parallel_model(model: Canary, settings: TrainSettings, world_size: int, device: torch.device) -> nn.Module:
    """The model that a training step with `world_size` ranks calls: `model` itself for one rank and for FSDP2, which
    changes its parameters, else DDP around it.

    Weights are loaded before, the optimizer is made after. A probe of whole models may name more ranks than its group
    has. Raises `TrainingError` if the model should be sharded and the group has only this process.
    """
    if world_size == 1:
        return model
    if is_sharded(settings, world_size):
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise TrainingError(
                "train.shard needs a process group of several ranks",
                got=1,
                allowed=f"up to {world_size} ranks",
                why="a single rank would hold the whole model",
                remedy="start as many processes as workers, or unset train.shard",
            )
        from raytrain.training.sharded import shard  # its imports take seconds

        return shard(model, device.type, settings.reduce_in)
    wrapped = nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        bucket_cap_mb=BUCKET_MIB,
        gradient_as_bucket_view=True,
        batched_grad_copy=True,  # gradients reach a bucket by one kernel, not by one each
        # Batch-norm statistics stay local to each rank until they are used; see `training.step`.
        broadcast_buffers=False,
        # No `static_graph`: the step computes the same without it, and with it micro-batches in `no_sync` fail.
    )
    if settings.reduce_in == "bf16":
        # DDP evaluates annotations of hooks, and refuses torch's own for other backends than NCCL.
        wrapped.register_comm_hook(None, lambda _, bucket: average_in_bf16(bucket.buffer()))
    return wrapped


def average_in_bf16(gradients: Tensor) -> torch.futures.Future[Tensor]:
    """Replace float32 gradients (N,) by their mean over ranks, exchanged as bfloat16; all ranks must call it."""
    # Divided before they are rounded, by a single kernel, so that they are rounded once.
    rounded = torch.empty_like(gradients, dtype=torch.bfloat16)
    torch.div(gradients, dist.get_world_size(), out=rounded)
    work = dist.all_reduce(rounded, async_op=True)
    assert work is not None

    def widen(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        return gradients.copy_(future.value()[0])

    return work.get_future().then(widen)
