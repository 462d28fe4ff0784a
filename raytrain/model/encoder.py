"""FastConformer encoder: 8× depthwise-striding subsampling, then Conformer blocks with relative positions.

Shapes: B utterances, T frames (10 ms before, 80 ms after subsampling), D width, H heads, K = D/H.
Sources: Gulati et al. 2020 (Conformer), Rekesh et al. 2023 (FastConformer), Dai et al. 2019 (positions).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn import functional as F

from raytrain.model.block import Block
from raytrain.model.checkpointing import run_block
from raytrain.model.config import Checkpointing, ModelConfig
from raytrain.model.convolution import depthwise, strided
from raytrain.model.dropout import dropout
from raytrain.model.features import mask_until
from raytrain.model.linear import pointwise
from raytrain.model.mixed import MixedLayerNorm, MixedLinear
from raytrain.model.module_list import ModuleList
from raytrain.model.relative_attention import relative_attention
from raytrain.model.relative_attention_twin import shift


def subsampled(lengths: Tensor) -> Tensor:
    """Frames after three convolutions of stride 2, kernel 3, padding 1."""
    for _ in range(3):
        lengths = (lengths - 1) // 2 + 1
    return lengths


class MaskedReLU(torch.autograd.Function):
    """ReLU of x·mask. Where the mask is 0, the output is too, so the mask needs no backward pass; these are the model's
    largest activations."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, mask: Tensor) -> Tensor:
        result = (x * mask).relu_()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, result, 0), None


class Subsampling(nn.Module):
    """mel (B, M, T) → (B, ⌈T/8⌉, D); padding is zeroed before every convolution."""

    def __init__(self, mel_bins: int, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, groups=channels, stride=2, padding=1),
            nn.Conv2d(channels, channels, 1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, groups=channels, stride=2, padding=1),
            nn.Conv2d(channels, channels, 1),
            nn.ReLU(),
        )
        self.out = MixedLinear(channels * mel_bins // 8, width)

    def forward(self, mel_BMT: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        # Channels last makes the 1×1 convolutions matrix products, and the strided ones about twice as fast.
        x = (mel_BMT.transpose(1, 2) * mask_until(frames_B, mel_BMT.shape[2])[:, :, None]).contiguous()[..., None]
        lengths = frames_B
        for layer, mixing in ((self.conv[0], None), (self.conv[2], self.conv[3]), (self.conv[5], self.conv[6])):
            assert isinstance(layer, nn.Conv2d)
            x = strided(layer, x)
            lengths = (lengths - 1) // 2 + 1
            if mixing is not None:
                x = pointwise(mixing, x)
            # 1×1 convolutions see one frame: only strided convolutions need the mask.
            x = MaskedReLU.apply(x, mask_until(lengths, x.shape[1])[:, :, None, None])
        # NeMo's features are (channel, mel bin) with the bin last.
        return self.out(x.transpose(2, 3).flatten(2)), lengths


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.linear1, self.linear2 = MixedLinear(width, inner), MixedLinear(inner, width)
        self.dropout = dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.linear2(dropout(F.silu(self.linear1(x_BTD)), self.dropout, self.training))


class RelativeAttention(nn.Module):
    """Self-attention whose scores add content and relative-position terms, each with a learned bias."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (MixedLinear(width, width) for _ in range(4))
        self.linear_pos = MixedLinear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, width // heads))
        self.fused = False  # whether training keeps no scores

    def forward(self, x_BTD: Tensor, positions_PD: Tensor, lengths_B: Tensor) -> Tensor:
        heads = (self.heads, -1)
        q, k, v = (layer(x_BTD).unflatten(2, heads) for layer in (self.linear_q, self.linear_k, self.linear_v))
        p_PHK = self.linear_pos(positions_PD).unflatten(1, heads)
        q_u, q_v = q + self.pos_bias_u.to(q.dtype), q + self.pos_bias_v.to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        attend = relative_attention if self.fused and self.training else attention_with_scores
        return self.linear_out(attend(q_u, q_v, k, v, p_PHK, lengths_B, dropout).flatten(2))


def attention_with_scores(
    q_u: Tensor, q_v: Tensor, k: Tensor, v: Tensor, p_PHK: Tensor, lengths_B: Tensor, dropout: float
) -> Tensor:
    """What `relative_attention` computes, (B, T, H, K), by scores in memory: on a CPU, and in evaluation."""
    by_position = torch.matmul(q_v.transpose(1, 2), p_PHK.permute(1, 2, 0))
    scores = shift(by_position) / math.sqrt(q_u.shape[3])
    scores = scores.masked_fill(~mask_until(lengths_B, q_u.shape[1])[:, None, None], float("-inf"))
    q, k, v = q_u.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=scores, dropout_p=dropout).transpose(1, 2)


class Convolution(nn.Module):
    """Pointwise, GLU, depthwise over time, batch norm, SiLU, pointwise; (B, T, D) → (B, T, D)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1)
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=(kernel - 1) // 2, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        x = pointwise(self.pointwise_conv1, x_BTD)
        x = depthwise(self.depthwise_conv, F.glu(x) * mask_until(lengths_B, x_BTD.shape[1])[:, :, None])
        x = F.silu(self.batch_norm(x.flatten(0, 1)).view_as(x))
        return pointwise(self.pointwise_conv2, x)


class ConformerBlock(Block):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.encoder_width, config.encoder_width * config.encoder_ff_factor
        self.norm_feed_forward1 = MixedLayerNorm(width)
        self.feed_forward1 = FeedForward(width, inner, config.dropout)
        self.norm_self_att = MixedLayerNorm(width)
        self.self_attn = RelativeAttention(width, config.encoder_heads, config.dropout)
        self.norm_conv = MixedLayerNorm(width)
        self.conv = Convolution(width, config.conv_kernel)
        self.norm_feed_forward2 = MixedLayerNorm(width)
        self.feed_forward2 = FeedForward(width, inner, config.dropout)
        self.norm_out = MixedLayerNorm(width)
        self.dropout = config.dropout

    def compute(self, x: Tensor, positions_PD: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D); frames from an utterance's length on are padding. No length may be 0."""
        x = x + 0.5 * self._drop(self.feed_forward1(self.norm_feed_forward1(x)))
        x = x + self._drop(self.self_attn(self.norm_self_att(x), positions_PD, lengths_B))
        x = x + self._drop(self.conv(self.norm_conv(x), lengths_B))
        x = x + 0.5 * self._drop(self.feed_forward2(self.norm_feed_forward2(x)))
        return self.norm_out(x)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)


class FastConformer(nn.Module):
    """mel (B, M, T), frames (B,) → states (B, ⌈T/8⌉, D), lengths (B,)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_encode = Subsampling(config.mel_bins, config.subsampling_channels, config.encoder_width)
        self.layers: ModuleList[ConformerBlock] = ModuleList(
            ConformerBlock(config) for _ in range(config.encoder_layers)
        )
        self.dropout = config.dropout
        self.checkpointing: Checkpointing = "none"  # what blocks keep for their backward pass

    def forward(self, mel_BMT: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        x, lengths = self.pre_encode(mel_BMT, frames_B)
        positions = relative_positions(x.shape[1], x.shape[2], x.device).to(x.dtype)
        # An utterance shorter than one frame still attends to its first one: no row may be masked whole.
        attended = lengths.clamp_min(1)
        x = dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = run_block(layer, self.checkpointing, x, positions, attended)
        return x, lengths


def relative_positions(time: int, width: int, device: torch.device) -> Tensor:
    """(2·time−1, width) sinusoids of positions time−1 … −(time−1): sine in even, cosine in odd dimensions."""
    position = torch.arange(time - 1, -time, -1, device=device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / width))
    return torch.stack((torch.sin(position * rate), torch.cos(position * rate)), dim=2).flatten(1)
