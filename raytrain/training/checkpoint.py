"""Checkpoints: a folder per step that appears whole or not at all, and that is checked when read.

    checkpoints/step_00000500/model.pt        weights (plain tensors)
                              optimizer.pt    AdamW states
                              average.pt      averaged weights, where `train.average_decay` is set
                              meta.json       step, schedule state, ids, model settings, sizes of the files

Everything loads with `weights_only=True`: a checkpoint from elsewhere can't run code.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from raytrain.errors import CheckpointError
from raytrain.storage.artifacts import (
    atomic_write_bytes,
    canonical_json,
    file_id,
    is_count,
    is_number,
    make_folder,
    parse_json,
    read_at_once,
    storage_error,
)

META = "meta.json"
_FORMAT = "raytrain.checkpoint/1"
BEST = "best.json"
StateDict = dict[str, Any]  # tensors by name, or what an optimizer nests of them


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
        """Read `model`, `optimizer` or `average`. Raises `CheckpointError` for a damaged file."""
        path = self.folder / f"{name}.pt"
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{path} can't be read",
                why=next(iter(str(error).splitlines()), type(error).__name__),
                remedy="run the same command again: a damaged checkpoint is passed over for the one before it",
            ) from error

    @property
    def lineage(self) -> str | None:
        """Names what it was learnt from; None where it does not say."""
        return self.meta.get("ids", {}).get("lineage")

    def check_lineage(self, lineage: str | None) -> None:
        """Raises `CheckpointError` where it was learnt from something else than `lineage` names."""
        if self.lineage != lineage:
            raise CheckpointError(
                f"{self.folder} is a checkpoint of another training",
                got=f"lineage {self.lineage}",
                allowed=f"lineage {lineage}",
                why="its settings or its data were others; another process may have written to the run folder",
                remedy="end what else writes there, remove the folder `checkpoints`, and train again",
            )

    def has(self, name: str) -> bool:
        """Whether there is such a part."""
        return f"{name}.pt" in self.meta["files"]

    def load_weights(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The weights to decode with: averaged where there is an average."""
        state = self.load("model", device)
        if self.has("average"):
            average = self.load("average", device)
            state.update({name: average[name] for name in average.keys() & state.keys()})
        return state


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
            _save(state, temporary / f"{name}.pt")
        if extra is not None:
            extra(temporary)
        files = {f"{name}.pt": file_id(temporary / f"{name}.pt") for name in parts}
        document = {"format": _FORMAT, "step": step, "files": files, **meta}
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


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a state dict. Raises `OSError` where the disk is full or a limit is reached."""
    with _CheckedFile(path, "wb") as file:
        try:
            torch.save(state, file)
        except Exception as error:
            if file.refused is not None:  # of which torch's zip writer says "unexpected pos" alone
                raise file.refused from error
            raise


class _CheckedFile(io.FileIO):
    """A file that remembers why a write was refused, and writes all that it is given."""

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
    """A checkpoint folder whose files are all there and unchanged, else None."""
    try:
        meta = parse_meta(read_at_once(folder / META))
        whole = meta is not None and all(file_id(folder / name) == known for name, known in meta["files"].items())
    except (OSError, ValueError):
        return None
    return Checkpoint(folder, meta) if whole else None


def parse_meta(data: bytes) -> dict[str, Any] | None:
    """What a checkpoint's `meta.json` says; None where that is not what `write_checkpoint` writes."""
    try:
        meta = parse_json(data)
    except ValueError:
        return None
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT or not is_count(meta.get("step")):
        return None
    files, optional = meta.get("files"), {"ids": {}, "model": {}, "schedule": {}, **meta}
    fits = (
        isinstance(files, dict)
        and "model.pt" in files
        and all(Path(name).name == name and isinstance(known, str) for name, known in files.items())
        and all(isinstance(optional[name], dict) for name in ("ids", "model"))
        and all(isinstance(identity, str) for identity in optional["ids"].values())
        and all(is_number(meta.get(name, 0.0)) for name in ("seconds", "audio_seconds"))
        and _is_schedule(optional["schedule"])
    )
    return meta if fits else None


def _is_schedule(state: Any) -> bool:
    """Whether this is how far a `BatchSchedule` or a stream had come, or nothing."""
    if not isinstance(state, dict) or not is_count(state.get("epoch", 0)):
        return False
    positions, segments = state.get("positions", []), state.get("segments", [])
    return (
        (not state or "epoch" in state and ("positions" in state or "segments" in state))
        and _are_counts(positions)
        and isinstance(segments, list)
        and all(
            isinstance(one, list) and len(one) == 2 and _are_counts(one[0]) and is_count(one[1]) for one in segments
        )
    )


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(map(is_count, values))


class Mirror(Protocol):
    """Keeps copies of checkpoint folders elsewhere. No method raises because that place is away."""

    def put(self, source: Path) -> None:
        """Copy a folder or a file."""

    def remove(self, name: str) -> None:
        """Remove the copy of a folder."""


class CheckpointFolder:
    """Writes, lists and prunes the checkpoints of one run; keeps the newest `keep` and the `keep_best` best ones by
    validation error. `mirror` is told of what is written and removed."""

    def __init__(self, folder: Path, keep: int = 2, keep_best: int = 1, mirror: Mirror | None = None) -> None:
        self.folder, self.keep, self.keep_best, self._mirror = Path(folder), keep, keep_best, mirror

    def save(self, step: int, parts: dict[str, dict], meta: dict[str, Any]) -> Checkpoint:
        """Write `parts` (name → state dict) as `step_N`. Raises `StorageError`; older ones stay as they are."""
        checkpoint = write_checkpoint(self.folder / f"step_{step:08d}", step, parts, meta)
        if self._mirror is not None:
            self._mirror.put(checkpoint.folder)
        self._prune()
        return checkpoint

    def mark_best(self, step: int, error: float, validation: str | None = None) -> bool:
        """Note a checkpoint's validation error; True if it is the lowest so far. `validation` names what was validated
        on and how: errors on something else do not compare, and give way."""
        best = self.best_note(validation)
        known = [one for one in (best or {}).get("kept", []) if one["step"] != step]
        kept = sorted([*known, {"step": step, "error": error}], key=lambda one: (one["error"], one["step"]))
        note = {**kept[0], "kept": kept[: self.keep_best], **({"validation": validation} if validation else {})}
        atomic_write_bytes(self.folder / BEST, canonical_json(note))
        if self._mirror is not None:
            self._mirror.put(self.folder / BEST)
        return kept[0]["step"] == step

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint; broken ones are passed over."""
        for folder in sorted(self.folder.glob("step_*"), reverse=True):
            checkpoint = read_checkpoint(folder)
            if checkpoint is not None:
                return checkpoint
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step. Raises `CheckpointError` where it is not whole."""
        folder = self.folder / f"step_{step:08d}"
        checkpoint = read_checkpoint(folder)
        if checkpoint is None:
            raise CheckpointError(
                f"{folder} is not a whole checkpoint", remedy="check that all nodes see the run folder"
            )
        return checkpoint

    def best(self) -> Checkpoint | None:
        """The checkpoint with the lowest validation error, else the newest."""
        note = self.best_note()
        found = read_checkpoint(self.folder / f"step_{note['step']:08d}") if note else None
        return found or self.newest()

    def about(self, which: str) -> Checkpoint | None:
        """The `newest` or the `best` checkpoint for what its `meta` says; its files need not be here."""
        return self.best() if which == "best" else self.newest()

    def to_decode(self, which: str) -> Checkpoint | None:
        """The `last` or the `best` checkpoint with what `load_weights` reads."""
        return self.best() if which == "best" else self.newest()

    def weights_of(self, step: int) -> Checkpoint:
        """The checkpoint of a step with what `load_weights` reads. Raises `CheckpointError` where it is not whole."""
        return self.at(step)

    def settle(self) -> None:
        """Come back when what was saved is where it is to stay."""

    def best_note(self, validation: str | None = None) -> dict[str, Any] | None:
        """`step` and `error` of the best checkpoint, None before the first validation, or before the first that
        `validation` names (see `mark_best`)."""
        try:
            note = parse_json(read_at_once(self.folder / BEST))
        except (OSError, ValueError):
            return None
        if not _is_score(note):
            return None
        if validation is not None and note.get("validation", validation) != validation:
            return None
        kept = note.get("kept", [note])
        if not isinstance(kept, list) or not kept or not all(map(_is_score, kept)):
            return None
        return {**note, "kept": [{"step": one["step"], "error": one["error"]} for one in kept]}

    def _prune(self) -> None:
        best = {f"step_{one['step']:08d}" for one in (self.best_note() or {}).get("kept", [])}
        for name in self._names()[: -self.keep]:
            if name not in best:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                if self._mirror is not None:
                    self._mirror.remove(name)

    def _names(self) -> list[str]:
        return sorted(folder.name for folder in self.folder.glob("step_*"))


def _is_score(note: Any) -> bool:
    return isinstance(note, dict) and is_count(note.get("step")) and is_number(note.get("error"))


def validation_of(meta: dict[str, Any]) -> str | None:
    """What a checkpoint of this `meta` is validated on; see `CheckpointFolder.mark_best`."""
    return meta.get("ids", {}).get("validation")


class CheckpointWriter:
    """Writes checkpoints in a thread while training goes on; one at a time. An error is raised by the next call."""

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:  # else what ended training is the better error
                raise
        finally:
            self._pool.shutdown()

    def save(self, step: int, parts: dict[str, dict], meta: dict[str, Any], error: float | None, *, wait: bool) -> None:
        """Copy `parts` to the host and hand them over; with `wait` come back when all is written."""
        self.wait()
        self._pending = self._pool.submit(self._write, step, _on_host(parts), meta, error)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, step: int, parts: dict[str, dict], meta: dict[str, Any], error: float | None) -> None:
        self._folder.save(step, parts, meta)
        if error is not None:
            self._folder.mark_best(step, error, validation_of(meta))


def _on_host(value: Any) -> Any:
    """A copy of nested dictionaries and lists with their tensors in host memory: training changes its own in place."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_on_host(one) for one in value]
    return value
