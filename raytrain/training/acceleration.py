"""How a training step computes what it computes: compiled or not, what it recomputes, and which attention kernel.

Training, memory probes and the tracer all prepare their model here, so batch sizes that were found for a step hold for
it.
"""

from __future__ import annotations

import warnings

import torch

from raytrain.model.canary import Canary
from raytrain.model.compilation import CompilationWarning, compile_blocks
from raytrain.model.config import ModelConfig
from raytrain.model.relative_attention import WIDTHS, kernel_fault
from raytrain.training.settings import TrainSettings
from raytrain.training.step import computing_type


def compiles(settings: TrainSettings, device_type: str) -> bool:
    """Whether steps on `device_type` run compiled blocks: by default on GPUs, where overheads and memory traffic take
    most of an uncompiled step's time."""
    return settings.compile == "always" or (settings.compile == "auto" and device_type == "cuda")


def accelerate(model: Canary, settings: TrainSettings, precision: str) -> None:
    """Prepare a model on its device for training steps in `precision` (fp32 or bf16)."""
    model.fuse_attention(_attention_works(model, settings, computing_type(precision)))
    mode, compiled = settings.activation_checkpointing, False
    if compiles(settings, next(model.parameters()).device.type):
        compiled = compile_blocks(model, computing_type(precision), mode)
    model.set_checkpointing(mode, compiled=compiled)


def fuses_attention(config: ModelConfig, settings: TrainSettings, device_type: str) -> bool:
    """Whether steps on `device_type` have a kernel for attention that keeps no scores, if it works there."""
    if device_type != "cuda" or settings.compile == "never":
        return False
    return config.encoder_width // config.encoder_heads in WIDTHS


def _attention_works(model: Canary, settings: TrainSettings, dtype: torch.dtype) -> bool:
    """Whether attention's kernel compiles on the model's device and agrees with plain PyTorch; warns if it does not."""
    config, device = model.config, next(model.parameters()).device
    if not fuses_attention(config, settings, device.type):
        return False
    width = config.encoder_width // config.encoder_heads
    fault = kernel_fault(device, width, dtype, config.dropout > 0)
    if fault is not None:
        warnings.warn(
            f"attention keeps its scores, which takes more memory and time; because {fault}; to do: install the Triton "
            "of this torch",
            CompilationWarning,
            stacklevel=3,
        )
    return fault is None
