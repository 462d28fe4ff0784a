"""NeMo's model configuration to `ModelConfig` and back.

A Canary as published has one architecture with a few numbers; a configuration that asks for anything else is
refused with every difference named, since its weights would load and give other results.
"""

from __future__ import annotations

import reprlib
from typing import Any

from raytrain.errors import CheckpointError
from raytrain.model.config import ModelConfig, SpecAugmentSettings

_NO_LIMIT = (None, -1, [-1, -1], [[-1, -1]])
# setting → (values that mean what our model computes, NeMo's own default)
_FIXED: dict[str, tuple[tuple[Any, ...], Any]] = {
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
_MODEL = "nemo.collections.asr.models.aed_multitask_models.EncDecMultiTaskModel"
_LARGEST = {"layers": 512, "width": 65_536, "positions": 1 << 20}


class _Reader:
    """Looks settings up by dotted path and collects what is wrong."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw, self.problems = raw, []

    def get(self, dotted: str, default: Any = None) -> Any:
        node: Any = self.raw
        for part in dotted.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = node[part]
        return node

    def number(self, dotted: str, limit: int) -> int:
        """A whole number in 1 … limit; hostile sizes would take all memory before any weight is read."""
        value = self.get(dotted)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            self.problems.append(f"{dotted} is {reprlib.repr(value)} instead of a whole number from 1 to {limit}")
            return 1
        return value

    def fraction(self, dotted: str, default: float) -> float:
        value = self.get(dotted, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            self.problems.append(f"{dotted} is {reprlib.repr(value)} instead of a number in [0, 1)")
            return default
        return float(value)

    def whole(self, dotted: str, default: int) -> int:
        value = self.get(dotted, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10_000:
            self.problems.append(f"{dotted} is {reprlib.repr(value)} instead of a whole number from 0 to 10000")
            return default
        return value


def model_config_of(raw: dict[str, Any], *, vocab_size: int, source: str) -> ModelConfig:
    """The `ModelConfig` of a NeMo configuration. Raises `CheckpointError` that names all differences."""
    read = _Reader(raw)
    for dotted, (allowed, default) in _FIXED.items():
        value = read.get(dotted, default)
        if value not in allowed:
            read.problems.append(f"{dotted} is {reprlib.repr(value)} instead of {allowed[0]!r}")
    layers, width, positions = _LARGEST["layers"], _LARGEST["width"], _LARGEST["positions"]
    decoder = "transf_decoder.config_dict"
    values = {
        "encoder_layers": read.number("encoder.n_layers", layers),
        "encoder_width": read.number("encoder.d_model", width),
        "encoder_heads": read.number("encoder.n_heads", width),
        "encoder_ff_factor": read.number("encoder.ff_expansion_factor", 64),
        "subsampling_channels": read.number("encoder.subsampling_conv_channels", width),
        "conv_kernel": read.number("encoder.conv_kernel_size", 1023),
        "decoder_layers": read.number(f"{decoder}.num_layers", layers),
        "decoder_width": read.number(f"{decoder}.hidden_size", width),
        "decoder_heads": read.number(f"{decoder}.num_attention_heads", width),
        "max_positions": read.number(f"{decoder}.max_sequence_length", positions),
        "mel_bins": read.number("preprocessor.features", 4096),
        "sample_rate": read.number("preprocessor.sample_rate", 1 << 20),
        "dropout": read.fraction("encoder.dropout", 0.1),
        "label_smoothing": read.fraction("loss.label_smoothing", 0.0),
        "prompt_format": read.get("prompt_format", "canary"),
        "vocab_size": vocab_size,
    }
    inner = read.number(f"{decoder}.inner_size", 64 * width)
    factor, rest = divmod(inner, values["decoder_width"])
    if rest or not factor:
        read.problems.append(f"{decoder}.inner_size {inner} is no multiple of hidden_size {values['decoder_width']}")
    values["decoder_ff_factor"] = max(factor, 1)
    masks = {
        "freq_masks": read.whole("spec_augment.freq_masks", 0),
        "freq_width": read.whole("spec_augment.freq_width", 27),
        "time_masks": read.whole("spec_augment.time_masks", 0),
        "time_width": read.fraction("spec_augment.time_width", 0.05),
    }
    _check_agreement(read, values)
    config = None
    try:
        config = ModelConfig(**values, spec_augment=SpecAugmentSettings(**masks))
    except ValueError as error:
        read.problems.append(str(error))
    if read.problems:
        raise CheckpointError(
            f"{source} is not a Canary that this model computes",
            got="; ".join(read.problems),
            why="its weights would load and give other results",
            remedy="use a Canary of FastConformer and Transformer whose settings are those of the published ones",
        )
    return config


def _check_agreement(read: _Reader, values: dict[str, Any]) -> None:
    if read.get("encoder.feat_in", values["mel_bins"]) != values["mel_bins"]:
        read.problems.append(
            f"encoder.feat_in {reprlib.repr(read.get('encoder.feat_in'))} differs from preprocessor.features"
        )
    classes, padded = read.get("head.num_classes"), -(-values["vocab_size"] // 8) * 8
    if classes not in (padded, values["vocab_size"]):
        read.problems.append(
            f"head.num_classes is {reprlib.repr(classes)}, but the tokenizer has {values['vocab_size']} ids"
        )


def nemo_config_of(config: ModelConfig, langs: dict[str, dict[str, str]]) -> dict[str, Any]:
    """A whole NeMo configuration; `langs` are the tokenizer entries by language, special tokens first."""
    if config.sample_rate != 16000:
        raise CheckpointError(
            "NeMo's features have another shape at this sample rate",
            got=config.sample_rate,
            allowed="16000",
            remedy="convert it to huggingface or raytrain (--to), or train with model.sample_rate: 16000",
        )
    encoder, decoder, augment = config.encoder_width, config.decoder_width, config.spec_augment
    dropouts = {
        "ffn_dropout": config.dropout,
        "attn_score_dropout": config.dropout,
        "attn_layer_dropout": config.dropout,
    }
    return {
        "sample_rate": config.sample_rate,
        "label_smoothing": config.label_smoothing,
        "use_loss_mask_for_prompt": False,
        "log_prediction": False,
        "prompt_format": config.prompt_format,
        "prompt_defaults": None,
        "model_defaults": {"asr_enc_hidden": encoder, "lm_enc_hidden": decoder, "lm_dec_hidden": decoder},
        "train_ds": None,
        "validation_ds": None,
        "test_ds": None,
        "tokenizer": {
            "dir": None,
            "type": "agg",
            "langs": langs,
            "custom_tokenizer": {
                "_target_": "nemo.collections.common.tokenizers.canary_tokenizer.CanaryTokenizer",
                "tokenizers": None,
            },
        },
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "sample_rate": config.sample_rate,
            "normalize": "per_feature",
            "window_size": 0.025,
            "window_stride": 0.01,
            "window": "hann",
            "features": config.mel_bins,
            "n_fft": 512,
            "log": True,
            "frame_splicing": 1,
            "dither": 1e-5,
            "pad_to": 0,
            "pad_value": 0.0,
        },
        "spec_augment": {
            "_target_": "nemo.collections.asr.modules.SpectrogramAugmentation",
            "freq_masks": augment.freq_masks,
            "freq_width": augment.freq_width,
            "time_masks": augment.time_masks,
            "time_width": augment.time_width,
        },
        "encoder": {
            "_target_": "nemo.collections.asr.modules.ConformerEncoder",
            "feat_in": config.mel_bins,
            "feat_out": -1,
            "n_layers": config.encoder_layers,
            "d_model": encoder,
            "subsampling": "dw_striding",
            "subsampling_factor": 8,
            "subsampling_conv_channels": config.subsampling_channels,
            "causal_downsampling": False,
            "reduction": None,
            "reduction_position": None,
            "reduction_factor": 1,
            "ff_expansion_factor": config.encoder_ff_factor,
            "self_attention_model": "rel_pos",
            "n_heads": config.encoder_heads,
            "att_context_size": [-1, -1],
            "xscaling": False,
            "untie_biases": True,
            "pos_emb_max_len": 5000,
            "conv_kernel_size": config.conv_kernel,
            "conv_norm_type": "batch_norm",
            "conv_context_size": None,
            "dropout": config.dropout,
            "dropout_pre_encoder": config.dropout,
            "dropout_emb": 0.0,
            "dropout_att": config.dropout,
        },
        "transf_encoder": {
            "_target_": "nemo.collections.asr.modules.transformer.transformer_encoders.TransformerEncoder",
            "num_layers": 0,
            "hidden_size": decoder,
            "inner_size": 4 * decoder,
            "num_attention_heads": config.decoder_heads,
            **dropouts,
            "mask_future": False,
            "pre_ln": True,
            "pre_ln_final_layer_norm": True,
        },
        "transf_decoder": {
            "_target_": "nemo.collections.asr.modules.transformer.get_nemo_transformer",
            "model_name": None,
            "pretrained": False,
            "encoder": None,
            "pre_ln_final_layer_norm": True,
            "config_dict": {
                "max_sequence_length": config.max_positions,
                "num_token_types": 0,
                "embedding_dropout": config.dropout,
                "learn_positional_encodings": False,
                "hidden_size": decoder,
                "inner_size": decoder * config.decoder_ff_factor,
                "num_layers": config.decoder_layers,
                "num_attention_heads": config.decoder_heads,
                **dropouts,
                "hidden_act": "relu",
                "pre_ln": True,
                "vocab_size": "None",
            },
        },
        "head": {
            "_target_": "nemo.collections.asr.parts.submodules.token_classifier.TokenClassifier",
            "num_layers": 1,
            "activation": "relu",
            "log_softmax": True,
            "hidden_size": decoder,
            "num_classes": config.padded_vocab_size,
            "dropout": 0.0,
            "use_transformer_init": True,
        },
        "decoding": {
            "strategy": "beam",
            "return_best_hypothesis": True,
            "beam": {"beam_size": 1, "len_pen": 0.0, "max_generation_delta": 50},
        },
        "loss": {
            "_target_": "nemo.collections.common.losses.smoothed_cross_entropy.SmoothedCrossEntropyLoss",
            "label_smoothing": config.label_smoothing,
            "pad_id": 2,
        },
        "optim": {
            "name": "adamw",
            "lr": 3e-4,
            "betas": [0.9, 0.98],
            "weight_decay": 1e-3,
            "sched": {
                "name": "InverseSquareRootAnnealing",
                "warmup_steps": 2500,
                "warmup_ratio": None,
                "min_lr": 1e-6,
            },
        },
        "target": _MODEL,
        "nemo_version": "2.4.0",
    }
