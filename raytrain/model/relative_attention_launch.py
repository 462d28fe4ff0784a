"""Tile sizes and launches of the kernels of `relative_attention_kernels.py`. Importing this file imports Triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from raytrain.model import relative_attention_kernels as kernels

# Shared memory of a multiprocessor: 227 KiB on H100 and H200, 163 KiB on A100, 99 KiB on most others.
_LARGE_SHARED_BYTES = 160 * 1024


@dataclass(frozen=True)
class Tiling:
    """Frames of a tile, and for each kernel the warps of a program and the stages of loads in flight."""

    block: int
    forward: tuple[int, int]
    queries: tuple[int, int]
    keys: tuple[int, int]
    positions: tuple[int, int]


def tiling_for(width: int, dtype: torch.dtype, shared_bytes: int) -> Tiling:
    """The tiling for heads of `width` channels; one each, since trying several would take seconds at every start."""
    is_half = dtype.itemsize == 2
    if is_half and (width <= 64 or shared_bytes >= _LARGE_SHARED_BYTES):
        warps = 4 if width <= 64 else 8
        return Tiling(64, (4, 2), (warps, 2), (warps, 2), (warps, 2))
    return Tiling(32, (4, 2), (4, 1), (4, 1), (4, 1))


@cache
def _shared_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def _tiling(q: Tensor, tiling: Tiling | None) -> Tiling:
    return tiling or tiling_for(q.shape[-1], q.dtype, _shared_bytes(q.device))


def _precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as PyTorch's matrix products are."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@dataclass(frozen=True)
class _Call:
    """What all kernels take: k and v with the same strides, the others contiguous."""

    tensors: tuple[Tensor, ...]
    numbers: tuple[int | float, ...]
    constants: dict[str, object]


def _call(
    q_u: Tensor, q_v: Tensor, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor, noise: Tensor | None,
    dropout: float, block: int,
) -> _Call:  # fmt: skip
    batch, time, heads, width = q_u.shape
    if k.stride() != v.stride() or k.stride(-1) != 1:
        k, v = k.contiguous(), v.contiguous()
    noise_or_any = lengths if noise is None else noise
    tensors = (q_u.contiguous(), q_v.contiguous(), k, v, positions.contiguous(), lengths.contiguous(), noise_or_any)
    cut = round(dropout * 2**24)
    numbers = (time, heads, k.stride(0), k.stride(1), k.stride(2), width**-0.5, cut, 2**24 / (2**24 - cut))
    constants = {"K": width, "M": block, "DROPOUT": noise is not None, "PRECISION": _precision(q_u.dtype)}
    return _Call(tensors, (batch * heads, *numbers), constants)


def forward(
    q_u: Tensor, q_v: Tensor, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor, noise: Tensor | None,
    dropout: float, tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `raytrain.model.relative_attention._forward`."""
    tiling = _tiling(q_u, tiling)
    batch, time, heads, _ = q_u.shape
    call = _call(q_u, q_v, k, v, positions, lengths, noise, dropout, tiling.block)
    out = torch.empty_like(call.tensors[0])
    lse = torch.empty((batch, heads, time), dtype=torch.float32, device=q_u.device)
    warps, stages = tiling.forward
    with torch.cuda.device_of(q_u):
        kernels.forward_kernel[(batch * heads * triton.cdiv(time, tiling.block),)](
            *call.tensors, out, lse, *call.numbers, **call.constants, num_warps=warps, num_stages=stages
        )
    return out, lse


def backward(
    d_out: Tensor, q_u: Tensor, q_v: Tensor, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor,
    noise: Tensor | None, out: Tensor, lse: Tensor, dropout: float, parts: int, tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `raytrain.model.relative_attention._backward`."""
    tiling = _tiling(q_u, tiling)
    batch, time, heads, _ = q_u.shape
    call = _call(q_u, q_v, k, v, positions, lengths, noise, dropout, tiling.block)
    pairs, *numbers = call.numbers
    d_out, delta = d_out.contiguous(), torch.empty_like(lse)
    d_q_u, d_q_v, d_k, d_v = (torch.empty_like(call.tensors[0]) for _ in range(4))
    d_positions = torch.empty((2 * parts, *positions.shape), dtype=torch.float32, device=q_u.device)
    tiles = triton.cdiv(time, tiling.block)
    with torch.cuda.device_of(q_u):
        # The first kernel writes `delta`, which the two after it read.
        kernels.query_gradient_kernel[(batch * heads * tiles,)](
            *call.tensors, out, lse, d_out, delta, d_q_u, d_q_v, *call.numbers, **call.constants,
            num_warps=tiling.queries[0], num_stages=tiling.queries[1],
        )  # fmt: skip
        kernels.key_gradient_kernel[(batch * heads * tiles,)](
            *call.tensors, lse, d_out, delta, d_k, d_v, *call.numbers, **call.constants,
            num_warps=tiling.keys[0], num_stages=tiling.keys[1],
        )  # fmt: skip
        kernels.position_gradient_kernel[((2 * tiles - 1) * heads * parts,)](
            *call.tensors, lse, d_out, delta, d_positions, pairs, parts, *numbers, **call.constants,
            num_warps=tiling.positions[0], num_stages=tiling.positions[1],
        )  # fmt: skip
    return d_q_u, d_q_v, d_k, d_v, d_positions
