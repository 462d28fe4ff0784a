"""How a training step computes what it computes: compiled or not, what it recomputes, and which attention kernel.

Training, memory probes and the tracer all prepare their model here, so batch sizes that were found for a step hold for
it.
"""

from __future__ import annotations

from raytrain.model.canary import Canary
from raytrain.model.compilation import compile_blocks
from raytrain.training.settings import TrainSettings
from raytrain.training.step import computing_type


def compiles(settings: TrainSettings, device_type: str) -> bool:
    """Whether steps on `device_type` run compiled blocks: by default on GPUs, where overheads and memory traffic take
    most of an uncompiled step's time."""
    return settings.compile is True or (settings.compile == "auto" and device_type == "cuda")


def accelerate(model: Canary, settings: TrainSettings, precision: str) -> None:
    """Prepare a model on its device for training steps in `precision` (fp32 or bf16)."""
    mode, compiled = settings.activation_checkpointing, False
    if compiles(settings, next(model.parameters()).device.type):
        compiled = compile_blocks(model, computing_type(precision), mode)
    model.set_checkpointing(mode, compiled=compiled)
