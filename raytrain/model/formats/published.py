"""Shapes of the published Canary models, for plans without a configuration."""

from __future__ import annotations

from raytrain.errors import ConfigError
from raytrain.model.config import ModelConfig

PUBLISHED = {
    "canary-1b": ModelConfig(
        encoder_layers=24,
        encoder_width=1024,
        decoder_layers=24,
        max_positions=512,
        vocab_size=4128,
        prompt_format="canary",
    ),
    "canary-1b-flash": ModelConfig(encoder_layers=32, encoder_width=1024),
    "canary-180m-flash": ModelConfig(),
}


def published(name: str) -> ModelConfig:
    """The shape of a published model. Raises `ConfigError` that lists all names."""
    try:
        return PUBLISHED[name]
    except KeyError:
        raise ConfigError(
            "no published model has this name",
            got=name,
            allowed=", ".join(PUBLISHED),
            remedy="name one of these with --model, or `own` for the configuration's model",
        ) from None
