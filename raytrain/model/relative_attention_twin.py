"""Attention with relative positions in plain PyTorch: what the kernels compute, with T² scores in memory.

It runs where the kernels do not, and checks them. With the same noise dropout zeroes the same weights. Products are of
the inputs' dtype; scores and weights are in float32, or in float64 for inputs in float64.

Shapes: B utterances, T frames, H heads, K channels of a head, P = 2T - 1 positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Inputs(NamedTuple):
    """q_u, q_v, k, v (B, T, H, K), positions (P, H, K), lengths (B,), and with dropout noise (2, B, H, T) int32."""

    q_u: Tensor
    q_v: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    lengths: Tensor
    noise: Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same with numbers of `dtype`."""
        q_u, q_v, k, v, positions = (x.to(dtype) for x in self[:5])
        return Inputs(q_u, q_v, k, v, positions, self.lengths, self.noise)


class Gradients(NamedTuple):
    """Of q_u, q_v, k, v (B, T, H, K) and positions."""

    q_u: Tensor
    q_v: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor


def forward(inputs: Inputs, dropout: float) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, K), and each row's logarithm of its sum of exponentials, (B, H, T) float32 at least."""
    scores_BHTT = _scores(inputs)
    lse_BHT = scores_BHTT.logsumexp(-1)
    weights_BHTT = _dropped((scores_BHTT - lse_BHT[..., None]).exp_(), inputs.noise, dropout)
    v_BHTK = inputs.v.transpose(1, 2)
    return (weights_BHTT.to(v_BHTK.dtype) @ v_BHTK).transpose(1, 2).contiguous(), lse_BHT


def backward(d_out: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, dropout: float) -> Gradients:
    """Gradients from that of the output, (B, T, H, K); that of the positions (P, H, K) is in float32 at least."""
    q_u, q_v, k, v, positions, _, noise = inputs
    d_out_BHTK, delta_BHT1 = d_out.transpose(1, 2), (d_out.to(lse.dtype) * out).sum(-1).transpose(1, 2)[..., None]
    weights_BHTT = (_scores(inputs) - lse[..., None]).exp_()
    d_v_BHTK = _dropped(weights_BHTT, noise, dropout).to(v.dtype).mT @ d_out_BHTK
    d_weights_BHTT = _dropped((d_out_BHTK @ v.permute(0, 2, 3, 1)).to(lse.dtype), noise, dropout)
    d_scores_BHTT = (weights_BHTT * (d_weights_BHTT - delta_BHT1) * q_u.shape[-1] ** -0.5).to(q_u.dtype)
    d_by_position_BHTP = unshift(d_scores_BHTT)
    d_positions = torch.einsum("bhtp,bthk->phk", d_by_position_BHTP, q_v).to(lse.dtype)
    d_q_v_BHTK = d_by_position_BHTP @ positions.transpose(0, 1)
    gradients = d_scores_BHTT @ k.transpose(1, 2), d_q_v_BHTK, d_scores_BHTT.mT @ q_u.transpose(1, 2), d_v_BHTK
    d_q_u, d_q_v, d_k, d_v = (x_BHTK.transpose(1, 2).contiguous() for x_BHTK in gradients)
    return Gradients(d_q_u, d_q_v, d_k, d_v, d_positions)


def _scores(inputs: Inputs) -> Tensor:
    """(B, H, T, T), -inf for keys after the last."""
    q_u, q_v, k, _, positions, lengths, _ = inputs
    dtype = torch.promote_types(q_u.dtype, torch.float32)
    content_BHTT = (q_u.transpose(1, 2) @ k.permute(0, 2, 3, 1)).to(dtype)
    by_position_BHTP = q_v.transpose(1, 2) @ positions.permute(1, 2, 0)
    scores_BHTT = (content_BHTT + shift(by_position_BHTP)) * q_u.shape[-1] ** -0.5
    padding_BT = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
    return scores_BHTT.masked_fill_(padding_BT[:, None, None], float("-inf"))


def shift(x_BHTP: Tensor) -> Tensor:
    """(B, H, T, P) by relative position T-1 … -(T-1) → (B, H, T, T), where (i, j) has position i - j."""
    batch, heads, time, _ = x_BHTP.shape
    # Sizes by `time` alone: torch.compile can't show that 2T - 1 and the number of positions are the same.
    padded = F.pad(x_BHTP, (1, 0)).reshape(batch, heads, 2 * time, time)
    return padded[:, :, 1:].reshape(batch, heads, time, 2 * time - 1)[..., :time]


def unshift(x_BHTT: Tensor) -> Tensor:
    """The transpose of `shift`: each score's value where `shift` takes it from, zeros elsewhere."""
    batch, heads, time, _ = x_BHTT.shape
    flat = F.pad(x_BHTT, (0, time - 1)).flatten(2)
    return F.pad(flat, (time, 0)).view(batch, heads, time, 2 * time)[..., 1:]


def _dropped(x_BHTT: Tensor, noise: Tensor | None, dropout: float) -> Tensor:
    if noise is None:
        return x_BHTT
    cut = round(dropout * 2**24)
    return x_BHTT * kept(noise, x_BHTT.shape[-1], cut) * (2**24 / (2**24 - cut))


def kept(noise: Tensor, time: int, cut: int) -> Tensor:
    """Noise (2, B, H, T) int32 → which scores (B, H, T, T) dropout keeps; as `_kept` of the kernels.

    Integers wrap around, and shifts of negative ones need a mask to bring in zeros.
    """
    x = noise[0, ..., None] + torch.arange(time, dtype=torch.int32, device=noise.device)
    x ^= (x >> 16) & 0xFFFF
    x *= 0x21F0AAAD
    x ^= noise[1, ..., None]
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x735A2D97
    x ^= (x >> 15) & 0x1FFFF
    return (x >> 8) & 0xFFFFFF >= cut
