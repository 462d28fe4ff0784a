"""What a forward pass of a Canary costs by length, counted from its shape."""

from __future__ import annotations

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


def _subsampling(config: ModelConfig) -> float:
    """Per frame of 80 ms: three strided 3×3 convolutions, two pointwise ones, the projection."""
    c, mels = config.subsampling_channels, config.mel_bins
    halved, quartered, eighth = mels // 2, mels // 4, mels // 8
    convolutions = 9 * c * (4 * halved + 2 * quartered + eighth)
    pointwise = c * c * (2 * quartered + eighth)
    return float(convolutions + pointwise + c * eighth * config.encoder_width)
