"""Linear maps for inference: the CPU's fastest kernel, in float32, bfloat16 or with int8 weights.

    project = affine(layer.weight, layer.bias)               # no copy of the weight
    layer = PreparedLinear(layer.weight, layer.bias, "int8")  # packed once

Neither has a gradient. Decoding reads every weight once per token, so it is bound by memory bandwidth: packed float32
gives the same numbers up to rounding, bfloat16 has half of the bytes, int8 a quarter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Linear = Callable[[Tensor], Tensor]

PRECISIONS = ("fp32", "bf16", "int8")
# A call of oneDNN costs about 10 µs more than one of `F.linear`, which smaller products do not recover.
_LARGE = 1 << 17


def affine(weight: Tensor, bias: Tensor | None) -> Linear:
    """x (…, in) → x·Wᵀ + b with the weight in place, (out, in).

    On a CPU large float32 weights go to oneDNN, which takes about half the time of the BLAS behind `F.linear` for the
    few rows of a decoder step.
    """
    if _for_onednn(weight) and not torch.is_autocast_enabled("cpu"):
        return partial(_onednn, weight=weight, bias=bias)
    return partial(F.linear, weight=weight, bias=bias)


def affine_of(layer: nn.Module) -> Linear:
    """`affine` of a layer, or its prepared version."""
    return layer.run if isinstance(layer, PreparedLinear) else affine(*weight_and_bias(layer))


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """A convolution of kernel 1, prepared or not, of x (…, channels)."""
    if isinstance(layer, PreparedLinear):
        return layer.run(x)
    weight, bias = weight_and_bias(layer)
    return F.linear(x, weight.flatten(1).to(x.dtype), None if bias is None else bias.to(x.dtype))


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight of a linear layer or convolution, (out, in) or (out, in, kernel…), and its bias (out,)."""
    assert isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))
    return layer.weight, layer.bias


class PreparedLinear(nn.Module):
    """A linear layer packed for inference, float32 in and out; it has no parameters to train or to save.

    `weight` (out, in), `bias` (out,) or None. `bf16` rounds weights and inputs and accumulates in float32. `int8`
    rounds weights per output and inputs per call, which needs a CPU.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, precision: str) -> None:
        super().__init__()
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        self.run: Linear = {"fp32": _float32, "bf16": _bfloat16, "int8": _int8}[precision](weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def _for_onednn(weight: Tensor) -> bool:
    cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return cpu and weight.dtype == torch.float32 and weight.numel() >= _LARGE


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _float32(weight: Tensor, bias: Tensor | None) -> Linear:
    if not _for_onednn(weight):
        return affine(weight.float(), None if bias is None else bias.float())
    return partial(_onednn, weight=torch.ops.mkldnn._reorder_linear_weight(weight), bias=bias)


def _bfloat16(weight: Tensor, bias: Tensor | None) -> Linear:
    packs = _for_onednn(weight) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    weight, bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
    if packs:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x: _onednn(x.bfloat16(), packed, bias).float()
    return lambda x: F.linear(x.bfloat16(), weight, bias).float()


def _int8(weight: Tensor, bias: Tensor | None) -> Linear:
    scale = (weight.abs().amax(1) / 127).clamp_min(1e-12).double()
    with warnings.catch_warnings():
        # PyTorch will remove quantized tensors some day, but this version's fastest kernel takes its weight as one.
        warnings.simplefilter("ignore")
        rounded = torch.quantize_per_channel(
            weight.float(), scale, torch.zeros(len(scale), dtype=torch.long), 0, torch.qint8
        )
        packed = torch.ops.quantized.linear_prepack(rounded, bias)
    # Without VNNI, products of two 8-bit numbers are accumulated in 16 bits, which overflow, so inputs get 7 bits.
    narrow = not torch.cpu._is_vnni_supported()
    return lambda x: torch.ops.quantized.linear_dynamic.default(x, packed, narrow)
