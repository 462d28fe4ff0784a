"""The files of a Hugging Face folder: JSON objects and safetensors, read as untrusted input and written atomically."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from raytrain.errors import CheckpointError, StorageError
from raytrain.model.formats.portable import float32_state

_COPY_AGAIN = "copy the file again from where the model was saved"


def import_safetensors() -> ModuleType:
    """The library, which only this format needs. Raises `CheckpointError` if it is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError("Hugging Face folders need safetensors", remedy="pip install safetensors") from error
    return safetensors


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointError`."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds no settings",
            got=type(content).__name__,
            why="it must be a JSON object",
            remedy=_COPY_AGAIN,
        )
    return content


def load_features(folder: Path) -> dict[str, Any]:
    """The feature extractor's settings, which a model's `save_pretrained` leaves out."""
    if (folder / "preprocessor_config.json").exists():
        return load_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").exists():
        features = load_json(folder / "processor_config.json").get("feature_extractor")
        return features if isinstance(features, dict) else {}
    return {}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, floats as float32. Raises `CheckpointError`."""
    safetensors = import_safetensors()
    try:
        return float32_state(safetensors.torch.load_file(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All weights under Hugging Face's names, from one file or from its shards."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_tensors(folder / "model.safetensors")
    weight_map = load_json(index).get("weight_map")
    shards = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
    names = [name for name in shards if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", name)]
    if len(names) < len(shards):
        raise CheckpointError(
            f"{index} names files outside its folder",
            got=sorted(map(repr, shards))[:3],
            remedy="load models only from sources that you trust; save this one again with save_pretrained",
        )
    return {name: value for shard in sorted(names) for name, value in load_tensors(folder / shard).items()}


def write_folder(folder: Path, files: Mapping[str, bytes], tensors: Mapping[str, dict[str, Tensor]]) -> None:
    """Write a folder with a subfolder `tokenizer`; it appears complete or not at all. Raises `StorageError` if the
    folder isn't empty or can't be written."""
    safetensors = import_safetensors()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder} exists", allowed="a new or empty folder", remedy="choose another, or remove it")
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        (scratch / "tokenizer").mkdir(parents=True)
        for name, data in files.items():
            (scratch / name).write_bytes(data)
        for name, state in tensors.items():
            safetensors.torch.save_file(state, scratch / name, metadata={"format": "pt"})
            # safetensors makes its files readable only by the owner.
            (scratch / name).chmod((scratch / "config.json").stat().st_mode)
        os.replace(scratch, folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise StorageError(
            f"{folder} can't be written",
            why=str(error),
            remedy="free space or choose another target folder; nothing was left behind",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} can't be read", why=str(error), remedy=f"{_COPY_AGAIN}, and check its permissions")
