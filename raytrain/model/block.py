"""Blocks: the parts of a model that are repeated, compiled, checkpointed and sharded as units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Block(nn.Module):
    """A module whose pass in training may be compiled. Subclasses define `compute`, from inputs to outputs."""

    compute: Callable[..., Any]
    compiled: Callable[..., Any] | None = None  # takes the block and its inputs; see `compilation`

    def forward(self, *inputs: Tensor) -> Any:
        """`compute`, in training compiled if the model is."""
        if self.compiled is not None and self.training:
            return self.compiled(self, *inputs)
        return self.compute(*inputs)


def blocks_of(model: nn.Module) -> list[Block]:
    """Encoder's and decoder's blocks, each of which is compiled, and which FSDP2 shards and gathers as a unit."""
    return [module for module in model.modules() if isinstance(module, Block)]
