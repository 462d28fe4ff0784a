"""The configuration of a NeMo Canary as a template, in which `_setting` marks a field of `ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from raytrain.model.config import ModelConfig


def _setting(dotted: str) -> Callable[[ModelConfig], object]:
    return attrgetter(dotted)


_DROPOUTS = {
    "ffn_dropout": _setting("dropout"),
    "attn_score_dropout": _setting("dropout"),
    "attn_layer_dropout": _setting("dropout"),
}
NEMO_CONFIG: Mapping[str, Any] = {
    "sample_rate": _setting("sample_rate"),
    "label_smoothing": _setting("label_smoothing"),
    "use_loss_mask_for_prompt": False,
    "log_prediction": False,
    "prompt_format": _setting("prompt_format"),
    "prompt_defaults": None,
    "model_defaults": {
        "asr_enc_hidden": _setting("encoder_width"),
        "lm_enc_hidden": _setting("decoder_width"),
        "lm_dec_hidden": _setting("decoder_width"),
    },
    "train_ds": None,
    "validation_ds": None,
    "test_ds": None,
    "tokenizer": {
        "dir": None,
        "type": "agg",
        "langs": None,  # entries by language, put in when they are known
        "custom_tokenizer": {
            "_target_": "nemo.collections.common.tokenizers.canary_tokenizer.CanaryTokenizer",
            "tokenizers": None,
        },
    },
    "preprocessor": {
        "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
        "sample_rate": _setting("sample_rate"),
        "normalize": "per_feature",
        "window_size": 0.025,
        "window_stride": 0.01,
        "window": "hann",
        "features": _setting("mel_bins"),
        "n_fft": 512,
        "log": True,
        "frame_splicing": 1,
        "dither": 1e-5,
        "pad_to": 0,
        "pad_value": 0.0,
    },
    "spec_augment": {
        "_target_": "nemo.collections.asr.modules.SpectrogramAugmentation",
        "freq_masks": _setting("spec_augment.freq_masks"),
        "freq_width": _setting("spec_augment.freq_width"),
        "time_masks": _setting("spec_augment.time_masks"),
        "time_width": _setting("spec_augment.time_width"),
    },
    "encoder": {
        "_target_": "nemo.collections.asr.modules.ConformerEncoder",
        "feat_in": _setting("mel_bins"),
        "feat_out": -1,
        "n_layers": _setting("encoder_layers"),
        "d_model": _setting("encoder_width"),
        "subsampling": "dw_striding",
        "subsampling_factor": 8,
        "subsampling_conv_channels": _setting("subsampling_channels"),
        "causal_downsampling": False,
        "reduction": None,
        "reduction_position": None,
        "reduction_factor": 1,
        "ff_expansion_factor": _setting("encoder_ff_factor"),
        "self_attention_model": "rel_pos",
        "n_heads": _setting("encoder_heads"),
        "att_context_size": [-1, -1],
        "xscaling": False,
        "untie_biases": True,
        "pos_emb_max_len": 5000,
        "conv_kernel_size": _setting("conv_kernel"),
        "conv_norm_type": "batch_norm",
        "conv_context_size": None,
        "dropout": _setting("dropout"),
        "dropout_pre_encoder": _setting("dropout"),
        "dropout_emb": 0.0,
        "dropout_att": _setting("dropout"),
    },
    "transf_encoder": {
        "_target_": "nemo.collections.asr.modules.transformer.transformer_encoders.TransformerEncoder",
        "num_layers": 0,
        "hidden_size": _setting("decoder_width"),
        "inner_size": lambda config: 4 * config.decoder_width,
        "num_attention_heads": _setting("decoder_heads"),
        **_DROPOUTS,
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
            "max_sequence_length": _setting("max_positions"),
            "num_token_types": 0,
            "embedding_dropout": _setting("dropout"),
            "learn_positional_encodings": False,
            "hidden_size": _setting("decoder_width"),
            "inner_size": lambda config: config.decoder_width * config.decoder_ff_factor,
            "num_layers": _setting("decoder_layers"),
            "num_attention_heads": _setting("decoder_heads"),
            **_DROPOUTS,
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
        "hidden_size": _setting("decoder_width"),
        "num_classes": _setting("padded_vocab_size"),
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
        "label_smoothing": _setting("label_smoothing"),
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
    "target": "nemo.collections.asr.models.aed_multitask_models.EncDecMultiTaskModel",
    "nemo_version": "2.4.0",
}


def filled(table: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The template with its functions applied to a configuration."""
    return {name: _value(entry, config) for name, entry in table.items()}


def _value(entry: object, config: ModelConfig) -> object:
    if callable(entry):
        return entry(config)
    return filled(entry, config) if isinstance(entry, dict) else entry
