"""Run the attention's kernels in Triton's interpreter and print how far they are from plain PyTorch, as JSON.

    TRITON_INTERPRET=1 python interpreted_attention.py

A process of its own, since Triton reads the variable when it is imported, which PyTorch may have done already. The
interpreter multiplies bfloat16 numbers as if they were integers, so the cases are float32 and float16.
"""

import json
import sys

import torch

from raytrain.model import relative_attention_twin as twin
from raytrain.model.relative_attention_launch import Tiling, backward, forward

NAMES = ("out", "lse", "d_q_u", "d_q_v", "d_k", "d_v", "d_positions")
HEADS, WIDTH = 2, 16
# name: frames, block, dtype, dropout, parts of the batch, k and v as slices of one tensor
CASES = {
    "a frame": (1, 16, torch.float32, 0.0, 1, False),
    "less than a tile": (5, 16, torch.float32, 0.3, 2, False),
    "whole tiles": (48, 16, torch.float32, 0.0, 2, False),
    "ragged tiles": (37, 16, torch.float32, 0.0, 3, True),
    "ragged tiles, dropout": (37, 16, torch.float32, 0.1, 1, True),
    "larger tiles": (70, 32, torch.float32, 0.2, 2, True),
    "float16": (37, 16, torch.float16, 0.1, 2, False),
}


def amid_nan(x):
    """The same values with NaN before and after, so that reading outside shows."""
    buffer = torch.full((x.numel() + 2 * 4096,), float("nan"), dtype=x.dtype)
    inside = buffer[4096 : 4096 + x.numel()].view(x.shape)
    return inside.copy_(x)


def differences(frames, block, dtype, dropout, parts, fused):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([frames, max(1, frames // 3), max(1, frames - 1)])
    shape = (len(lengths), frames, HEADS, WIDTH)
    q_u, q_v, k, v, d_out = (amid_nan(torch.randn(shape, generator=generator).to(dtype)) for _ in range(5))
    if fused:
        kv = amid_nan(torch.cat([k.flatten(2), v.flatten(2)], 2))
        k, v = (half.unflatten(2, (HEADS, WIDTH)) for half in kv.chunk(2, 2))
        d_out = d_out.transpose(1, 2).contiguous().transpose(1, 2)
    positions = amid_nan(torch.randn((2 * frames - 1, HEADS, WIDTH), generator=generator).to(dtype))
    noise = None
    if dropout:
        noise_shape = (2, len(lengths), HEADS, frames)
        noise = torch.randint(-(2**31), 2**31, noise_shape, generator=generator, dtype=torch.int32)
    tiling = Tiling(block, 4, 1)
    inputs = twin.Inputs(q_u, q_v, k, v, positions, lengths, noise)
    out, lse = forward(inputs, dropout, tiling)
    *gradients, shares = backward(d_out, inputs, out, lse, dropout, parts, tiling)
    wide = inputs.to(torch.float64)
    expected_out, expected_lse = twin.forward(wide, dropout)
    expected = twin.backward(d_out.double(), wide, expected_out, expected_lse, dropout)
    pairs = zip((out, lse, *gradients, shares.sum(0)), (expected_out, expected_lse, *expected), strict=True)
    return [float((x.double() - y).abs().max() / y.abs().max().clamp_min(1)) for x, y in pairs]


if __name__ == "__main__":
    json.dump({name: dict(zip(NAMES, differences(*case), strict=True)) for name, case in CASES.items()}, sys.stdout)
