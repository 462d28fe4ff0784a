"""Checkpoints: a folder per step that appears whole or not at all, and that is checked when read.

    checkpoints/step_00000500/model.pt        weights (plain tensors)
                              optimizer.pt    AdamW states
                              meta.json       step, schedule state, ids, model settings, sizes of the files

Everything loads with `weights_only=True`: a checkpoint from elsewhere can't run code.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytrain.artifacts import atomic_write_bytes, canonical_json, file_id, make_folder, storage_error
from raytrain.errors import CheckpointError

_META = "meta.json"
_FORMAT = "raytrain.checkpoint/1"
_BEST = "best.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found complete on disk."""

    folder: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return self.meta["step"]

    def load(self, name: str, device: str | torch.device = "cpu") -> dict[str, Any]:
        """Read `model` or `optimizer`. Raises `CheckpointError` for a damaged file."""
        path = self.folder / f"{name}.pt"
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path} can't be read", why=str(error).splitlines()[0]) from error


def write_checkpoint(
    final: Path,
    step: int,
    parts: dict[str, dict],
    meta: dict[str, Any],
    extra: Callable[[Path], object] | None = None,
) -> Checkpoint:
    """Write one checkpoint folder, which appears whole or not at all and replaces an older one of its name.

    `extra` may add files to the folder before it appears. Raises `StorageError`.
    """
    make_folder(final.parent)
    temporary = Path(tempfile.mkdtemp(prefix=".writing.", dir=final.parent))
    try:
        for name, state in parts.items():
            torch.save(state, temporary / f"{name}.pt")
        if extra is not None:
            extra(temporary)
        files = {f"{name}.pt": file_id(temporary / f"{name}.pt") for name in parts}
        document = {"format": _FORMAT, "step": step, "files": files, **meta}
        (temporary / _META).write_bytes(canonical_json(document))
        os.chmod(temporary, 0o755)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except OSError as error:
        raise storage_error(final, error) from error
    except RuntimeError as error:  # how torch.save reports a full disk
        raise storage_error(final, OSError(str(error))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Checkpoint(final, document)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """A checkpoint folder whose files are all there and unchanged, else None."""
    try:
        meta = json.loads((folder / _META).read_bytes())
        whole = meta["format"] == _FORMAT and all(
            Path(name).name == name and file_id(folder / name) == identity for name, identity in meta["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Checkpoint(folder, meta) if whole else None


class CheckpointFolder:
    """Writes, lists and prunes the checkpoints of one run; keeps the newest `keep` and the best by WER."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, parts: dict[str, dict], meta: dict[str, Any]) -> Checkpoint:
        """Write `parts` (name → state dict) as `step_N`. Raises `StorageError`; older ones stay as they are."""
        checkpoint = write_checkpoint(self.folder / f"step_{step:08d}", step, parts, meta)
        self._prune()
        return checkpoint

    def mark_best(self, step: int, wer: float) -> bool:
        """Note a checkpoint's validation WER; True if it is the lowest so far."""
        best = self._best_note()
        if best is not None and best["wer"] <= wer:
            return False
        atomic_write_bytes(self.folder / _BEST, canonical_json({"step": step, "wer": wer}))
        return True

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint; broken ones are passed over."""
        for folder in sorted(self.folder.glob("step_*"), reverse=True):
            checkpoint = read_checkpoint(folder)
            if checkpoint is not None:
                return checkpoint
        return None

    def best(self) -> Checkpoint | None:
        """The checkpoint with the lowest validation WER, else the newest."""
        note = self._best_note()
        found = read_checkpoint(self.folder / f"step_{note['step']:08d}") if note else None
        return found or self.newest()

    def _best_note(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / _BEST).read_bytes())
        except (OSError, ValueError):
            return None

    def _prune(self) -> None:
        note = self._best_note()
        keep_best = f"step_{note['step']:08d}" if note else None
        for folder in sorted(self.folder.glob("step_*"))[: -self.keep]:
            if folder.name != keep_best:
                shutil.rmtree(folder, ignore_errors=True)
