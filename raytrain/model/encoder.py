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

from raytrain.model.checkpointing import run_block
from raytrain.model.config import Checkpointing, ModelConfig
from raytrain.model.dropout import dropout
from raytrain.model.features import mask_until
from raytrain.model.linear import pointwise
from raytrain.model.module_list import ModuleList


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
        self.out = nn.Linear(channels * mel_bins // 8, width)

    def forward(self, mel_BMT: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        # Channels last makes the 1×1 convolutions matrix products, and the strided ones about twice as fast.
        x = mel_BMT.transpose(1, 2)[:, None] * mask_until(frames_B, mel_BMT.shape[2])[:, None, :, None]
        x = x.contiguous(memory_format=torch.channels_last)
        lengths = frames_B
        for strided, mixing in ((self.conv[0], None), (self.conv[2], self.conv[3]), (self.conv[5], self.conv[6])):
            x = strided(x)
            lengths = (lengths - 1) // 2 + 1
            if mixing is not None:
                x = pointwise(mixing, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            # 1×1 convolutions see one frame: only strided convolutions need the mask.
            x = MaskedReLU.apply(x, mask_until(lengths, x.shape[2])[:, None, :, None])
        return self.out(x.transpose(1, 2).flatten(2)), lengths


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.linear2(dropout(F.silu(self.linear1(x_BTD)), self.dropout, self.training))


class RelativeAttention(nn.Module):
    """Self-attention whose scores add content and relative-position terms, each with a learned bias."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(width, width) for _ in range(4))
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, width // heads))

    def forward(self, x_BTD: Tensor, positions_PD: Tensor, key_mask_B11T: Tensor) -> Tensor:
        batch, time, width = x_BTD.shape
        split = (batch, time, self.heads, width // self.heads)
        q, k = self.linear_q(x_BTD).view(split), self.linear_k(x_BTD).view(split)
        v = self.linear_v(x_BTD).view(split)
        p_HKP = self.linear_pos(positions_PD).view(-1, self.heads, split[-1]).permute(1, 2, 0)
        by_position = torch.matmul((q + self.pos_bias_v).transpose(1, 2), p_HKP)
        scores = shift(by_position) / math.sqrt(split[-1])
        scores = scores.masked_fill(~key_mask_B11T, float("-inf"))
        mixed = F.scaled_dot_product_attention(
            (q + self.pos_bias_u).transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=scores.to(v.dtype),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.linear_out(mixed.transpose(1, 2).reshape(batch, time, width))


def shift(x_BHTP: Tensor) -> Tensor:
    """(B, H, T, 2T−1) by relative position T−1 … −(T−1) → (B, H, T, T), where (i, j) has position i−j."""
    batch, heads, time, _ = x_BHTP.shape
    # Sizes by `time` alone: torch.compile can't show that 2T−1 and the number of positions are the same.
    padded = F.pad(x_BHTP, (1, 0)).reshape(batch, heads, 2 * time, time)
    return padded[:, :, 1:].reshape(batch, heads, time, 2 * time - 1)[..., :time]


class Convolution(nn.Module):
    """Pointwise, GLU, depthwise over time, batch norm, SiLU, pointwise; (B, T, D) → (B, T, D)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.padding = (kernel - 1) // 2
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1)
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=self.padding, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x_BTD: Tensor, valid_B1T: Tensor) -> Tensor:
        # (B, T, D) is what channels last calls (B, D, 1, T), so nothing is transposed in memory.
        x = pointwise(self.pointwise_conv1, x_BTD)
        x = F.glu(x) * valid_B1T.transpose(1, 2)
        x = self._depthwise(x.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)
        x = F.silu(self.batch_norm(x.flatten(0, 1)).view_as(x))
        return pointwise(self.pointwise_conv2, x)

    def _depthwise(self, x_BD1T: Tensor) -> Tensor:
        layer = self.depthwise_conv
        return F.conv2d(x_BD1T, layer.weight[:, :, None], layer.bias, padding=(0, self.padding), groups=layer.groups)


class ConformerBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.encoder_width, config.encoder_width * config.encoder_ff_factor
        self.norm_feed_forward1 = nn.LayerNorm(width)
        self.feed_forward1 = FeedForward(width, inner, config.dropout)
        self.norm_self_att = nn.LayerNorm(width)
        self.self_attn = RelativeAttention(width, config.encoder_heads, config.dropout)
        self.norm_conv = nn.LayerNorm(width)
        self.conv = Convolution(width, config.conv_kernel)
        self.norm_feed_forward2 = nn.LayerNorm(width)
        self.feed_forward2 = FeedForward(width, inner, config.dropout)
        self.norm_out = nn.LayerNorm(width)
        self.dropout = config.dropout

    def forward(self, x: Tensor, positions_PD: Tensor, valid_B1T: Tensor) -> Tensor:
        x = x + 0.5 * self._drop(self.feed_forward1(self.norm_feed_forward1(x)))
        x = x + self._drop(self.self_attn(self.norm_self_att(x), positions_PD, valid_B1T[:, None]))
        x = x + self._drop(self.conv(self.norm_conv(x), valid_B1T))
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
        valid = mask_until(lengths.clamp_min(1), x.shape[1])[:, None]
        x = dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = run_block(layer, self.checkpointing, x, positions, valid)
        return x, lengths


def relative_positions(time: int, width: int, device: torch.device) -> Tensor:
    """(2·time−1, width) sinusoids of positions time−1 … −(time−1): sine in even, cosine in odd dimensions."""
    position = torch.arange(time - 1, -time, -1, device=device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / width))
    return torch.stack((torch.sin(position * rate), torch.cos(position * rate)), dim=2).flatten(1)
