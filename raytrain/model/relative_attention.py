"""Attention with relative positions (Dai et al. 2019) that keeps no T² scores, as the operator
`raytrain::relative_attention`.

On a GPU it runs the Triton kernels of `relative_attention_kernels.py`, after they agreed there with plain PyTorch; on
other devices, or where they do not, that plain PyTorch. Either way backward keeps the inputs, the output and one number
a row, and computes the weights again. Shapes: B utterances, T frames, H heads, K channels of a head, P = 2T - 1.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from raytrain.model import relative_attention_twin as twin
from raytrain.model.relative_attention_twin import Inputs

WIDTHS = (16, 32, 64, 128)  # channels of a head that the kernels take
_HALF = (torch.bfloat16, torch.float16)
# Largest difference of a kernel's tensor from plain PyTorch's in float32, as a part of its norm.
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 4e-3}
_PROGRAMS = 512  # of the kernel that sums over the batch: enough for four on each multiprocessor


def relative_attention(
    q_u: Tensor, q_v: Tensor, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor, dropout: float
) -> Tensor:
    """Mix values (B, T, H, K) by softmax of (q_u_i·k_j + q_v_i·p_{T-1-i+j}) / √K over keys j < length.

    q_u, q_v, k, v: (B, T, H, K) of any strides; `positions` (2T - 1, H, K), from relative position T - 1 to -(T - 1);
    all of the same dtype. `lengths` (B,) integers >= 1. Weights are dropped with probability `dropout` (0 for none) by
    random words that PyTorch's generator draws, so that a recomputed block drops the same.
    """
    noise = _noise(q_u) if dropout > 0 else None
    out, _ = _forward(q_u, q_v, k, v, positions, lengths, noise, dropout)
    return out


def _noise(q: Tensor) -> Tensor:
    """Two random words for each row of scores: (2, B, H, T) int32."""
    batch, time, heads, _ = q.shape
    return torch.randint(-(2**31), 2**31, (2, batch, heads, time), dtype=torch.int32, device=q.device)


@torch.library.custom_op("raytrain::relative_attention", mutates_args=())
def _forward(
    q_u: Tensor, q_v: Tensor, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor, noise: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output (B, T, H, K), and each row's logarithm of its sum of exponentials, (B, H, T) float32."""
    inputs = Inputs(q_u, q_v, k, v, positions, lengths, noise)
    _check(inputs)
    if _uses_kernels(q_u, noise is not None):
        from raytrain.model import relative_attention_launch

        return relative_attention_launch.forward(inputs, dropout)
    with torch.autocast(q_u.device.type, enabled=False):
        out, lse = twin.forward(inputs.to(_product_dtype(q_u)), dropout)
    return out.to(q_u.dtype), lse


@_forward.register_fake
def _(
    q_u: Tensor, q_v: Tensor, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor, noise: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, time, heads, _ = q_u.shape
    return q_u.new_empty(q_u.shape), q_u.new_empty((batch, heads, time), dtype=_sum_dtype(q_u))


@torch.library.custom_op("raytrain::relative_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, q_u: Tensor, q_v: Tensor, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor,
    noise: Tensor | None, out: Tensor, lse: Tensor, dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q_u, q_v, k, v; and shares of that of the positions, (2·parts, P, H, K) float32, to be summed."""
    inputs, parts = Inputs(q_u, q_v, k, v, positions, lengths, noise), _num_parts(q_u)
    if _uses_kernels(q_u, noise is not None):
        from raytrain.model import relative_attention_launch

        return relative_attention_launch.backward(d_out, inputs, out, lse, dropout, parts)
    dtype = _product_dtype(q_u)
    with torch.autocast(q_u.device.type, enabled=False):
        gradients = twin.backward(d_out.to(dtype), inputs.to(dtype), out.to(dtype), lse, dropout)
    d_q_u, d_q_v, d_k, d_v = (gradient.to(q_u.dtype) for gradient in gradients[:4])
    shares = torch.zeros((2 * parts, *positions.shape), dtype=lse.dtype, device=q_u.device)
    shares[0] = gradients.positions
    return d_q_u, d_q_v, d_k, d_v, shares


@_backward.register_fake
def _(
    d_out: Tensor, q_u: Tensor, q_v: Tensor, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor,
    noise: Tensor | None, out: Tensor, lse: Tensor, dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_q_u, d_q_v, d_k, d_v = (q_u.new_empty(q_u.shape) for _ in range(4))
    shares = q_u.new_empty((2 * _num_parts(q_u), *positions.shape), dtype=_sum_dtype(q_u))
    return d_q_u, d_q_v, d_k, d_v, shares


def _keep(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, dropout = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.dropout = dropout  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: FunctionCtx, d_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, dropout = ctx.saved_tensors, ctx.dropout  # type: ignore[attr-defined]
    d_q_u, d_q_v, d_k, d_v, shares = _backward(d_out, *saved, dropout)
    return d_q_u, d_q_v, d_k, d_v, shares.sum(0).to(saved[4].dtype), None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _sum_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _num_parts(q: Tensor) -> int:
    """Into how many parts the batch is split for the positions' gradient; also for symbolic sizes."""
    if q.device.type == "cpu":
        return 1
    batch, time, heads, _ = q.shape
    parts = torch.sym_max(_PROGRAMS // ((time + 31) // 32 * heads), 1)
    return torch.sym_min(parts, batch)


def _product_dtype(q: Tensor) -> torch.dtype:
    """Of which numbers plain PyTorch computes products: on a CPU those of 16 bits are no faster, and less exact."""
    return torch.float32 if q.dtype in _HALF and q.device.type == "cpu" else q.dtype


def _check(inputs: Inputs) -> None:
    batch, time, heads, width = inputs.q_u.shape
    shapes = [tuple(x.shape) for x in inputs[1:6]]
    expected = [tuple(inputs.q_u.shape)] * 3 + [(2 * time - 1, heads, width), (batch,)]
    if shapes != expected:
        raise ValueError(f"shapes of q_v, k, v, positions and lengths: got {shapes}, expected {expected}")
    dtypes = {x.dtype for x in inputs[:5]}
    if len(dtypes) > 1:
        raise TypeError(f"q_u, q_v, k, v and positions must have the same dtype, got {sorted(map(str, dtypes))}")


def _uses_kernels(q: Tensor, drops: bool) -> bool:
    if q.device.type != "cuda":
        return False
    fault = kernel_fault(q.device, q.shape[-1], q.dtype, drops)
    if fault is not None:
        _warn_once(fault)
    return fault is None


@cache
def _warn_once(fault: str) -> None:
    warnings.warn(
        f"attention runs in plain PyTorch, slower and with more memory, because {fault}", RuntimeWarning, stacklevel=2
    )


@cache
def kernel_fault(device: torch.device, width: int, dtype: torch.dtype, drops: bool) -> str | None:
    """Why the kernels can't be used for heads of `width` channels, or None. The first call compiles and checks them."""
    if width not in WIDTHS:
        return f"the kernels are for heads of {', '.join(map(str, WIDTHS))} channels, not {width}"
    if dtype not in _TOLERANCE:
        return f"the kernels are for {', '.join(map(str, _TOLERANCE))}, not {dtype}"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return _disagreement(device, width, dtype, 0.1 if drops else 0.0)
    except Exception as error:  # a missing compiler, too little shared memory, an unknown device
        return f"the kernels failed on {device}: {type(error).__name__}: {error}"


def _disagreement(device: torch.device, width: int, dtype: torch.dtype, dropout: float) -> str | None:
    """Where the kernels and plain PyTorch differ on a small batch; draws nothing from PyTorch's generators."""
    from raytrain.model import relative_attention_launch

    inputs, d_out = _example(device, width, dtype, dropout > 0)
    out, lse = relative_attention_launch.forward(inputs, dropout)
    gradients = relative_attention_launch.backward(d_out, inputs, out, lse, dropout, 2)
    wide = inputs.to(torch.float32)
    expected_out, expected_lse = twin.forward(wide, dropout)
    expected = twin.backward(d_out.float(), wide, expected_out, expected_lse, dropout)
    got = {"out": out, "lse": lse, **gradients._asdict(), "positions": gradients.positions.sum(0)}
    for name, y in {"out": expected_out, "lse": expected_lse, **expected._asdict()}.items():
        difference = float((got[name].float() - y).norm() / y.norm())
        if not difference <= _TOLERANCE[dtype]:
            return f"their {name} differs by {difference:.1e} of its norm from plain PyTorch's on {device}"
    return None


def _example(device: torch.device, width: int, dtype: torch.dtype, drops: bool) -> tuple[Inputs, Tensor]:
    """Inputs of two heads, and the gradient of the output."""
    batch, time, heads = 3, 150, 2
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn((5, batch, time, heads, width), generator=generator)
    positions = torch.randn((2 * time - 1, heads, width), generator=generator).to(device, dtype)
    noise = torch.randint(-(2**31), 2**31, (2, batch, heads, time), generator=generator, dtype=torch.int32)
    q_u, q_v, k, v, d_out = normal.to(device, dtype)
    lengths = torch.tensor([time, 1, 70], device=device)
    return Inputs(q_u, q_v, k, v, positions, lengths, noise.to(device) if drops else None), d_out
