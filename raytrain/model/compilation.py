"""Compiled blocks: each kind's forward and backward pass in training as few fused kernels, for any batch and length.

    if compile_blocks(model, torch.bfloat16): ...    # False, after one warning, if the compiler fails

All blocks of a kind share their compiled code, so a model of 36 blocks compiles two kinds. Buckets have many shapes,
hence dynamic ones: sizes are symbols in the code. The compiler keeps its results on disk (`TORCHINDUCTOR_CACHE_DIR`),
so the next start takes seconds. Evaluation is not compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raytrain.errors import first_line
from raytrain.model.block import Block, blocks_of
from raytrain.model.canary import Canary
from raytrain.model.checkpointing import compile_options
from raytrain.model.config import Checkpointing, ModelConfig
from raytrain.model.decoder import DecoderBlock
from raytrain.model.encoder import ConformerBlock, relative_positions

# Of the warm-up: sizes that are equal to each other or to a width would be taken for the same symbol. They are large
# enough for the code that real batches run: reductions over fewer elements are compiled differently.
_BATCH, _FRAMES, _TOKENS = 7, 59, 19


class CompilationWarning(UserWarning):
    """The compiler failed, and training runs without it."""


class CompiledPass:
    """The compiled training pass of a kind of block; after a failure of the compiler, the plain pass."""

    def __init__(self, kind: type[Block], options: dict[str, Any]) -> None:
        import torch._dynamo.exc  # takes seconds, so only where something is compiled

        self._errors: type[Exception] = torch._dynamo.exc.TorchDynamoException
        self._kind = kind
        self._compiled: Callable[..., Any] | None = torch.compile(
            kind.compute, dynamic=True, fullgraph=True, options=options
        )

    def __call__(self, block: Block, *inputs: Tensor) -> Any:
        """The outputs of `block.compute`."""
        if self._compiled is None:
            return block.compute(*inputs)
        try:
            return self._compiled(block, *inputs)
        except self._errors as error:
            self._compiled = None
            _warn(self._kind.__name__, error)
            return block.compute(*inputs)


def compile_blocks(model: Canary, dtype: torch.dtype, mode: Checkpointing = "none") -> bool:
    """Compile the blocks of a model that computes in `dtype` on its device, and run each kind once on a block of its
    own; returns whether that worked. They keep for their backward pass what `mode` says; see `checkpointing`. Random
    numbers, weights and statistics stay as they are."""
    import torch._dynamo

    # DDP would split a block's graph where its buckets end, but a block is small enough to be reduced as a whole.
    torch._dynamo.config.optimize_ddp = False
    kinds: tuple[type[Block], ...] = (ConformerBlock, DecoderBlock)
    passes = {kind: CompiledPass(kind, compile_options(mode)) for kind in kinds}
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for block, inputs in _examples(model.config, dtype, device):
                _run(passes[type(block)], block, inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways, of which none should end training
        _warn("the model", error)
        return False
    for module in blocks_of(model):
        module.compiled = passes[type(module)]
    return True


def _run(compiled: CompiledPass, block: Block, inputs: tuple[Tensor, ...]) -> None:
    """Forward and backward, on a block for this alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompilationWarning)
        outputs = compiled(block, *inputs)
    outputs.float().square().mean().backward()


def _examples(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> list[tuple[Block, tuple[Tensor, ...]]]:
    """A new block of each kind in training mode, and inputs for it."""

    def states(width: int, length: int = _FRAMES) -> Tensor:
        return torch.randn(_BATCH, length, width, device=device, dtype=dtype, requires_grad=True)

    frames = torch.full((_BATCH,), _FRAMES, device=device)
    positions = relative_positions(_FRAMES, config.encoder_width, device).to(dtype)
    mask = torch.ones(_BATCH, 1, 1, _FRAMES, dtype=torch.bool, device=device)
    texts = (states(config.decoder_width, _TOKENS), states(config.decoder_width), mask)
    examples: list[tuple[Block, tuple[Tensor, ...]]] = [
        (ConformerBlock(config), (states(config.encoder_width), positions, frames)),
        (DecoderBlock(config), texts),
    ]
    return [(block.to(device).train(), inputs) for block, inputs in examples]


def _warn(what: str, error: Exception) -> None:
    warnings.warn(
        f"{what} can't be compiled and runs uncompiled, slower; because {first_line(error)}; to do: install the Triton "
        "of this torch and a C compiler, or set train.compile: never",
        CompilationWarning,
        stacklevel=3,
    )


def is_compiled(model: nn.Module) -> bool:
    """Whether any block of a model is compiled."""
    return any(module.compiled is not None for module in blocks_of(model))
