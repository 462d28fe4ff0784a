"""Checkpoints: one folder per step, written atomically and checked when read.

    checkpoints/step_00000500/model.pt        weights (plain tensors)
                              optimizer.pt    AdamW states
                              average.pt      averaged weights, if `train.average_decay` is set
                              meta.json       step, schedule state, ids, model settings, sizes of the files

Everything loads with `weights_only=True`: a checkpoint from elsewhere can't run code.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from raytrain.errors import CheckpointError, first_line
from raytrain.storage.artifacts import (
    atomic_write_bytes,
    canonical_json,
    file_id,
    make_folder,
    parse_json,
    read_at_once,
    storage_error,
)
from raytrain.training.checkpoint_meta import (
    FORMAT,
    BestNote,
    CheckpointMeta,
    Score,
    is_score,
    parse_meta,
    validation_of,
)

META = "meta.json"
BEST = "best.json"
StateDict = dict[str, Any]  # tensors by name, or an optimizer's nested state


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is complete on disk."""

    folder: Path
    meta: CheckpointMeta

    @property
    def step(self) -> int:
        """Number of optimizer steps when it was written."""
        return self.meta["step"]

    def load(self, name: str, device: str | torch.device = "cpu") -> StateDict:
        """Read `model`, `optimizer` or `average`. Raises `CheckpointError` for a damaged file."""
        path = self.folder / f"{name}.pt"
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{path} can't be read",
                why=first_line(error),
                remedy="run the same command again: a damaged checkpoint is skipped, and the previous one is used",
            ) from error

    @property
    def lineage(self) -> str | None:
        """Identifies its settings and data; None if it does not say."""
        return self.meta.get("ids", {}).get("lineage")

    def check_lineage(self, lineage: str | None) -> None:
        """Raises `CheckpointError` if its lineage is not `lineage`."""
        if self.lineage != lineage:
            raise CheckpointError(
                f"{self.folder} is a checkpoint of another training",
                got=f"lineage {self.lineage}",
                allowed=f"lineage {lineage}",
                why="its settings or data differ; another process may have written to the run folder",
                remedy="stop other processes that write there, remove the folder `checkpoints`, and train again",
            )

    def has(self, name: str) -> bool:
        """Whether there is such a part."""
        return f"{name}.pt" in self.meta["files"]

    def load_weights(self, device: str | torch.device = "cpu") -> StateDict:
        """The weights to decode with: averaged if there is an average."""
        state = self.load("model", device)
        if self.has("average"):
            average = self.load("average", device)
            state.update({name: average[name] for name in average.keys() & state.keys()})
        return state


def write_checkpoint(
    final: Path,
    step: int,
    parts: Mapping[str, StateDict],
    meta: CheckpointMeta,
    extra: Callable[[Path], object] | None = None,
) -> Checkpoint:
    """Write one checkpoint folder atomically; it replaces an older folder of that name.

    `extra` may add files to the folder before it appears. Raises `StorageError`.
    """
    make_folder(final.parent)
    temporary = Path(tempfile.mkdtemp(prefix=".writing.", dir=final.parent))
    try:
        for name, state in parts.items():
            _save(state, temporary / f"{name}.pt")
        if extra is not None:
            extra(temporary)
        files = {f"{name}.pt": file_id(temporary / f"{name}.pt") for name in parts}
        document: CheckpointMeta = {"format": FORMAT, "step": step, "files": files, **meta}
        (temporary / META).write_bytes(canonical_json(document))
        os.chmod(temporary, 0o755)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except OSError as error:
        raise storage_error(final, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Checkpoint(final, document)


def _save(state: StateDict, path: Path) -> None:
    """Write a state dict. Raises `OSError` where the disk is full or a limit is reached."""
    with _CheckedFile(path, "wb") as file:
        try:
            torch.save(state, file)
        except Exception as error:
            if file.refused is not None:  # which torch's zip writer reports only as "unexpected pos"
                raise file.refused from error
            raise


class _CheckedFile(io.FileIO):
    """A file that writes all data it is given, and remembers why a write was refused."""

    refused: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`. Raises `OSError`."""
        view, written = memoryview(data).cast("B"), 0
        try:
            while written < len(view):
                written += super().write(view[written:]) or 0
        except OSError as error:
            self.refused = error
            raise
        return written


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """A checkpoint folder whose files are all present and unchanged, else None."""
    try:
        meta = parse_meta(read_at_once(folder / META))
        if meta is None or any(file_id(folder / name) != identity for name, identity in meta["files"].items()):
            return None
    except (OSError, ValueError):
        return None
    return Checkpoint(folder, meta)


class Mirror(Protocol):
    """Keeps copies of checkpoint folders elsewhere. No method raises if that storage is unavailable."""

    def put(self, source: Path) -> None:
        """Copy a folder or a file."""

    def remove(self, name: str) -> None:
        """Remove the copy of a folder."""


class CheckpointFolder:
    """Writes, lists and prunes the checkpoints of one run; keeps the newest `keep` and the `keep_best` best ones by
    validation error. `mirror` is notified of writes and removals."""

    def __init__(self, folder: Path, keep: int = 2, keep_best: int = 1, mirror: Mirror | None = None) -> None:
        self.folder, self.keep, self.keep_best, self._mirror = Path(folder), keep, keep_best, mirror

    def save(self, step: int, parts: Mapping[str, StateDict], meta: CheckpointMeta) -> Checkpoint:
        """Write `parts` (name → state dict) as `step_N`. Raises `StorageError`; older checkpoints are untouched."""
        checkpoint = write_checkpoint(self.folder / f"step_{step:08d}", step, parts, meta)
        if self._mirror is not None:
            self._mirror.put(checkpoint.folder)
        self._prune()
        return checkpoint

    def mark_best(self, step: int, error: float, validation: str | None = None) -> bool:
        """Record a checkpoint's validation error; True if it is the lowest so far. `validation` identifies the dev set
        and the settings of validation: errors of another validation are not comparable, and are discarded."""
        scores = [score for score in self._kept_scores(validation) if score["step"] != step]
        scores.append({"step": step, "error": error})
        kept = sorted(scores, key=lambda score: (score["error"], score["step"]))
        note: BestNote = {"step": kept[0]["step"], "error": kept[0]["error"], "kept": kept[: self.keep_best]}
        if validation:
            note["validation"] = validation
        atomic_write_bytes(self.folder / BEST, canonical_json(note))
        if self._mirror is not None:
            self._mirror.put(self.folder / BEST)
        return kept[0]["step"] == step

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint; damaged checkpoints are skipped."""
        for folder in sorted(self.folder.glob("step_*"), reverse=True):
            checkpoint = read_checkpoint(folder)
            if checkpoint is not None:
                return checkpoint
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step. Raises `CheckpointError` if it is incomplete."""
        folder = self.folder / f"step_{step:08d}"
        checkpoint = read_checkpoint(folder)
        if checkpoint is None:
            raise CheckpointError(
                f"{folder} is not a complete checkpoint", remedy="check that all nodes see the run folder"
            )
        return checkpoint

    def best(self) -> Checkpoint | None:
        """The checkpoint with the lowest validation error, else the newest."""
        note = self.best_note()
        checkpoint = read_checkpoint(self.folder / f"step_{note['step']:08d}") if note else None
        return checkpoint or self.newest()

    def about(self, which: str) -> Checkpoint | None:
        """The `newest` or the `best` checkpoint for reading its `meta`; its other files need not be local."""
        return self.best() if which == "best" else self.newest()

    def to_decode(self, which: str) -> Checkpoint | None:
        """The `last` or the `best` checkpoint with the files that `load_weights` reads."""
        return self.best() if which == "best" else self.newest()

    def weights_of(self, step: int) -> Checkpoint:
        """The checkpoint of a step with the files that `load_weights` reads. Raises `CheckpointError` if it is
        incomplete."""
        return self.at(step)

    def flush(self) -> None:
        """Return once all saved checkpoints are in their final storage."""

    def best_note(self, validation: str | None = None) -> BestNote | None:
        """`step` and `error` of the best checkpoint, None before the first validation, or the first that matches
        `validation` (see `mark_best`)."""
        try:
            note = parse_json(read_at_once(self.folder / BEST))
        except (OSError, ValueError):
            return None
        if not is_score(note):
            return None
        if validation is not None and note.get("validation", validation) != validation:
            return None
        kept = note.get("kept", [note])
        if not isinstance(kept, list) or not kept or not all(map(is_score, kept)):
            return None
        scores: list[Score] = [{"step": score["step"], "error": score["error"]} for score in kept]
        best: BestNote = {"step": note["step"], "error": note["error"], "kept": scores}
        if "validation" in note:
            best["validation"] = note["validation"]
        return best

    def _kept_scores(self, validation: str | None = None) -> list[Score]:
        note = self.best_note(validation)
        return note["kept"] if note is not None else []

    def _prune(self) -> None:
        best = {f"step_{score['step']:08d}" for score in self._kept_scores()}
        for name in self._names()[: -self.keep]:
            if name not in best:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                if self._mirror is not None:
                    self._mirror.remove(name)

    def _names(self) -> list[str]:
        return sorted(folder.name for folder in self.folder.glob("step_*"))


class CheckpointWriter:
    """Writes checkpoints in a background thread, one at a time. An error is raised by the next call."""

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:  # otherwise the error that ended training is more useful
                raise
        finally:
            self._pool.shutdown()

    def save(
        self, step: int, parts: Mapping[str, StateDict], meta: CheckpointMeta, error: float | None, *, wait: bool
    ) -> None:
        """Copy `parts` to the host and hand them over; with `wait` return once all is written."""
        self.wait()
        self._pending = self._pool.submit(self._write, step, _on_host(parts), meta, error)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, step: int, parts: Mapping[str, StateDict], meta: CheckpointMeta, error: float | None) -> None:
        self._folder.save(step, parts, meta)
        if error is not None:
            self._folder.mark_best(step, error, validation_of(meta))


def _on_host(value: object) -> Any:
    """A copy of nested dictionaries and lists with their tensors in host memory, since training keeps changing the
    originals."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_on_host(entry) for entry in value]
    return value
