"""A model made ready to transcribe: on its device, its linear layers packed for the CPU.

    model = prepare_for_inference(parts.build(), "int8", torch.device("cpu"))

It can't be trained or saved afterwards. `docs/log.md` has the error rates and speeds of the precisions.
"""

from __future__ import annotations

import torch
from torch import nn

from raytrain.errors import DataError
from raytrain.model.canary import Canary
from raytrain.model.linear import PRECISIONS, PreparedLinear, weight_and_bias


def prepare_for_inference(model: Canary, precision: str, device: torch.device) -> Canary:
    """Move `model` to `device` and pack its linear layers in `precision`, in place; returns it in evaluation mode.

    `fp32` gives the same numbers up to rounding; `bf16` and `int8` round (see `PreparedLinear`). With int8 subsampling,
    which sees the widest range of values, stays in float32. Raises `DataError` for an unknown precision and for int8
    off the CPU.
    """
    if precision not in PRECISIONS:
        raise DataError(
            "unknown precision",
            got=precision,
            allowed=", ".join(PRECISIONS),
            remedy="set --precision to one of these",
        )
    if precision == "int8" and device.type != "cpu":
        raise DataError("int8 weights need a CPU", got=f"device {device.type}", remedy="ask for bf16")
    model = model.to(device).eval()
    if precision == "fp32" and device.type != "cpu":
        return model
    for block in model.transf_decoder._decoder.layers:
        block.projections = PreparedLinear(*block.joined_projections(), precision)
    _pack(model.encoder.pre_encode, "fp32" if precision == "int8" else precision)
    _pack(model, precision)
    return model


def _pack(module: nn.Module, precision: str) -> None:
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) or getattr(layer, "kernel_size", None) in ((1,), (1, 1)):
                weight, bias = weight_and_bias(layer)
                setattr(parent, name, PreparedLinear(weight.flatten(1), bias, precision))
