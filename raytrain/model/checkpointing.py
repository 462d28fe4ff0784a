"""What a block keeps for its backward pass, and what it computes again.

    none       everything that backward needs
    selective  results of matrix products with weights, convolutions and attention; norms, activations, dropout, casts,
               masks and attention's position scores are computed again, which takes few operations
    full       the block's inputs: its whole forward pass is computed again

Where blocks run eagerly, `run_block` does it. Where they are compiled, the compiler decides what forward keeps:
`compile_options` makes it decide as above, and `eager_part` is what is left for `run_block`.

    options = compile_options("selective")
    block.compile(dynamic=True, options=options)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from raytrain.model.config import Checkpointing

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}
_KEPT_CUSTOM = {"raytrain::relative_attention"}


def eager_part(mode: Checkpointing, *, compiled: bool) -> Checkpointing:
    """The mode for `run_block`, given whether the blocks are compiled with `compile_options(mode)`."""
    return "none" if compiled and mode == "selective" else mode


def compile_options(mode: Checkpointing) -> dict[str, Any]:
    """Options of `torch.compile` with inductor; compiled code is cached by them, so each mode has code of its own."""
    from raytrain.model.partition import PLAIN, SELECTIVE  # takes a second to import, for inductor

    return {"custom_partitioner_fn": SELECTIVE if mode == "selective" else PLAIN}


def run_block(block: nn.Module, mode: Checkpointing, *inputs: Tensor) -> Any:
    """A block's output; in training only what the mode says is kept for its backward pass."""
    if mode == "none" or not block.training:
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=partial(_contexts, block, mode))


def _contexts(
    block: nn.Module, mode: Checkpointing
) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """For the forward pass and for computing it again."""
    if mode == "full":
        return ExitStack(), _spare_statistics(block)
    keep, reuse = create_selective_checkpoint_contexts(_policy)
    states: list[Tensor] = []
    return _both(keep, _NotesRandomStates(states)), _both(
        _spare_statistics(block), reuse, _RestoresRandomStates(states)
    )


def _policy(_: SelectiveCheckpointContext, operator: OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def is_kept(operator: OpOverload) -> bool:
    """Whether `selective` keeps an operator's results."""
    return operator in _KEPT or operator._schema.name in _KEPT_CUSTOM


@contextmanager
def _both(*contexts: AbstractContextManager[object]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def _spare_statistics(block: nn.Module) -> Iterator[None]:
    """Running statistics of batch norm have seen the batch in the forward pass: copies see it again.

    They are buffers, so compiled code takes the copies without being compiled again.
    """
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        copies = {name: None if buffer is None else buffer.clone() for name, buffer in norm._buffers.items()}
        norm._buffers.update(copies)
    try:
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            norm._buffers.update(buffers)


class _RandomStates(TorchDispatchMode):
    """Attention whose result is kept draws no random numbers when its block is computed again. Dropout after it must
    still draw those of the forward pass, so the generator is set to its state after attention."""

    def __init__(self, states: list[Tensor]) -> None:
        super().__init__()
        self._states = states

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags and is_kept(func):
            self._after(next(value.device for value in args if isinstance(value, Tensor)))
        return result

    def _after(self, device: torch.device) -> None:
        raise NotImplementedError


class _NotesRandomStates(_RandomStates):
    def _after(self, device: torch.device) -> None:
        if device.type != "meta":
            self._states.append(_generator_of(device).get_state())


class _RestoresRandomStates(_RandomStates):
    def __enter__(self) -> _RestoresRandomStates:
        self._next = iter(self._states)
        super().__enter__()
        return self

    def _after(self, device: torch.device) -> None:
        if device.type != "meta":
            _generator_of(device).set_state(next(self._next))


def _generator_of(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return torch.get_device_module(device).default_generators[index]
