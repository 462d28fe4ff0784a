"""NeMo's order of operations: `Canary` under bf16 autocast, uncompiled, as a reference for speed and for loss curves.

    with autocast_order(model) as reference:      # an nn.Module for `train_step` in place of the model
        train_step(reference, ...)

The rules of autocast on CUDA: matrix products, convolutions and attention take bf16, layer norms take and return
float32, and sums take the wider type of their terms. So the residual stream is float32 from the first block's last norm
on. On a CPU autocast leaves layer norms in their input's type; here they return float32 there too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytrain.model.block import Block
from raytrain.model.canary import Canary, CanaryOutput
from raytrain.model.decoder import TransformerDecoder
from raytrain.model.encoder import RelativeAttention
from raytrain.model.features import mask_until
from raytrain.model.mixed import MixedLayerNorm, MixedLinear
from raytrain.model.relative_attention_twin import shift


class _Autocast(nn.Module):
    """`module` under bf16 autocast; named as in DDP, so that what unwraps a model finds it."""

    def __init__(self, module: Canary) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor, dtype: torch.dtype | None = None) -> CanaryOutput:
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return self.module(*inputs)


@contextlib.contextmanager
def autocast_order(model: Canary) -> Iterator[nn.Module]:
    """A module that computes in NeMo's order with the model's weights while the context lasts; it is called as the
    model is, and a `dtype` other than bf16 turns autocast off."""
    replaced = [(module, _ORDER[type(module)]) for module in model.modules() if type(module) in _ORDER]
    with uncompiled(model):
        for module, forward in replaced:
            module.forward = partial(forward, module)
        try:
            yield _Autocast(model)
        finally:
            for module, _ in replaced:
                del module.forward


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Blocks run uncompiled while the context lasts."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    compiled = [block.compiled for block in blocks]
    for block in blocks:
        block.compiled = None
    try:
        yield
    finally:
        for block, run in zip(blocks, compiled, strict=True):
            block.compiled = run


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _relative_attention(attention: RelativeAttention, x_BTD: Tensor, positions_PD: Tensor, lengths_B: Tensor) -> Tensor:
    """By separate operators, with the scores' position term as a bias; the sums with learned biases are float32."""
    batch, time, width = x_BTD.shape
    split = (batch, time, attention.heads, width // attention.heads)
    q, k = attention.linear_q(x_BTD).view(split), attention.linear_k(x_BTD).view(split)
    v = attention.linear_v(x_BTD).view(split)
    p_HKP = attention.linear_pos(positions_PD).view(-1, attention.heads, split[-1]).permute(1, 2, 0)
    by_position = torch.matmul((q + attention.pos_bias_v).transpose(1, 2), p_HKP)
    scores = shift(by_position) / math.sqrt(split[-1])
    scores = scores.masked_fill(~mask_until(lengths_B, time)[:, None, None], float("-inf"))
    mixed = F.scaled_dot_product_attention(
        (q + attention.pos_bias_u).transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=scores.to(v.dtype),
        dropout_p=attention.dropout if attention.training else 0.0,
    )
    return attention.linear_out(mixed.transpose(1, 2).reshape(batch, time, width))


def _decoder(decoder: TransformerDecoder, ids_BU: Tensor, states_BTD: Tensor, cross_mask: Tensor) -> Tensor:
    """With a float32 residual stream, whatever the type of the encoder's states."""
    x = decoder._embedding(ids_BU)
    for layer in decoder._decoder.layers:
        x = layer(x, states_BTD, cross_mask)
    return decoder._decoder.final_layer_norm(x)


_ORDER: dict[type[nn.Module], Callable[..., Any]] = {
    MixedLayerNorm: _layer_norm,
    MixedLinear: _linear,
    RelativeAttention: _relative_attention,
    TransformerDecoder: _decoder,
}
