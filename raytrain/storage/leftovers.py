"""What killed commands leave behind.

Every file that raytrain writes gets its final name when it is complete; until then its name begins with a dot and ends
with eight random characters. Ray Train keeps the state of each training in `ray/train-*`, which nothing reads once
training has ended. A local Ray leaves its session folder, with a note of the process that owned it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raytrain.errors import StorageError, system_reason
from raytrain.storage.filesystem import file_sizes, list_files, remove_files
from raytrain.storage.locations import is_uri

RAY_FOLDER = "ray"
OWNER_FILE = "owner.json"
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}", re.DOTALL)
_TRAINING = re.compile(r"train-\d+")
_PROBE = ".doctor-*"
_PROBE_SECONDS = 3600.0


@dataclass(frozen=True)
class Leftover:
    """A file or a folder, what it is, and its size in bytes. `path` may be a URI of a folder."""

    path: str
    what: str
    bytes: int

    def remove(self) -> None:
        """Remove it; if it is gone already, that is not an error. Raises `StorageError`."""
        if is_uri(self.path):
            remove_files(self.path)
            return
        path = Path(self.path)
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError(
                f"can't remove {path}", why=system_reason(error), remedy="remove it by hand, as a user with permission"
            ) from error


def temporaries(folder: Path, before: float) -> Iterator[Leftover]:
    """Files and folders below `folder` that were never finished, last changed before a time in seconds; links are not
    followed, and run folders with an owner are left alone."""
    for parent, folders, files in os.walk(folder):
        _skip_owned_runs(parent, folders)
        for name in [name for name in [*folders, *files] if _TEMPORARY.fullmatch(name)]:
            path = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_mtime < before and _is_unfinished(path):
                    yield Leftover(str(path), "never finished", size_of(path))
            if name in folders:
                folders.remove(name)


def _is_unfinished(path: Path) -> bool:
    """Whether a file or folder with a temporary's name is really one. Artifacts have an extension before the
    temporary's suffix, and are private until they are complete; `.env.template` is a user's file."""
    name = path.name[1:].rpartition(".")[0]
    return "." in name or name in ("writing", "fetching") or not path.lstat().st_mode & 0o077


def _skip_owned_runs(parent: str, folders: list[str]) -> None:
    """Skip folders with a separate owner during a walk: the owner may be running."""
    folders[:] = [name for name in folders if not os.path.lexists(os.path.join(parent, name, OWNER_FILE))]


def remove_temporaries(folder: Path, before: float) -> None:
    """Remove what `temporaries` lists, as far as possible."""
    for leftover in temporaries(folder, before):
        with contextlib.suppress(StorageError):
            leftover.remove()


def trainings(location: str) -> Iterator[Leftover]:
    """Ray Train's state folders for the run at `location` (a path or a URI) and its trials."""
    what = "Ray Train's notes of a training that is over"
    if is_uri(location):
        files: dict[str, list[str]] = {}
        base = f"{location.rstrip('/')}/{RAY_FOLDER}"
        for path in list_files(base, recursive=True, missing_ok=True):
            name = path.removeprefix(f"{base}/").partition("/")[0]
            if _TRAINING.fullmatch(name):
                files.setdefault(name, []).append(path)
        for name, paths in files.items():
            yield Leftover(f"{base}/{name}", what, sum(file_sizes(paths)))
        return
    for parent, folders, _ in os.walk(location):
        _skip_owned_runs(parent, folders)
        if Path(parent).name == RAY_FOLDER:
            for name in filter(_TRAINING.fullmatch, folders):
                yield Leftover(f"{parent}/{name}", what, size_of(Path(parent, name)))
            folders.clear()


def probes(root: str) -> Iterator[Leftover]:
    """Files that a killed `raytrain doctor` left in a local `run.root`."""
    for path in [] if is_uri(root) else Path(root).glob(_PROBE):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - _PROBE_SECONDS:
                yield Leftover(str(path), "of a doctor that was killed", size_of(path))


def previous(folder: Path) -> Iterator[Leftover]:
    """Checkpoints of other settings, which training moved aside."""
    path = folder / "previous"
    if path.is_dir():
        yield Leftover(str(path), "checkpoints of other settings", size_of(path))


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    total = 0
    for parent, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total
