"""Models by path: read `.nemo`, Hugging Face folders and raytrain checkpoints, write any of the three.

parts = load_model(Path("runs/digits"))                    # the run's best checkpoint
save_model(parts, Path("digits.nemo"))
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.errors import CheckpointError, StorageError
from raytrain.model.config import ModelConfig, SpecAugmentSettings
from raytrain.model.formats.huggingface import read_huggingface, write_huggingface
from raytrain.model.formats.nemo import read_nemo, write_nemo
from raytrain.model.formats.portable import ModelParts, check_state
from raytrain.storage.artifacts import check_absent, file_id, storage_error
from raytrain.training.checkpoint import Checkpoint, CheckpointFolder, read_checkpoint, write_checkpoint
from raytrain.training.checkpoint_meta import CheckpointMeta

_KINDS = "a .nemo file, a run folder, a checkpoint folder (step_N) or a Hugging Face folder"


class Format(StrEnum):
    """The formats that `save_model` writes."""

    nemo = "nemo"
    raytrain = "raytrain"
    huggingface = "huggingface"


def load_model(path: Path) -> ModelParts:
    """Read a model of any kind; for a run folder, the checkpoint with the best validation WER.

    Raises `CheckpointError` if there is none, it is damaged, or its architecture differs.
    """
    path = Path(path)
    if path.is_file():
        return read_nemo(path)
    if not path.exists():
        raise CheckpointError(
            f"there is no model at {path}", allowed=_KINDS, remedy="check the path; it must be on this machine"
        )
    if (path / "config.json").exists():
        return read_huggingface(path)
    checkpoint = find_checkpoint(path)
    if checkpoint is None and (path / "meta.json").exists():
        raise CheckpointError(
            f"the checkpoint {path} is damaged",
            why="a file is missing or was changed",
            remedy="name another checkpoint of the run, or the run folder, which uses the best complete one",
        )
    if checkpoint is None:
        raise CheckpointError(
            f"{path} holds no model",
            allowed=_KINDS,
            remedy="name a folder that has one; a run has no model before its first checkpoint",
        )
    return _read_raytrain(checkpoint)


def find_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint of a run folder, its `checkpoints` or one `step_N`."""
    if (path / "meta.json").exists():
        return read_checkpoint(path)
    folder = path / "checkpoints"
    return CheckpointFolder(folder if folder.is_dir() else path).best()


def model_config_of(meta: CheckpointMeta) -> ModelConfig:
    """`ModelConfig` from a checkpoint's meta data. Raises `CheckpointError`."""
    try:
        values = dict(meta["model"])
        return ModelConfig(**{**values, "spec_augment": SpecAugmentSettings(**values["spec_augment"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "a checkpoint has no usable model settings",
            why=str(error),
            remedy="name another checkpoint; this one is from another version of raytrain, or damaged",
        ) from error


def model_stamp(path: Path) -> list[list[str]]:
    """Identifies a model's files by content, for outputs that depend on the model.

    Raises `CheckpointError` if there is nothing at `path`.
    """
    path = Path(path).expanduser().absolute()
    checkpoint = find_checkpoint(path) if path.is_dir() and not (path / "config.json").exists() else None
    folder = checkpoint.folder if checkpoint else path
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else [folder]
    try:
        return [[file.relative_to(folder).as_posix(), _content(file)] for file in files]
    except OSError as error:
        raise CheckpointError(
            f"there is no model at {path}", allowed=_KINDS, remedy="check the path; it must be on this machine"
        ) from error


def _content(path: Path) -> str:
    stat = path.stat()
    return _file_id(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=1024)
def _file_id(path: Path, *stamp: int) -> str:
    """Hashing gigabytes takes seconds, and a run needs it several times."""
    return file_id(path)


def _read_raytrain(checkpoint: Checkpoint) -> ModelParts:
    folder = checkpoint.folder.resolve()
    # A training run keeps its tokenizer once, next to its checkpoints; an exported model has its own.
    folders = [folder / "tokenizer", folder.parent.parent / "tokenizer"]
    tokenizer_folder = next((candidate for candidate in folders if (candidate / "tokenizer.json").exists()), None)
    if tokenizer_folder is None:
        raise CheckpointError(
            f"{checkpoint.folder} has no tokenizer",
            allowed="a folder tokenizer in it or in its run folder",
            remedy="copy the tokenizer folder of the run that trained it next to its checkpoints",
        )
    config = model_config_of(checkpoint.meta)
    tokenizer = CanaryTokenizer.load(tokenizer_folder)
    wanted = checkpoint.meta.get("ids", {}).get("tokenizer")
    if tokenizer.id != wanted or tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.folder} was trained with a different tokenizer than {tokenizer_folder}",
            got=f"{tokenizer.id} with {tokenizer.vocab_size} ids",
            allowed=f"{wanted} with {config.vocab_size} ids",
            why="the run has trained another tokenizer since, and its ids now mean other pieces",
            remedy="name a newer checkpoint, or restore this one's tokenizer",
        )
    parts = ModelParts.of_state(config, checkpoint.load_weights(), tokenizer.models)
    check_state(parts.config, parts.state)
    return parts


def check_target(source: Path, target: Path, format: Format, overwrite: bool) -> None:
    """Raises `StorageError` if a file at `target` must not be replaced, above all the input model."""
    source, target = Path(source).expanduser(), Path(target)
    if source.exists() and target.exists() and os.path.samefile(source, target):
        raise StorageError(f"{target} is the input model", remedy="choose another name")
    if format is Format.nemo:
        check_absent(target, overwrite)


def save_model(parts: ModelParts, path: Path, format: Format) -> None:
    """Write a model. A folder must be new or empty; a `.nemo` file is replaced atomically.

    Raises `CheckpointError` if the format can't represent the architecture, `StorageError` if writing fails.
    """
    path = Path(path)
    if format is Format.nemo:
        write_nemo(path, parts)
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists already", remedy="choose a new folder; nothing was overwritten")
    if format is Format.huggingface:
        try:
            write_huggingface(parts, path)
        except OSError as error:
            raise storage_error(path, error) from error
        return
    tokenizer = CanaryTokenizer(parts.tokenizers)
    meta: CheckpointMeta = {"ids": {"tokenizer": tokenizer.id}, "model": asdict(parts.config)}
    write_checkpoint(path, 0, {"model": parts.state}, meta, extra=lambda folder: tokenizer.save(folder / "tokenizer"))


def format_of(path: Path) -> Format:
    """The format of an output path by its extension: `.nemo`, else our own folder."""
    return Format.nemo if path.suffix == ".nemo" else Format.raytrain


def describe(parts: ModelParts) -> str:
    """One line about a model."""
    config = parts.config
    tied = parts.state["log_softmax.mlp.layer0.weight"].numel()
    buffers = ("running_mean", "running_var", "num_batches_tracked", "featurizer.window", "featurizer.fb", "pos_enc")
    numbers = sum(value.numel() for name, value in parts.state.items() if not name.endswith(buffers)) - tied
    languages = [name for name in parts.tokenizers if name != "spl_tokens"]
    return json.dumps(
        {
            "parameters_millions": round(numbers / 1e6, 2),
            "encoder": f"{config.encoder_layers}x{config.encoder_width}",
            "decoder": f"{config.decoder_layers}x{config.decoder_width}",
            "prompt_format": config.prompt_format,
            "languages": languages,
            "vocab_size": config.vocab_size,
        }
    )
