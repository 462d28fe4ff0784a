"""Layers for mixed precision: float32 weights, computation in the type of the input.

The first input is cast once, and each layer casts its weights to its input's type, so activations and the residual
stream keep that type from features to logits. Casts are no-ops where the types agree. Autocast would do the same for
matrix products, but its layer norms return float32, and with them every residual sum: twice the bytes, and a cast
before each product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MixedLinear(nn.Linear):
    """A linear layer that computes in its input's type."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class MixedLayerNorm(nn.LayerNorm):
    """A layer norm that computes in float32 or wider and returns its input's type."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
