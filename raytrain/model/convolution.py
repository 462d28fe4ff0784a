"""The encoder's convolutions over few inputs per output: strided ones of kernel 3, and depthwise ones over time.

They are bound by memory, not by arithmetic. Where code is compiled, those over time and the strided one from a single
channel are written as sums of shifted products, which the compiler fuses with the activation, mask and bias around
them; elsewhere the library's convolution is faster. The depthwise strided ones stay the library's: their backward pass
by shifts moves more bytes.

Shapes: B utterances, H × W positions, C channels, last in memory; T frames, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def strided(layer: nn.Conv2d, x_BHWC: Tensor) -> Tensor:
    """Kernel 3, stride 2, padding 1: (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, C'), depthwise (C' = C) or from one channel."""
    if torch.compiler.is_compiling() and layer.in_channels == 1:
        return strided_by_shifts(layer, x_BHWC)
    weight, bias = _like(layer, x_BHWC)
    x = F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight, bias, stride=2, padding=1, groups=layer.groups)
    return x.permute(0, 2, 3, 1)


def strided_by_shifts(layer: nn.Conv2d, x_BHWC: Tensor) -> Tensor:
    """`strided` for even H and W: output i sees input 2i − 1, the odd position before, and 2i and 2i + 1."""
    x = _wide(x_BHWC)
    weight_CK, bias = _weights(layer, x)
    rows = x.unflatten(1, (-1, 2))
    result = bias
    for i, of_row in enumerate(_taps(rows[:, :, 0], rows[:, :, 1], 1)):
        columns = of_row.unflatten(2, (-1, 2))
        for j, of_column in enumerate(_taps(columns[:, :, :, 0], columns[:, :, :, 1], 2)):
            result = result + of_column * weight_CK[:, 3 * i + j]
    return result.to(x_BHWC.dtype)


def _taps(even: Tensor, odd: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs 2i − 1, 2i and 2i + 1 along a dimension."""
    size = odd.shape[dim]
    before = F.pad(odd, (0, 0) * (odd.ndim - 1 - dim) + (1, 0)).narrow(dim, 0, size)
    return before, even, odd


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
    weight_DK, bias = _weights(layer, x)
    padded, result = F.pad(x, (0, 0, reach, reach)), bias
    for tap in range(layer.kernel_size[0]):
        result = result + padded.narrow(1, tap, frames) * weight_DK[:, tap]
    return result.to(x_BTD.dtype)


def _wide(x: Tensor) -> Tensor:
    """Float32 at least, as a convolution accumulates."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _weights(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (C, kernel positions) and bias (C,) in the type of `x`."""
    assert layer.bias is not None
    return layer.weight.flatten(1).to(x.dtype), layer.bias.to(x.dtype)


def _like(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None
    return layer.weight.to(x.dtype), layer.bias.to(x.dtype)
