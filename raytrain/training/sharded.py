"""FSDP2: weights, gradients and moments sharded over all ranks, for models that don't fit on one GPU.

Checkpoints have the same form as those of an unsharded run, so a run resumes from either kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from raytrain.model.block import blocks_of
from raytrain.model.canary import Canary
from raytrain.training.checkpoint import StateDict

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: Canary, device_type: str, reduce_in: str = "fp32") -> nn.Module:
    """Shard every block of encoder and decoder, and the remainder as one unit, over all ranks; returns the model
    itself.

    Load weights before, and make the optimizer after it. `reduce_in` is fp32, or bf16 for gradients that are rounded
    before they are exchanged; FSDP2 then adds up micro-batches in it too.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if reduce_in == "bf16" else None)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (all ranks must call it); any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside the block every rank has all weights, so that parts of the model can be called separately (decoding)."""
    blocks = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(block is not model, recurse=False)
            block.reshard()


def model_state(model: nn.Module) -> StateDict:
    """All weights on the host of rank 0, nothing elsewhere; all ranks must call it."""
    if not isinstance(model, FSDPModule):
        return model.state_dict()
    return get_model_state_dict(model, options=_WHOLE)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> StateDict:
    """Like `optimizer.state_dict()` of an unsharded model; only rank 0 gets it, but all ranks must call it."""
    if not isinstance(model, FSDPModule):
        return optimizer.state_dict()
    state: StateDict = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    if not state:
        return {}
    numbers = {name: number for number, (name, _) in enumerate(_trained(model))}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    moments = {numbers[name]: values for name, values in state["state"].items()}
    return {"state": moments, "param_groups": groups}


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: StateDict) -> None:
    """Load the result of `optimizer_state`."""
    if not isinstance(model, FSDPModule):
        optimizer.load_state_dict(state)
        return
    names = [name for name, _ in _trained(model)]
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    moments = {names[number]: values for number, values in state["state"].items()}
    named: StateDict = {"state": moments, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, named, options=StateDictOptions(full_state_dict=True))


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
