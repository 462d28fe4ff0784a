"""Transformer decoder: pre-norm blocks with self-attention, cross-attention and a ReLU feed-forward layer.

Shapes: B utterances, U tokens, T encoder frames, D width, H heads. A cache of keys and values makes decoding
one token cost one token: self-attention keys are written into preallocated rows, cross-attention keys are
computed once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytrain.model.block import Block
from raytrain.model.checkpointing import run_block
from raytrain.model.config import Checkpointing, ModelConfig
from raytrain.model.dropout import dropout
from raytrain.model.linear import Linear, PreparedLinear, affine, affine_of
from raytrain.model.mixed import MixedLayerNorm, MixedLinear
from raytrain.model.module_list import ModuleList

Norm = tuple[Tensor, Tensor]


class LayerMaps(NamedTuple):
    """Layer norms (weight, bias) and linear maps of a decoder layer in the order of use.

    A step of one token is mostly overhead. Looking up weights once, and computing queries, keys and values in one
    product (`projections`), makes it about a third faster than calling the modules.
    """

    norm_1: Norm
    projections: Linear
    out: Linear
    norm_2: Norm
    query: Linear
    cross_out: Linear
    norm_3: Norm
    dense_in: Linear
    dense_out: Linear


@dataclass
class LayerCache:
    """One layer's state to continue decoding: `self_keys_values` (2, B, H, max, K) filled up to the position,
    `cross_keys` and `cross_values` (B, H, T, K), and its maps."""

    self_keys_values: Tensor
    cross_keys: Tensor
    cross_values: Tensor
    maps: LayerMaps

    def append(self, keys_values: Tensor, start: int | Tensor) -> Tensor:
        """Write (2, B, H, U, K) at positions from `start` on; returns all filled positions.

        A tensor `start` (1,) stays on its device, for one token, and all `max` positions are returned: so shapes do not
        depend on it.
        """
        if isinstance(start, Tensor):
            return self.self_keys_values.index_copy_(3, start, keys_values)
        end = start + keys_values.shape[3]
        self.self_keys_values[:, :, :, start:end] = keys_values
        return self.self_keys_values[:, :, :, :end]

    def select(self, rows: Tensor, filled: int, cross_rows: Tensor | slice | None = None) -> LayerCache:
        """Selected rows of the batch, of which `filled` positions are in use; cross-attention takes the same rows
        unless given (beams of one utterance share them)."""
        cross_rows = rows if cross_rows is None else cross_rows
        old = self.self_keys_values
        new = old.new_empty(2, len(rows), *old.shape[2:])
        new[:, :, :, :filled] = old[:, rows, :, :filled]
        return replace(
            self,
            self_keys_values=new,
            cross_keys=self.cross_keys[cross_rows],
            cross_values=self.cross_values[cross_rows],
        )

    def reorder(self, rows: Tensor, filled: int) -> None:
        """Give each row the `filled` positions of the row that it continues (beam search)."""
        self.self_keys_values[:, :, :, :filled] = self.self_keys_values[:, rows, :, :filled]


class Attention(nn.Module):
    """Multi-head attention; NeMo's names."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_net, self.key_net = MixedLinear(width, width), MixedLinear(width, width)
        self.value_net, self.out_projection = MixedLinear(width, width), MixedLinear(width, width)

    def split(self, x_BUD: Tensor) -> Tensor:
        """(B, U, D) → (B, H, U, K)."""
        return x_BUD.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence, (B, H, T, K) each."""
        return self.split(self.key_net(x_BTD)), self.split(self.value_net(x_BTD))

    def forward(self, x_BUD: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        mixed = F.scaled_dot_product_attention(
            self.split(self.query_net(x_BUD)),
            keys,
            values,
            attn_mask=mask,
            is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
        )
        mixed = self.out_projection(mixed.transpose(1, 2).flatten(2))
        return dropout(mixed, self.dropout, self.training)


class DecoderFeedForward(nn.Module):
    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.dense_in, self.dense_out = MixedLinear(width, inner), MixedLinear(inner, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return dropout(self.dense_out(F.relu(self.dense_in(x))), self.dropout, self.training)


class DecoderBlock(Block):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads = config.decoder_width, config.decoder_heads
        self.layer_norm_1 = MixedLayerNorm(width, eps=1e-5)
        self.first_sub_layer = Attention(width, heads, config.dropout)
        self.layer_norm_2 = MixedLayerNorm(width, eps=1e-5)
        self.second_sub_layer = Attention(width, heads, config.dropout)
        self.layer_norm_3 = MixedLayerNorm(width, eps=1e-5)
        self.third_sub_layer = DecoderFeedForward(width, width * config.decoder_ff_factor, config.dropout)
        self.projections: PreparedLinear | None = None  # of queries, keys and values, if prepared for inference

    def compute(self, x: Tensor, states_BTD: Tensor, cross_mask: Tensor) -> Tensor:
        """Whole sequences; padding needs no mask, since attention looks back only and padding is at the end."""
        y = self.layer_norm_1(x)
        x = x + self.first_sub_layer(y, *self.first_sub_layer.keys_values(y), None, causal=True)
        y = self.layer_norm_2(x)
        x = x + self.second_sub_layer(y, *self.second_sub_layer.keys_values(states_BTD), cross_mask)
        return x + self.third_sub_layer(self.layer_norm_3(x))

    def make_cache(self, states_BTD: Tensor, max_tokens: int) -> LayerCache:
        """A cache for `max_tokens` positions, with the cross-attention keys filled in."""
        heads, width = self.first_sub_layer.heads, states_BTD.shape[2]
        keys, values = self.second_sub_layer.keys_values(states_BTD)
        self_keys_values = states_BTD.new_empty(2, len(states_BTD), heads, max_tokens, width // heads)
        return LayerCache(self_keys_values, keys.contiguous(), values.contiguous(), self.maps())

    def maps(self) -> LayerMaps:
        """Layer norms and linear maps for `extend_layer`."""
        attention, cross, feed_forward = self.first_sub_layer, self.second_sub_layer, self.third_sub_layer
        return LayerMaps(
            norm_1=_norm(self.layer_norm_1),
            projections=affine_of(self.projections) if self.projections else affine(*self.joined_projections()),
            out=affine_of(attention.out_projection),
            norm_2=_norm(self.layer_norm_2),
            query=affine_of(cross.query_net),
            cross_out=affine_of(cross.out_projection),
            norm_3=_norm(self.layer_norm_3),
            dense_in=affine_of(feed_forward.dense_in),
            dense_out=affine_of(feed_forward.dense_out),
        )

    def joined_projections(self) -> tuple[Tensor, Tensor]:
        """Weight (3D, D) and bias (3D,) of self-attention's queries, keys and values."""
        attention = self.first_sub_layer
        nets = (attention.query_net, attention.key_net, attention.value_net)
        return torch.cat([net.weight for net in nets]), torch.cat([net.bias for net in nets])


def _norm(layer: nn.LayerNorm) -> Norm:
    return layer.weight, layer.bias


def extend_layer(
    x: Tensor, cache: LayerCache, start: int | Tensor, self_mask: Tensor | None, cross_mask: Tensor | None, beams: int
) -> Tensor:
    """`DecoderBlock` in evaluation for tokens at positions from `start` on: (R, U, D) → (R, U, D).

    Their keys and values are added to the cache. With `beams`, rows are (utterance, beam) and the beams of an utterance
    are queries to one set of frames.
    """
    norm_1, projections, out, norm_2, query, cross_out, norm_3, dense_in, dense_out = cache.maps
    rows, tokens, width = x.shape
    heads, shape = cache.cross_keys.shape[1], (width,)
    attend = F.scaled_dot_product_attention
    new = projections(F.layer_norm(x, shape, *norm_1))
    new = new.view(rows, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    keys, values = cache.append(new[1:], start)
    mixed = attend(new[0], keys, values, attn_mask=self_mask)
    x = x + out(mixed.transpose(1, 2).reshape(rows, tokens, width))
    queries = query(F.layer_norm(x, shape, *norm_2))
    queries = queries.view(rows // beams, beams * tokens, heads, -1).transpose(1, 2)
    mixed = attend(queries, cache.cross_keys, cache.cross_values, attn_mask=cross_mask)
    x = x + cross_out(mixed.transpose(1, 2).reshape(rows, tokens, width))
    return x + dense_out(dense_in(F.layer_norm(x, shape, *norm_3)).relu_())


class _Position(nn.Module):
    pos_enc: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("pos_enc", torch.empty(size, width))
        self.reset()

    def reset(self) -> None:
        """Fill the table: sine in even, cosine in odd dimensions, divided by √width."""
        if self.pos_enc.is_meta:
            return
        size, width = self.pos_enc.shape
        with torch.device("cpu"):
            position = torch.arange(size, dtype=torch.float32)[:, None]
            rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
            angles = position * rate
            table = torch.stack((torch.sin(angles), torch.cos(angles)), dim=2).flatten(1)
        self.pos_enc.copy_(table / math.sqrt(width))


class Embedding(nn.Module):
    """Token plus position embedding, layer norm, dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.padded_vocab_size, config.decoder_width)
        self.position_embedding = _Position(config.max_positions, config.decoder_width)
        self.layer_norm = MixedLayerNorm(config.decoder_width, eps=1e-5)
        self.dropout = config.dropout

    def forward(self, ids_BU: Tensor, start: int | Tensor = 0) -> Tensor:
        table = self.position_embedding.pos_enc
        positions = table[start] if isinstance(start, Tensor) else table[start : start + ids_BU.shape[1]]
        x = self.layer_norm(self.token_embedding(ids_BU) + positions)
        return dropout(x, self.dropout, self.training)


class _Blocks(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers: ModuleList[DecoderBlock] = ModuleList(DecoderBlock(config) for _ in range(config.decoder_layers))
        self.final_layer_norm = MixedLayerNorm(config.decoder_width, eps=1e-5)


class TransformerDecoder(nn.Module):
    """ids (B, U), encoder states (B, T, D) and their mask (B, 1, 1, T) → hidden (B, U, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._embedding = Embedding(config)
        self._decoder = _Blocks(config)
        self.heads = config.decoder_heads
        self.checkpointing: Checkpointing = "none"  # what blocks keep for their backward pass

    def forward(self, ids_BU: Tensor, states_BTD: Tensor, cross_mask: Tensor) -> Tensor:
        x = self._embedding(ids_BU).to(states_BTD.dtype)
        for layer in self._decoder.layers:
            x = run_block(layer, self.checkpointing, x, states_BTD, cross_mask)
        return self._decoder.final_layer_norm(x)

    def make_cache(self, states_BTD: Tensor, max_tokens: int) -> list[LayerCache]:
        """A cache for each layer; see `DecoderBlock.make_cache`."""
        return [layer.make_cache(states_BTD, max_tokens) for layer in self._decoder.layers]

    def extend(
        self, ids_BU: Tensor, cache: list[LayerCache], start: int | Tensor, cross_mask: Tensor | None, beams: int = 1
    ) -> Tensor:
        """Hidden states (B, U, D) of tokens at positions from `start` on; see `extend_layer` and
        `LayerCache.append`."""
        x, mask = self._embedding(ids_BU, start), None
        if isinstance(start, Tensor):
            mask = (torch.arange(cache[0].self_keys_values.shape[3], device=start.device) <= start)[None]
        elif ids_BU.shape[1] > 1:
            size = (ids_BU.shape[1], start + ids_BU.shape[1])
            mask = torch.ones(size, dtype=torch.bool, device=ids_BU.device).tril(start)
        for layer_cache in cache:
            x = extend_layer(x, layer_cache, start, mask, cross_mask, beams)
        return self._decoder.final_layer_norm(x)


def initialize(decoder: TransformerDecoder) -> None:
    """Set linear layers and the token embedding to Xavier-uniform values, biases to zero."""
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(decoder._embedding.token_embedding.weight)
