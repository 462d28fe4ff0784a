"""NeMo's model configuration to `ModelConfig` and back.

The published Canary has one architecture with a few parameters; a configuration that asks for anything else is rejected
with a list of differences, since its weights would load and give wrong results.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from raytrain.errors import CheckpointError
from raytrain.model.config import ModelConfig, SpecAugmentSettings
from raytrain.model.formats.nemo_template import NEMO_CONFIG, filled
from raytrain.model.formats.settings_reader import SettingsReader

_NO_LIMIT = (None, -1, [-1, -1], [[-1, -1]])
# setting → (values that mean what our model computes, NeMo's own default)
_FIXED: dict[str, tuple[tuple[object, ...], object]] = {
    "tokenizer.type": (("agg",), None),
    "preprocessor.sample_rate": ((16000,), 16000),
    "preprocessor.log_zero_guard_type": (("add",), "add"),
    "preprocessor.log_zero_guard_value": ((2**-24,), 2**-24),
    "preprocessor.exact_pad": ((False,), False),
    "preprocessor.normalize": (("per_feature",), "per_feature"),
    "preprocessor.window_size": ((0.025,), 0.02),
    "preprocessor.window_stride": ((0.01,), 0.01),
    "preprocessor.window": (("hann",), "hann"),
    "preprocessor.n_fft": ((512,), None),
    "preprocessor.log": ((True,), True),
    "preprocessor.frame_splicing": ((1,), 1),
    "preprocessor.pad_value": ((0,), 0),
    "preprocessor.preemph": ((0.97,), 0.97),
    "preprocessor.mag_power": ((2,), 2),
    "encoder.subsampling": (("dw_striding",), "striding"),
    "encoder.subsampling_factor": ((8,), 4),
    "encoder.causal_downsampling": ((False,), False),
    "encoder.reduction": ((None,), None),
    "encoder.reduction_factor": ((1, None), 1),
    "encoder.self_attention_model": (("rel_pos",), "rel_pos"),
    "encoder.att_context_size": (_NO_LIMIT, None),
    "encoder.xscaling": ((False,), True),
    "encoder.untie_biases": ((True,), True),
    "encoder.use_bias": ((True,), True),
    "encoder.conv_norm_type": (("batch_norm",), "batch_norm"),
    "encoder.conv_context_size": ((None,), None),
    "encoder.feat_out": ((-1, None), -1),
    "transf_encoder.num_layers": ((0,), 0),
    "transf_decoder.model_name": ((None,), None),
    "transf_decoder.pre_ln_final_layer_norm": ((True,), True),
    "transf_decoder.config_dict.num_token_types": ((0,), 0),
    "transf_decoder.config_dict.learn_positional_encodings": ((False,), False),
    "transf_decoder.config_dict.hidden_act": (("relu",), "relu"),
    "transf_decoder.config_dict.pre_ln": ((True,), False),
    "head.num_layers": ((1,), 1),
    "head.log_softmax": ((True,), True),
}
_MAX_LAYERS, _MAX_WIDTH = 512, 65_536
_DECODER = "transf_decoder.config_dict"
# Our setting → NeMo's and the largest accepted value.
_SIZES = {
    "encoder_layers": ("encoder.n_layers", _MAX_LAYERS),
    "encoder_width": ("encoder.d_model", _MAX_WIDTH),
    "encoder_heads": ("encoder.n_heads", _MAX_WIDTH),
    "encoder_ff_factor": ("encoder.ff_expansion_factor", 64),
    "subsampling_channels": ("encoder.subsampling_conv_channels", _MAX_WIDTH),
    "conv_kernel": ("encoder.conv_kernel_size", 1023),
    "decoder_layers": (f"{_DECODER}.num_layers", _MAX_LAYERS),
    "decoder_width": (f"{_DECODER}.hidden_size", _MAX_WIDTH),
    "decoder_heads": (f"{_DECODER}.num_attention_heads", _MAX_WIDTH),
    "max_positions": (f"{_DECODER}.max_sequence_length", 1 << 20),
    "mel_bins": ("preprocessor.features", 4096),
    "sample_rate": ("preprocessor.sample_rate", 1 << 20),
}


def model_config_of(raw: Mapping[str, object], *, vocab_size: int, source: str) -> ModelConfig:
    """The `ModelConfig` of a NeMo configuration. Raises `CheckpointError` that lists all differences."""
    read = SettingsReader(raw)
    for dotted, (allowed, default) in _FIXED.items():
        read.expect(dotted, read.get(dotted, default), *allowed)
    sizes: dict[str, Any] = {name: read.number(dotted, limit) for name, (dotted, limit) in _SIZES.items()}
    dropout = read.fraction("encoder.dropout", 0.1)
    label_smoothing = read.fraction("loss.label_smoothing", 0.0)
    sizes["decoder_ff_factor"] = _decoder_ff_factor(read, sizes["decoder_width"])
    freq_masks = read.count("spec_augment.freq_masks", 0)
    freq_width = read.count("spec_augment.freq_width", 27)
    time_masks = read.count("spec_augment.time_masks", 0)
    time_width = read.fraction("spec_augment.time_width", 0.05)
    _check_agreement(read, sizes["mel_bins"], vocab_size)
    config = ModelConfig()
    try:
        config = ModelConfig(
            **sizes,
            dropout=dropout,
            label_smoothing=label_smoothing,
            prompt_format=read.get("prompt_format", "canary"),
            vocab_size=vocab_size,
            spec_augment=SpecAugmentSettings(freq_masks, freq_width, time_masks, time_width),
        )
    except ValueError as error:
        read.problems.append(str(error))
    if read.problems:
        raise CheckpointError(
            f"{source} is not a Canary that raytrain supports",
            got="; ".join(read.problems),
            why="its weights would load and give wrong results",
            remedy="use a Canary of FastConformer and Transformer whose settings are those of the published models",
        )
    return config


def _decoder_ff_factor(read: SettingsReader, width: int) -> int:
    inner = read.number(f"{_DECODER}.inner_size", 64 * _MAX_WIDTH)
    factor, rest = divmod(inner, width)
    if rest or not factor:
        read.problems.append(f"{_DECODER}.inner_size {inner} is not a multiple of hidden_size {width}")
    return max(factor, 1)


def _check_agreement(read: SettingsReader, mel_bins: int, vocab_size: int) -> None:
    """Settings that repeat others, or follow from the tokenizer, must agree."""
    if read.get("encoder.feat_in", mel_bins) != mel_bins:
        read.problems.append(
            f"encoder.feat_in {reprlib.repr(read.get('encoder.feat_in'))} differs from preprocessor.features"
        )
    classes, padded = read.get("head.num_classes"), -(-vocab_size // 8) * 8
    if classes not in (padded, vocab_size):
        read.problems.append(f"head.num_classes is {reprlib.repr(classes)}, but the tokenizer has {vocab_size} ids")


def nemo_config_of(config: ModelConfig, langs: dict[str, dict[str, str]]) -> dict[str, Any]:
    """A complete NeMo configuration; `langs` are the tokenizer entries by language, special tokens first."""
    if config.sample_rate != 16000:
        raise CheckpointError(
            "NeMo's features have another shape at this sample rate",
            got=config.sample_rate,
            allowed="16000",
            remedy="convert it to huggingface or raytrain (--to), or train with model.sample_rate: 16000",
        )
    settings = filled(NEMO_CONFIG, config)
    settings["tokenizer"]["langs"] = langs
    return settings
