"""The encoder's convolutions over few inputs per output: strided ones of kernel 3, and depthwise ones over time.

They are bound by memory, not by arithmetic. Where code is compiled, those over time are written as sums of shifted
products, which the compiler fuses with the activation, mask and bias around them; elsewhere the library's convolution
is faster.

Shapes: B utterances, H × W positions, C channels, last in memory; T frames, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def strided(layer: nn.Conv2d, x_BHWC: Tensor) -> Tensor:
    """Kernel 3, stride 2, padding 1: (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, C'), depthwise (C' = C) or from one channel."""
    weight, bias = _like(layer, x_BHWC)
    x = F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight, bias, stride=2, padding=1, groups=layer.groups)
    return x.permute(0, 2, 3, 1)


def depthwise(layer: nn.Conv1d, x_BTD: Tensor) -> Tensor:
    """A depthwise convolution over time, kernel 2·p + 1 and padding p: (B, T, D) → (B, T, D)."""
    if torch.compiler.is_compiling():
        return depthwise_by_shifts(layer, x_BTD)
    # (B, T, D) is what channels last calls (B, D, 1, T), so nothing is transposed in memory.
    weight, bias = _like(layer, x_BTD)
    padding = (0, layer.kernel_size[0] // 2)
    x = F.conv2d(x_BTD.transpose(1, 2)[:, :, None], weight[:, :, None], bias, padding=padding, groups=layer.groups)
    return x[:, :, 0].transpose(1, 2)


def depthwise_by_shifts(layer: nn.Conv1d, x_BTD: Tensor) -> Tensor:
    """`depthwise` as a sum over the kernel's taps."""
    x, frames, reach = _wide(x_BTD), x_BTD.shape[1], layer.kernel_size[0] // 2
    weight, bias = _like(layer, x)
    weight_DK = weight.flatten(1)
    padded, result = F.pad(x, (0, 0, reach, reach)), bias
    for tap in range(layer.kernel_size[0]):
        result = result + padded.narrow(1, tap, frames) * weight_DK[:, tap]
    return result.to(x_BTD.dtype)


def _wide(x: Tensor) -> Tensor:
    """Float32 at least, as a convolution accumulates."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _like(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias in the type of `x`."""
    assert layer.bias is not None
    return layer.weight.to(x.dtype), layer.bias.to(x.dtype)
