"""Hugging Face folders, as `transformers.CanaryForConditionalGeneration` loads and saves them.

    write_huggingface(parts, Path("canary-hf"))
    parts = read_huggingface(Path("canary-hf"))       # bit-equal

Hugging Face has neither aggregate tokenizers nor our training settings, so `raytrain.json`, `raytrain.safetensors` and
`tokenizer/<name>.model` hold them next to its own files. Both give the same results in evaluation; in training, Hugging
Face's model has fewer dropouts. Weights are read from safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from raytrain.errors import CheckpointError
from raytrain.model.canary import Canary, exported_state
from raytrain.model.config import ModelConfig, SpecAugmentSettings
from raytrain.model.formats.huggingface_config import SHARED_FIELDS, config_json, model_config_of, preprocessor_json
from raytrain.model.formats.huggingface_files import (
    import_safetensors,
    load_features,
    load_json,
    load_tensors,
    load_weights,
    write_folder,
)
from raytrain.model.formats.huggingface_names import reordered, sines_first, translate
from raytrain.model.formats.portable import HEAD, ModelParts, check_state
from raytrain.model.formats.sentencepieces import PLAIN_NAME, SPECIAL_TOKENS, read_pieces

FORMAT = "raytrain.huggingface/1"
TokenIds = dict[str, int | None]
Settings = TypeVar("Settings", ModelConfig, SpecAugmentSettings)


def write_huggingface(parts: ModelParts, folder: Path) -> None:
    """Write a folder for `from_pretrained` and `read_huggingface`; it appears whole or not at all.

    Raises `CheckpointError` that lists everything in the model that Hugging Face's can't represent, and `StorageError`
    if the folder isn't empty or can't be written.
    """
    import_safetensors()
    skeleton = _skeleton(parts.config)
    files = _texts(parts, _check_exportable(parts, skeleton))
    weights, order = {}, sines_first(parts.config.decoder_width)
    for name, constant in skeleton.items():
        if constant.is_meta and name != HEAD:
            theirs, axis = translate(name)
            weights[theirs] = reordered(parts.state[name].detach().cpu(), order, axis)
    constants = {
        name: parts.state[name].detach().cpu().contiguous()
        for name, constant in skeleton.items()
        if not constant.is_meta
    }
    tensors = {"model.safetensors": weights, "raytrain.safetensors": constants}
    write_folder(Path(folder).absolute(), files, tensors)


def read_huggingface(folder: Path) -> ModelParts:
    """Settings, weights (float32) and tokenizer of a folder that was written by us or by `save_pretrained`.

    Without `raytrain.json` the tokenizers are an empty dict, dropout is the encoder's and the other training settings
    and the prompt format are `ModelConfig`'s defaults. Raises `CheckpointError` that lists everything in the model that
    ours can't compute.
    """
    folder = Path(folder).absolute()
    config = model_config_of(load_json(folder / "config.json"), load_features(folder), folder)
    tokenizers: dict[str, bytes] = {}
    constants: dict[str, Tensor] = {}
    if has_extra := (folder / "raytrain.json").exists():
        config, tokenizers = _read_extra(folder, config)
    weights = load_weights(folder)
    if has_extra:
        constants = load_tensors(folder / "raytrain.safetensors")
    state = _translated(config, weights, constants, folder)
    check_state(config, state)
    return ModelParts(config, state, tokenizers)


def _translated(
    config: ModelConfig, weights: dict[str, Tensor], constants: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Our state from Hugging Face's weights and our constants, which are removed from both. Raises `CheckpointError` if
    they don't fit the settings."""
    if (embedding := weights.get("model.decoder.embed_tokens.weight")) is not None:
        weights.setdefault("proj_out.weight", embedding)
    state, missing = {}, []
    order = torch.argsort(sines_first(config.decoder_width))
    for name, constant in _skeleton(config).items():
        if not constant.is_meta:
            state[name] = constants.pop(name, constant)
            continue
        theirs, axis = translate(name)
        value = weights.pop(theirs, None)
        if value is None or axis is not None and (value.ndim <= axis or value.shape[axis] != config.decoder_width):
            missing.append(theirs)
        else:
            state[name] = reordered(value, order, axis)
    unknown = [name for name in [*weights, *constants] if not name.startswith("preprocessor.featurizer.")]
    if missing or unknown:
        raise CheckpointError(
            f"the weights in {folder} don't fit its config.json",
            got=f"{len(missing)} missing or misshapen {missing[:3]}, {len(unknown)} unknown {unknown[:3]}",
            why="the files are of different models, or one is incomplete",
            remedy="copy the whole folder again from where the model was saved",
        )
    return state


def _skeleton(config: ModelConfig) -> dict[str, Tensor]:
    """The state of a model: constants with their values, weights on meta."""
    with torch.device("meta"):
        model = Canary(replace(config, ctc_head=False))
    for holder in (model.preprocessor, model.transf_decoder._embedding.position_embedding):
        holder.to_empty(device="cpu")
    model.reset_constants()
    return exported_state(model)


def _check_exportable(parts: ModelParts, skeleton: dict[str, Tensor]) -> TokenIds:
    """Raises `CheckpointError` that lists all problems; returns the ids of the tokens that generation needs."""
    config, problems = parts.config, []
    if config.encoder_width != config.decoder_width:
        problems.append(
            f"encoder_width {config.encoder_width} differs from decoder_width {config.decoder_width}, and Hugging "
            "Face's model has no projection between them"
        )
    try:
        check_state(config, parts.state)
    except CheckpointError as error:
        problems.append(str(error))
    problems += _state_problems(parts.state, skeleton)
    problems += [
        f"{name!r} is not a plain tokenizer name" for name in parts.tokenizers if not PLAIN_NAME.fullmatch(name)
    ]
    ids: TokenIds = {}
    try:
        ids = _token_ids(config, parts.tokenizers)
    except RuntimeError as error:
        problems.append(f"the special tokens can't be read: {error}")
    if problems:
        raise CheckpointError(
            "Hugging Face's Canary can't represent this model",
            why="; ".join(problems),
            remedy="convert it to raytrain or nemo instead (--to)",
        )
    return ids


def _state_problems(state: dict[str, Tensor], skeleton: dict[str, Tensor]) -> list[str]:
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()} - {torch.float32}
    problems = [f"weights are {dtype}, convert them with .float()" for dtype in sorted(map(str, dtypes))]
    for name, constant in skeleton.items():
        value = state.get(name, constant)
        # NeMo's constants differ from ours, and ours from Hugging Face's, in the last bits.
        if constant.is_meta or value.shape != constant.shape:
            continue
        if not torch.allclose(value.detach().cpu().float(), constant, rtol=0, atol=1e-4):
            problems.append(f"{name} is not what Hugging Face's model computes for itself")
    return problems


def _token_ids(config: ModelConfig, tokenizers: dict[str, bytes]) -> TokenIds:
    """Ids by name in config.json, None for a token that the tokenizer lacks."""
    start = "<|startoftranscript|>"
    tokens = {"pad": "<pad>", "eos": "<|endoftext|>", "bos": start, "decoder_start": start}
    if config.prompt_format == "canary2":
        tokens["decoder_start"] = "<|startofcontext|>"
    pieces: dict[str, int] = {}
    if SPECIAL_TOKENS in tokenizers:
        pieces = {piece.text: number for number, piece in enumerate(read_pieces(tokenizers[SPECIAL_TOKENS]))}
    return {f"{name}_token_id": pieces.get(token) for name, token in tokens.items()}


def _texts(parts: ModelParts, ids: TokenIds) -> dict[str, bytes]:
    """All files but the weights, by path in the folder."""
    extra = {"format": FORMAT, "config": asdict(parts.config), "tokenizers": list(parts.tokenizers)}
    documents: dict[str, Mapping[str, object]] = {
        "config.json": config_json(parts.config, ids),
        "preprocessor_config.json": preprocessor_json(parts.config),
        "raytrain.json": extra,
    }
    texts = {name: json.dumps(content, indent=2).encode() + b"\n" for name, content in documents.items()}
    return texts | {f"tokenizer/{name}.model": proto for name, proto in parts.tokenizers.items()}


def _read_extra(folder: Path, theirs: ModelConfig) -> tuple[ModelConfig, dict[str, bytes]]:
    """Settings and tokenizers of `raytrain.json`; `theirs` are the settings of config.json. Raises `CheckpointError` if
    it is damaged or belongs to another config.json."""
    path = folder / "raytrain.json"
    content = load_json(path)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r} instead of {FORMAT!r}")
        raw = dict(content["config"])
        raw["spec_augment"] = _typed(SpecAugmentSettings, raw["spec_augment"])
        config = _typed(ModelConfig, raw)
        names = [name for name in content["tokenizers"] if PLAIN_NAME.fullmatch(name)]
        if names != content["tokenizers"]:
            raise ValueError("tokenizers must be plain names")
        tokenizers = {name: (folder / "tokenizer" / f"{name}.model").read_bytes() for name in names}
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged",
            why=f"{type(error).__name__}: {error}",
            remedy="convert the model again with `raytrain convert`",
        ) from error
    ours = replace(config, vocab_size=config.padded_vocab_size)  # the vocabulary is padded in config.json
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in SHARED_FIELDS]
    differing = [f"{name} is {our!r} and {their!r}" for name, our, their in pairs if our != their]
    if differing:
        raise CheckpointError(
            "raytrain.json and config.json differ",
            got="; ".join(differing),
            why=f"in {folder}",
            remedy="undo the change of config.json, or delete raytrain.json, and with it the tokenizers",
        )
    return config, tokenizers


def _typed(cls: type[Settings], values: dict[str, Any]) -> Settings:
    """A settings object from JSON. Raises `TypeError` if a key is unknown or a value does not have its default's
    type."""
    default = cls()
    for name, kind in ((field.name, type(getattr(default, field.name))) for field in fields(cls)):
        if name in values and type(values[name]) is not kind and (kind, type(values[name])) != (float, int):
            raise TypeError(f"{name} must be {kind.__name__}, got {values[name]!r}")
    return cls(**values)
