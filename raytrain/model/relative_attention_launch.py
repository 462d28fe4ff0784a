"""Tile sizes and launches of the kernels of `relative_attention_kernels.py`. Importing this file imports Triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from raytrain.model import relative_attention_kernels as kernels
from raytrain.model.relative_attention_twin import Gradients, Inputs

_HOPPER = 9


@dataclass(frozen=True)
class Tiling:
    """Frames of a tile, warps of a program, and stages of loads in flight."""

    block: int
    warps: int
    stages: int


def tiling_for(width: int, dtype: torch.dtype, capability: int, precision: str) -> Tiling:
    """The tiling for heads of `width` channels on cards of major compute capability `capability`.

    There is one for each, since trying several would take seconds at every start. Hopper multiplies tiles of 64 rows
    and has 227 KiB of shared memory; elsewhere 99 KiB must do, and larger tiles need more registers than there are.
    """
    if dtype.itemsize == 4:
        return Tiling(32 if precision == "tf32" else 16, 4, 1)
    return Tiling(64, 8, 2) if capability == _HOPPER else Tiling(32, 4 if width <= 64 else 8, 2)


def _tiling(q: Tensor, tiling: Tiling | None) -> Tiling:
    return tiling or tiling_for(q.shape[-1], q.dtype, _capability(q.device), _precision(q.dtype))


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as PyTorch's matrix products are."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@dataclass(frozen=True)
class _Call:
    """What all kernels take: k and v with the same strides, the others contiguous."""

    tensors: tuple[Tensor, ...]
    numbers: tuple[int | float, ...]
    constants: dict[str, object]


def _call(inputs: Inputs, dropout: float, block: int) -> _Call:
    q_u, q_v, k, v, positions, lengths, noise = inputs
    batch, time, heads, width = q_u.shape
    if k.stride() != v.stride() or k.stride(-1) != 1:
        k, v = k.contiguous(), v.contiguous()
    noise_or_any = lengths if noise is None else noise
    tensors = (q_u.contiguous(), q_v.contiguous(), k, v, positions.contiguous(), lengths.contiguous(), noise_or_any)
    cut = round(dropout * 2**24)
    numbers = (time, heads, k.stride(0), k.stride(1), k.stride(2), width**-0.5, cut, 2**24 / (2**24 - cut))
    constants = {"K": width, "M": block, "DROPOUT": noise is not None, "PRECISION": _precision(q_u.dtype)}
    return _Call(tensors, (batch * heads, *numbers), constants)


def forward(inputs: Inputs, dropout: float, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, K), and each row's logarithm of its sum of exponentials, (B, H, T) float32."""
    tiling = _tiling(inputs.q_u, tiling)
    batch, time, heads, _ = inputs.q_u.shape
    call = _call(inputs, dropout, tiling.block)
    out = torch.empty_like(call.tensors[0])
    lse = torch.empty((batch, heads, time), dtype=torch.float32, device=out.device)
    with torch.cuda.device_of(out):
        kernels.forward_kernel[(batch * heads * triton.cdiv(time, tiling.block),)](
            *call.tensors, out, lse, *call.numbers, **call.constants, num_warps=tiling.warps, num_stages=tiling.stages
        )
    return out, lse


def backward(
    d_out: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, dropout: float, parts: int, tiling: Tiling | None = None
) -> Gradients:
    """Gradients; that of the positions in shares (2·parts, P, H, K) float32, which are to be summed."""
    tiling = _tiling(inputs.q_u, tiling)
    batch, time, heads, _ = inputs.q_u.shape
    call = _call(inputs, dropout, tiling.block)
    pairs, *numbers = call.numbers
    options = {**call.constants, "num_warps": tiling.warps, "num_stages": tiling.stages}
    d_out, delta = d_out.contiguous(), torch.empty_like(lse)
    d_q_u, d_q_v, d_k, d_v = (torch.empty_like(call.tensors[0]) for _ in range(4))
    shares = torch.empty((2 * parts, *inputs.positions.shape), dtype=torch.float32, device=out.device)
    tiles = triton.cdiv(time, tiling.block)
    with torch.cuda.device_of(out):
        # The first kernel writes `delta`, which the two after it read.
        kernels.query_gradient_kernel[(pairs * tiles,)](
            *call.tensors, out, lse, d_out, delta, d_q_u, d_q_v, *call.numbers, **options
        )
        kernels.key_gradient_kernel[(pairs * tiles,)](
            *call.tensors, lse, d_out, delta, d_k, d_v, *call.numbers, **options
        )
        kernels.position_gradient_kernel[((2 * tiles - 1) * heads * parts,)](
            *call.tensors, lse, d_out, delta, shares, pairs, parts, *numbers, **options
        )
    return Gradients(d_q_u, d_q_v, d_k, d_v, shares)
