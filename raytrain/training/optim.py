"""The optimizer and its learning-rate schedule, as in the paper's recipe."""

from __future__ import annotations

import math

import torch
from torch import nn

from raytrain.training.settings import TrainSettings


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over all parameters; fused on CUDA, where one kernel updates them without temporary tensors."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device.type
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=device in ("cuda", "cpu"),
        # On meta the plain loop keeps temporary tensors small, like the fused kernels.
        foreach=False if device == "meta" else None,
    )


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up to the peak, then decay with the inverse square root of the step (1-based) or a half cosine."""
    warmup, peak, least = settings.warmup_steps, settings.learning_rate, settings.min_learning_rate
    if step < warmup:
        return max(least, peak * step / warmup)
    if settings.schedule == "inverse_sqrt":
        return max(least, peak * math.sqrt(warmup / step))
    gone = min(1.0, (step - warmup) / max(1, settings.max_steps - warmup))
    return least + (peak - least) * (1 + math.cos(math.pi * gone)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set one learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = value
