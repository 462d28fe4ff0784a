"""Dropout that is also fast on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zero elements with `probability` and scale the others by 1/(1 − probability), in training.

    On a CPU PyTorch draws one random number for each element in a single thread, which takes a tenth of a training
    step. Here four elements share one 64-bit number; the probability is exact to 1/65536.
    """
    if not training or probability == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, probability, True)
    cut = round(probability * 65536)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= cut - 32768
    return x * keep.to(x.dtype).mul_(65536 / (65536 - cut))
