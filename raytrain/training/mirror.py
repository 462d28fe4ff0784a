"""Checkpoints on another filesystem: copies (`train.storage_path`), from which training resumes if the run folder is
lost; or the only checkpoints, if the run folder itself is at a URI.

Copying never ends training: a failed copy is logged, and the next checkpoint tries again.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from raytrain.errors import CheckpointError, RaytrainError, StorageError, first_line
from raytrain.storage.artifacts import file_id, make_folder
from raytrain.storage.filesystem import download, list_entries, list_files, remove_file, upload
from raytrain.storage.locations import StorageReadError, locate
from raytrain.storage.run_files import METRICS
from raytrain.storage.run_store import RunStore
from raytrain.training.checkpoint import (
    BEST,
    META,
    Checkpoint,
    CheckpointFolder,
    Mirror,
    StateDict,
    read_checkpoint,
)
from raytrain.training.checkpoint_meta import CheckpointMeta, parse_meta

FOLDER = "checkpoints"
_WEIGHTS = ("model.pt", "average.pt")
_LOG = logging.getLogger("raytrain.checkpoints")


class CheckpointMirror:
    """Checkpoint folders below a path or URI of any filesystem that pyarrow or fsspec knows.

    A copy is complete once it has its `meta.json`, which is written last and removed first.
    """

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")
        self._warned = False

    def put(self, source: Path) -> None:
        """Copy a checkpoint folder or a file; a failure is a warning."""
        try:
            self.copy(source)
            self._warned = False
        except (OSError, RaytrainError) as error:
            if not self._warned:
                _LOG.warning("%s can't be copied to %s (%s); the next checkpoint tries again", source, self.path, error)
            self._warned = True

    def copy(self, source: Path) -> None:
        """Copy a checkpoint folder or a file. Raises `StorageError`."""
        files = [source] if source.is_file() else sorted(source.iterdir(), key=lambda file: file.name == META)
        for file in files:
            upload(file, f"{self.path}/{file.relative_to(source.parent).as_posix()}")

    def remove(self, name: str) -> None:
        """Remove a checkpoint; a missing checkpoint is not an error."""
        try:
            remove_file(f"{self.path}/{name}/{META}")
            filesystem, folder = locate(f"{self.path}/{name}")
            filesystem.delete_dir(folder)
        except (OSError, RaytrainError) as error:
            _LOG.debug("%s was not removed from %s: %s", name, self.path, error)

    def fetch_newest(self, into: Path, lineage: str) -> Checkpoint | None:
        """Fetch the newest complete checkpoint of a lineage into a folder; None if there is none. Raises
        `CheckpointError` if the storage can't be read."""
        try:
            for folder in reversed(list_entries(self.path, "step_*", missing_ok=True)):
                name = Path(folder.path).name
                with tempfile.TemporaryDirectory(dir=into, prefix=".fetching.") as temporary:
                    copy = make_folder(Path(temporary) / name)
                    for path in list_files(folder.path):
                        download(path, copy / Path(path).name)
                    checkpoint = read_checkpoint(copy)
                    if checkpoint is None or checkpoint.lineage != lineage:
                        continue
                    copy.rename(into / name)
                return read_checkpoint(into / name)
        except (OSError, StorageReadError) as error:
            raise CheckpointError(
                f"train.storage_path {self.path} can't be read",
                why=first_line(error),
                remedy="check the path and the credentials, or unset train.storage_path",
            ) from error
        return None


class SharedCheckpoints(CheckpointFolder):
    """The checkpoints of a run at a URI: written to this machine's cache and uploaded, and fetched when they are read.

    The URI is the source of truth. Methods that read raise `StorageReadError` and `CheckpointError`.
    """

    def __init__(self, store: RunStore, keep: int = 2, keep_best: int = 1) -> None:
        self._remote = CheckpointMirror(store.location_of(FOLDER))
        super().__init__(store.local / FOLDER, keep, keep_best, self._remote)
        self._store = store

    def save(self, step: int, parts: Mapping[str, StateDict], meta: CheckpointMeta) -> Checkpoint:
        """Like `CheckpointFolder.save`; log lines up to the step are uploaded first."""
        metrics = self._store.growing_file(METRICS)
        if metrics.exists():
            with contextlib.suppress(StorageError):  # the upload of the checkpoint will report it
                self._store.share(metrics.name, metrics)
        return super().save(step, parts, meta)

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, fetched; those only in the cache belong to an earlier run folder and are
        removed."""
        self._refresh_best()
        names = self._names()
        for folder in self.folder.glob("step_*"):
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)
        for name in reversed(names):
            checkpoint = self._fetch(name)
            if checkpoint is not None:
                return checkpoint
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step, fetched. Raises `CheckpointError` if it is incomplete."""
        return self._whole(step)

    def best(self) -> Checkpoint | None:
        """The checkpoint with the lowest validation error, else the newest, fetched."""
        self._refresh_best()
        note = self.best_note()
        return (self._fetch(f"step_{note['step']:08d}") if note else None) or self.newest()

    def about(self, which: str) -> Checkpoint | None:
        """The `newest` or the `best` checkpoint for reading its `meta`."""
        self._refresh_best()
        note, names = self.best_note(), self._names()
        best = f"step_{note['step']:08d}" if note and which == "best" else None
        for name in ([best] if best in names else []) + names[::-1]:
            meta = self._meta(name)
            if meta is not None:
                return Checkpoint(self.folder / name, meta)
        return None

    def to_decode(self, which: str) -> Checkpoint | None:
        """The `last` or the `best` checkpoint with its weights fetched, not the rest of it."""
        checkpoint = self.about("best" if which == "best" else "newest")
        return self._fetch(checkpoint.folder.name, _WEIGHTS) if checkpoint else None

    def weights_of(self, step: int) -> Checkpoint:
        """As `at`, without the rest of it."""
        return self._whole(step, _WEIGHTS)

    def flush(self) -> None:
        """Upload checkpoints whose upload failed when they were written. Raises `StorageError`."""
        uploaded = set(self._names())
        for folder in sorted(self.folder.glob("step_*")):
            if folder.name not in uploaded and read_checkpoint(folder) is not None:
                self._remote.copy(folder)
        if (self.folder / BEST).exists():
            self._remote.copy(self.folder / BEST)

    def _whole(self, step: int, only: tuple[str, ...] | None = None) -> Checkpoint:
        checkpoint = self._fetch(f"step_{step:08d}", only)
        if checkpoint is None:
            raise CheckpointError(
                f"{self._remote.path}/step_{step:08d} is not a complete checkpoint",
                remedy="run `raytrain train` again, which resumes from the newest complete checkpoint",
            )
        return checkpoint

    def _names(self) -> list[str]:
        metas = list_files(self._remote.path, META, recursive=True, missing_ok=True)
        return sorted(name for name in (meta.split("/")[-2] for meta in metas) if name.startswith("step_"))

    def _refresh_best(self) -> None:
        self._store.refresh(f"{FOLDER}/{BEST}")

    def _meta(self, name: str) -> CheckpointMeta | None:
        """The `meta.json` of an uploaded checkpoint; None if it is missing or not valid."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                download(f"{self._remote.path}/{name}/{META}", Path(folder) / META)
                return parse_meta((Path(folder) / META).read_bytes())
            except FileNotFoundError:
                return None

    def _fetch(self, name: str, only: tuple[str, ...] | None = None) -> Checkpoint | None:
        meta = self._meta(name)
        if meta is None:
            return None
        folder = make_folder(self.folder / name)
        files = {file: meta["files"][file] for file in meta["files"] if only is None or file in only}
        for file, identity in files.items():
            path = folder / file
            if not (path.exists() and file_id(path) == identity):
                try:
                    download(f"{self._remote.path}/{name}/{file}", path)
                except FileNotFoundError:
                    return None
            if file_id(path) != identity:
                return None
        if only is None:
            download(f"{self._remote.path}/{name}/{META}", folder / META)
        return Checkpoint(folder, meta)


def checkpoints_of(
    store: RunStore, keep: int = 2, keep_best: int = 1, mirror: Mirror | None = None
) -> CheckpointFolder:
    """A run's checkpoints, local or remote; `mirror` keeps copies of local ones."""
    if store.is_remote:
        return SharedCheckpoints(store, keep, keep_best)
    return CheckpointFolder(store.local / FOLDER, keep, keep_best, mirror)
