"""Hugging Face's settings of a Canary (`config.json`, `preprocessor_config.json`) to `ModelConfig` and back.

Hugging Face's model has one architecture with a few numbers, like ours; settings that ask for anything else are
rejected with a list of differences, since the weights would load and give wrong results.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrain.errors import CheckpointError
from raytrain.model.config import ModelConfig
from raytrain.model.formats.settings_reader import SettingsReader

# Settings that Hugging Face has and our model fixes.
_FIXED: dict[str, object] = {
    "model_type": "canary",
    "tie_word_embeddings": True,
    "encoder_config.model_type": "parakeet_encoder",
    "encoder_config.hidden_act": "silu",
    "encoder_config.attention_bias": True,
    "encoder_config.convolution_bias": True,
    "encoder_config.subsampling_factor": 8,
    "encoder_config.subsampling_conv_kernel_size": 3,
    "encoder_config.subsampling_conv_stride": 2,
    "encoder_config.scale_input": False,
    "encoder_config.dropout_positions": 0.0,
    "encoder_config.layerdrop": 0.0,
    "decoder_config.model_type": "canary_decoder",
    "decoder_config.hidden_act": "relu",
    "decoder_config.attention_bias": True,
}
_FIXED_FEATURES: dict[str, object] = {
    "feature_extractor_type": "ParakeetFeatureExtractor",
    "hop_length": 160,
    "n_fft": 512,
    "win_length": 400,
    "preemphasis": 0.97,
    "padding_value": 0.0,
    "padding_side": "right",
}
# Our setting → theirs and the largest accepted value: settings are read before any weight could contradict them.
_SIZES = {
    "encoder_layers": ("encoder_config.num_hidden_layers", 512),
    "encoder_width": ("encoder_config.hidden_size", 1 << 16),
    "encoder_heads": ("encoder_config.num_attention_heads", 1 << 16),
    "subsampling_channels": ("encoder_config.subsampling_conv_channels", 1 << 16),
    "conv_kernel": ("encoder_config.conv_kernel_size", 1023),
    "mel_bins": ("encoder_config.num_mel_bins", 4096),
    "decoder_layers": ("decoder_config.num_hidden_layers", 512),
    "decoder_width": ("decoder_config.hidden_size", 1 << 16),
    "decoder_heads": ("decoder_config.num_attention_heads", 1 << 16),
    "max_positions": ("decoder_config.max_position_embeddings", 1 << 14),
    "vocab_size": ("vocab_size", 1 << 24),
}
# Fields of `ModelConfig` that Hugging Face's settings have too; except dropout, since fine-tuning may change it.
SHARED_FIELDS = (*_SIZES, "sample_rate", "encoder_ff_factor", "decoder_ff_factor")


def config_json(config: ModelConfig, token_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """The content of `config.json`; `token_ids` by their name there."""
    dropout = {"dropout": config.dropout, "activation_dropout": config.dropout, "attention_dropout": config.dropout}
    tree: dict[str, Any] = {
        "architectures": ["CanaryForConditionalGeneration"],
        "dtype": "float32",
        **token_ids,
        "encoder_config": {"intermediate_size": config.encoder_width * config.encoder_ff_factor, **dropout},
        "decoder_config": {
            "intermediate_size": config.decoder_width * config.decoder_ff_factor,
            "attention_dropout": config.dropout,
            "num_key_value_heads": config.decoder_heads,
            "head_dim": config.decoder_width // config.decoder_heads,
            "vocab_size": config.padded_vocab_size,
            **{name: value for name, value in token_ids.items() if name != "decoder_start_token_id"},
        },
    }
    sizes = {theirs: getattr(config, name) for name, (theirs, _) in _SIZES.items()}
    for dotted, value in {**_FIXED, **sizes, "vocab_size": config.padded_vocab_size}.items():
        section, _, key = dotted.rpartition(".")
        (tree[section] if section else tree)[key] = value
    return tree


def preprocessor_json(config: ModelConfig) -> dict[str, object]:
    """The content of `preprocessor_config.json`."""
    return {
        **_FIXED_FEATURES,
        "feature_size": config.mel_bins,
        "sampling_rate": config.sample_rate,
        "return_attention_mask": True,
    }


def model_config_of(tree: Mapping[str, object], features: Mapping[str, object], folder: Path) -> ModelConfig:
    """The `ModelConfig` of `config.json` and the feature extractor's settings, which may be empty; fields without a
    Hugging Face setting have their defaults. Raises `CheckpointError` that lists all problems."""
    read, extractor = SettingsReader(tree), SettingsReader(features)
    extractor.problems = read.problems  # in one list, in the order of reading
    values: dict[str, Any] = {name: read.number(theirs, limit) for name, (theirs, limit) in _SIZES.items()}
    for dotted, expected in _FIXED.items():
        read.expect(dotted, read.get(dotted), expected)
    for name, expected in {**_FIXED_FEATURES, "feature_size": values["mel_bins"]}.items():
        read.expect(f"the feature extractor's {name}", extractor.get(name, expected), expected)
    values["sample_rate"] = extractor.number("sampling_rate", 1 << 20, default=16000)
    _check_agreement(read, values)
    for side in ("encoder", "decoder"):
        inner = read.number(f"{side}_config.intermediate_size", 1 << 22)
        values[f"{side}_ff_factor"], rest = divmod(inner, values[f"{side}_width"])
        if rest:
            read.problems.append(f"{side}_config.intermediate_size {inner} is not a multiple of the width")
    values["dropout"] = _dropout(read)
    config = ModelConfig()
    try:
        config = ModelConfig(**values)
    except ValueError as error:
        read.problems.append(str(error))
    _refuse(read.problems, folder)
    return config


def _check_agreement(read: SettingsReader, values: Mapping[str, int]) -> None:
    """Redundant settings must agree."""
    width, heads, vocab_size = values["decoder_width"], values["decoder_heads"], values["vocab_size"]
    for name, expected in {"num_key_value_heads": heads, "head_dim": width // heads}.items():
        if read.get(f"decoder_config.{name}") is not None:
            read.expect(f"decoder_config.{name}", read.get(f"decoder_config.{name}"), expected)
    read.expect("decoder_config.vocab_size", read.get("decoder_config.vocab_size"), vocab_size)
    if vocab_size % 8:
        read.problems.append(f"vocab_size {vocab_size} is not a multiple of 8, to which our embedding is padded")
    read.expect("encoder_config.hidden_size", values["encoder_width"], width)


def _dropout(read: SettingsReader) -> float:
    """The encoder's dropout, which all other dropouts must match."""
    dropout = read.get("encoder_config.dropout")
    if type(dropout) not in (int, float):
        read.problems.append(f"encoder_config.dropout is {dropout!r} instead of a number")
        dropout = 0.0
    for name in ("activation_dropout", "attention_dropout"):
        read.expect(f"encoder_config.{name}", read.get(f"encoder_config.{name}"), dropout)
    return dropout


def _refuse(problems: list[str], folder: Path) -> None:
    if not problems:
        return
    training_only = [problem for problem in problems if re.search("dropout|layerdrop", problem)]
    raise CheckpointError(
        f"{folder} holds a model that ours can't compute",
        got="; ".join(problems),
        why="its weights would load and give wrong results",
        remedy="dropouts act in training only: make those of config.json equal or 0"
        if training_only
        else "use a model with the architecture of the published Canary models",
    )
