"""Models that train and decode in milliseconds; tests replace what they need otherwise."""

from dataclasses import replace

from raytrain.model.config import ModelConfig

TINY = ModelConfig(
    encoder_layers=1,
    encoder_width=32,
    encoder_heads=2,
    subsampling_channels=8,
    decoder_layers=1,
    decoder_width=32,
    decoder_heads=2,
    max_positions=64,
    vocab_size=40,
)
DECODED = replace(TINY, decoder_layers=2, decoder_width=48, vocab_size=29)  # its decoder and encoder differ in width
