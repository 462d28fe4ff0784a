"""The memory of one rank of a traced model besides activations: weights, gradients, AdamW's moments and buffers for
communication, as the plain model, DDP or FSDP2 have them.

The model is on `meta`. A rank also acts as the optimizer in the traced step: fused AdamW needs nothing besides its
states. Source of the order of events: torch/distributed/fsdp/_fully_shard (`FSDPParamGroup`, `foreach_all_gather`,
`foreach_reduce`) and torch/csrc/distributed/c10d/reducer.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from raytrain.model.block import blocks_of
from raytrain.model.canary import Canary
from raytrain.training.memory.live_bytes import LiveBytes
from raytrain.training.parallel import BUCKET_MIB


def area_of(name: str) -> str:
    """The first two parts of a module's or parameter's name: encoder.layers, log_softmax.mlp, …"""
    return ".".join(part for part in name.split(".")[:2] if part not in ("weight", "bias"))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _empty(num_elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(num_elements, device="meta", dtype=dtype)


def _exchanged(reduce_in: str) -> torch.dtype:
    """The type in which gradients are exchanged; see `train.reduce_in`."""
    return torch.bfloat16 if reduce_in == "bf16" else torch.float32


class WholeRank:
    """A rank that has the whole model. With `world_size` above 1 DDP's reducer holds all gradients in its buckets
    between steps too. Gradients are copied there once all of a bucket are there, in the last micro-batch alone
    (`batched_grad_copy`, `no_sync`). If they are exchanged in bf16, rounded copies live until they have been, on a slow
    link all at the end of backward.
    """

    def __init__(
        self, model: Canary, meter: LiveBytes, world_size: int, averaged: bool, reduce_in: str = "fp32"
    ) -> None:
        self._model, self._meter, self._parameters = model, meter, _trained(model)
        self._reduces, self._dtype = True, _exchanged(reduce_in)
        self._bucket: list[tuple[int, Tensor]] = []
        self._rounded: list[Tensor] = []
        sizes = [parameter.numel() for parameter in self._parameters.values()]
        self._moments = [_empty(size) for size in sizes for _ in range(2)] + [_empty(1) for _ in sizes]
        self._average = [_empty(size) for size in sizes] if averaged else []
        self._reducer = _empty(sum(sizes)) if world_size > 1 else None
        offset = 0
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._gradient_is_there, area_of(name), offset))
            offset += parameter.numel()
        if self._reducer is not None:  # what `train_step` asks of a model that is spread over ranks
            model.set_requires_gradient_sync = self._set_sync  # type: ignore[assignment]

    def watch(self) -> None:
        """Count the bytes that stay between steps."""
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            self._meter.watch(tensor, "parameters", area_of(name))
        _watch_optimizer(self._meter, self._moments, self._average)
        if self._reducer is not None:
            self._meter.watch(self._reducer, "gradients", "reducer")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's."""
        for parameter in self._parameters.values():
            parameter.grad = None
        self._bucket.clear()
        self._rounded.clear()
        self._reduces = True

    def step(self) -> None:
        """As the optimizer's: nothing is allocated, and the exchange has ended."""
        self._copy_to_reducer()
        self._rounded.clear()

    def _set_sync(self, reduces: bool) -> None:
        self._reduces = reduces

    def _gradient_is_there(self, area: str, offset: int, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        self._meter.watch(parameter.grad, "gradients", area)
        if self._reducer is None or not self._reduces:
            return
        self._bucket.append((offset, parameter))
        if sum(gradient.nbytes for _, gradient in self._bucket) >= BUCKET_MIB * 2**20:
            self._copy_to_reducer()

    def _copy_to_reducer(self) -> None:
        if self._reducer is None or not self._bucket:
            return
        for offset, parameter in self._bucket:
            parameter.grad = self._reducer[offset : offset + parameter.numel()].view_as(parameter)
        if self._dtype != torch.float32:
            rounded = _empty(sum(parameter.numel() for _, parameter in self._bucket), self._dtype)
            self._meter.watch(rounded, "gradients", "reducer")
            self._rounded.append(rounded)
        self._bucket.clear()


def _watch_optimizer(meter: LiveBytes, moments: Iterable[Tensor], average: Iterable[Tensor]) -> None:
    for tensor in moments:
        meter.watch(tensor, "optimizer", "optimizer")
    for tensor in average:
        meter.watch(tensor, "optimizer", "average")


class _Unit:
    """A module that FSDP2 gathers as a unit: `module`, and its current memory on this rank.

    `buffer` is an all-gather's output, `gathered` the whole weights copied from it, `gradients` this rank's part after
    the reduce-scatter. Dimension 0 of a parameter is padded to a multiple of the ranks.
    """

    def __init__(self, module: nn.Module, parameters: dict[str, nn.Parameter], world_size: int) -> None:
        self.module, self.parameters = module, parameters
        self.area = area_of(next(iter(parameters)))
        self.shard_sizes = [_shard_size(parameter, world_size) for parameter in parameters.values()]
        self.padded_sizes = [size * world_size for size in self.shard_sizes]
        self.buffer: Tensor | None = None
        self.gathered: list[Tensor] = []
        self.gradients: Tensor | None = None
        self.in_backward = False


def _shard_size(parameter: Tensor, world_size: int) -> int:
    rows = parameter.shape[0] if parameter.ndim else 1
    return -(-rows // world_size) * (parameter.numel() // max(rows, 1))


class _AfterBackward(torch.autograd.Function):
    """Identity that calls `after` once a module's backward pass has reached its inputs."""

    @staticmethod
    def forward(ctx: Any, after: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.after = after
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.after()
        return (None, *gradients)


class ShardedRank:
    """The first of `world_size` ranks of a model sharded by `sharded.shard`; it has the most if parts are unequal.

    The traced model's parameters are not counted: they represent whole weights, whose storage FSDP2 frees between uses.
    What counts is this rank's parts of weights, moments and averages; and while a block is in use, its gathered weights
    and the all-gather's buffer, which in forward lives until the next block is gathered. In backward the block before
    is gathered ahead. A block's whole gradients are copied to the reduce-scatter's input, which lives until the next
    block's; this rank's part of the result stays until the update. Weights outside of the blocks stay gathered from the
    start of forward to the end of backward. In micro-batches before the last gradients stay whole.

    gloo copies what it reduces and gathers; NCCL does neither.
    """

    def __init__(
        self,
        model: Canary,
        meter: LiveBytes,
        world_size: int,
        averaged: bool,
        device_type: str,
        reduce_in: str = "fp32",
    ) -> None:
        self._model, self._meter, self._copies = model, meter, device_type == "cpu"
        self._world_size, self._reduces, self._dtype = world_size, True, _exchanged(reduce_in)
        blocks = blocks_of(model)
        names = {id(parameter): name for name, parameter in _trained(model).items()}
        of_blocks = [{names[id(parameter)]: parameter for parameter in block.parameters()} for block in blocks]
        inside = {name for parameters in of_blocks for name in parameters}
        rest = {name: parameter for name, parameter in _trained(model).items() if name not in inside}
        self._root = _Unit(model, rest, world_size)
        self._units = [
            self._root,
            *(_Unit(*block, world_size) for block in zip(blocks, of_blocks, strict=True)),
        ]
        sizes = [size for unit in self._units for size in unit.shard_sizes]
        self._weights = [(unit.area, _empty(size)) for unit in self._units for size in unit.shard_sizes]
        self._moments = [_empty(size) for size in sizes for _ in range(2)] + [_empty(1) for _ in sizes]
        self._average = [_empty(size) for size in sizes] if averaged else []
        self._order: list[_Unit] = []
        self._deferred: Tensor | None = None
        self._reducing: Tensor | None = None
        self._ends_backward = False
        for name, parameter in _trained(model).items():
            parameter.register_post_accumulate_grad_hook(partial(self._gradient_is_there, area_of(name)))
        for unit in self._units:
            unit.module.register_forward_pre_hook(partial(self._before_forward, unit))
            unit.module.register_forward_hook(partial(self._after_forward, unit))
        # What `train_step` asks of FSDP2. Torch declares attributes of modules as tensors and modules.
        model.set_requires_gradient_sync = self._set_sync  # type: ignore[assignment]

    def watch(self) -> None:
        """Count the bytes that stay between steps."""
        for area, tensor in self._weights:
            self._meter.watch(tensor, "parameters", area)
        for name, buffer in self._model.named_buffers():
            self._meter.watch(buffer, "parameters", area_of(name))
        _watch_optimizer(self._meter, self._moments, self._average)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's; an aborted step leaves nothing behind either."""
        for parameter in self._model.parameters():
            parameter.grad = None
        for unit in self._units:
            unit.buffer, unit.gradients, unit.in_backward = None, None, False
            unit.gathered.clear()
        self._order.clear()
        self._deferred = self._reducing = None
        self._reduces, self._ends_backward = True, False

    def step(self) -> None:
        """As the optimizer's: nothing is allocated."""

    def _set_sync(self, reduces: bool) -> None:
        self._reduces = reduces

    def _make(self, num_elements: int, phase: str, area: str, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = _empty(num_elements, dtype)
        self._meter.watch(tensor, phase, area)
        return tensor

    def _gradient_is_there(self, area: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._meter.watch(parameter.grad, "gradients", area)

    # --- weights

    def _gather(self, unit: _Unit) -> None:
        """Start a unit's all-gather, unless its weights are gathered or being gathered."""
        if unit.buffer is None and not unit.gathered:
            size = sum(unit.padded_sizes)
            unit.buffer = self._make(size, "parameters", "all-gather")
            if self._copies:
                self._make(size, "parameters", "all-gather")

    def _copy_out(self, unit: _Unit, *, in_forward: bool) -> None:
        if unit.buffer is None:
            return
        if in_forward:
            self._deferred = None
        unit.gathered = [self._make(size, "parameters", unit.area) for size in unit.padded_sizes]
        if in_forward:
            self._deferred = unit.buffer
        unit.buffer = None

    def _before_forward(self, unit: _Unit, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._gather(unit)
        self._copy_out(unit, in_forward=not unit.in_backward)
        if unit.in_backward:  # computed again
            return None
        tracked = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        if not tracked:
            return None
        replaced = iter(_AfterBackward.apply(partial(self._after_backward, unit), *tracked))
        return tuple(next(replaced) if isinstance(value, Tensor) and value.requires_grad else value for value in inputs)

    def _after_forward(self, unit: _Unit, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if unit.in_backward:
            return
        if unit is self._root:
            self._deferred = None
        else:
            unit.gathered.clear()
        self._order.append(unit)
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(partial(self._before_backward, unit))

    # --- gradients

    def _before_backward(self, unit: _Unit, gradient: Tensor) -> None:
        if unit.in_backward:
            return
        if not self._ends_backward:
            self._ends_backward = True
            Variable._execution_engine.queue_callback(self._end_backward)
        unit.in_backward = True
        self._gather(unit)
        self._copy_out(unit, in_forward=False)
        before = self._order.index(unit) - 1
        if before >= 0:
            self._gather(self._order[before])

    def _after_backward(self, unit: _Unit) -> None:
        gradients = [parameter.grad for parameter in unit.parameters.values() if parameter.grad is not None]
        unit.in_backward = False
        unit.gathered.clear()
        if not self._reduces or not gradients:
            return
        for parameter in unit.parameters.values():
            parameter.grad = None
        self._reducing = None
        self._reducing = self._make(sum(unit.padded_sizes), "gradients", "reduce-scatter", self._dtype)
        gradients.clear()
        part = self._make(sum(unit.shard_sizes), "gradients", unit.area, self._dtype)
        if self._copies:
            self._make(sum(unit.padded_sizes), "gradients", "reduce-scatter", self._dtype)
        # A rounded part is widened to a new tensor.
        is_whole = self._dtype == torch.float32
        unit.gradients = part if is_whole else self._make(sum(unit.shard_sizes), "gradients", unit.area)

    def _end_backward(self) -> None:
        for unit in self._units:
            if unit.in_backward:
                self._after_backward(unit)
        self._reducing = None
        self._order.clear()
        self._ends_backward = False
