"""The cost of a Canary's forward pass by length, computed from its shape."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

from raytrain.lengths.cost import CostModel
from raytrain.model.config import ModelConfig


def cost_of(config: ModelConfig) -> CostModel:
    """Multiply-accumulates per encoder frame of 80 ms and per token; small terms (norms, positions) left out.

    Attention is quadratic: scores by content, scores by position (twice as many of them) and the weighted sum.
    """
    d, h, layers = config.encoder_width, config.decoder_width, config.encoder_layers
    feed_forward = 2 * 2 * config.encoder_ff_factor * d * d
    attention, convolution = 4 * d * d, 3 * d * d + config.conv_kernel * d
    cross = config.decoder_layers * 2 * h * h  # keys and values of the frames
    return CostModel(
        frame=layers * (feed_forward + attention + convolution) + cross + _subsampling(config),
        frame_squared=layers * 4 * d,
        token=config.decoder_layers * (4 + 2 + 2 * config.decoder_ff_factor) * h * h + config.padded_vocab_size * h,
        token_squared=config.decoder_layers * 2 * h,
        frame_token=config.decoder_layers * 2 * h,
    )


def training_flops(config: ModelConfig) -> Callable[[Tensor, Tensor], float]:
    """A function of frames and tokens by utterance: the operations of a training step on them, without padding.

    A multiply-accumulate is two operations, and the backward pass takes twice what the forward pass does.
    """
    cost = cost_of(config)

    def flops(frames: Tensor, tokens: Tensor) -> float:
        f, t = frames.double(), tokens.double()
        forward = (
            cost.frame * f
            + cost.frame_squared * f * f
            + cost.token * t
            + cost.token_squared * t * t
            + cost.frame_token * f * t
        )
        return 6 * float(forward.sum())

    return flops


# Dense bf16 operations per second without sparsity, from the vendor's sheets.
_PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "V100": 125,
    "T4": 65,
}


_MIG = re.compile(r"\bMIG (\d+)g\.")
_SLICES = 7  # into which MIG divides a whole GPU's multiprocessors


def peak_flops(device_name: str) -> float | None:
    """Peak operations per second of a GPU of this name in bf16 (fp16 if it has no bf16), scaled down for a MIG slice;
    None if unknown."""
    peak = next((1e12 * peak for name, peak in _PEAK_TFLOPS.items() if name in device_name), None)
    slices = _MIG.search(device_name)
    return peak if peak is None or slices is None else peak * int(slices[1]) / _SLICES


def _subsampling(config: ModelConfig) -> float:
    """Per frame of 80 ms: three strided 3×3 convolutions, two pointwise ones, the projection."""
    c, mels = config.subsampling_channels, config.mel_bins
    halved, quartered, eighth = mels // 2, mels // 4, mels // 8
    convolutions = 9 * c * (4 * halved + 2 * quartered + eighth)
    pointwise = c * c * (2 * quartered + eighth)
    return float(convolutions + pointwise + c * eighth * config.encoder_width)
