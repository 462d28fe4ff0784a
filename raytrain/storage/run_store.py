"""A run folder on another filesystem (`run.root: s3://…`), as one machine sees it.

Every process works in a folder of its machine's cache. It fetches what it needs, checked by content id, and uploads
what it writes for others. The remote folder is the source of truth: a local file that is missing there does not count.

    s3://bucket/runs/NAME/files.json         content ids of the artifacts, written after them
                         stages.json …       small state without an id, fetched again each time
                         assignment/…        parts, whose ids are in their chunk's note
                         checkpoints/…       each with a meta.json that has its files' ids

For a folder on this machine, or on a disk that all nodes share, nothing is copied and every call costs nothing.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from raytrain.errors import ArtifactError, StorageError
from raytrain.storage.artifacts import content_id, file_id, make_folder, read_json, write_json
from raytrain.storage.filesystem import download, list_files, move_files, remove_file, remove_files, upload
from raytrain.storage.locations import is_uri
from raytrain.storage.run_files import (
    ASSIGNMENT_INDEX,
    CONFIG,
    HYPOTHESES,
    LINEAGE_NOTE,
    METRICS,
    MLFLOW_RUN,
    QUARANTINE,
    STAGE_RECORDS,
    TRAINED_NOTE,
)
from raytrain.waiting import repeating

CACHE_VARIABLE = "RAYTRAIN_CACHE"
DEFAULT_CACHE_BYTES = 50 << 30
_INDEX, _INDEX_FORMAT = "files.json", "raytrain.run_files/1"
# What the driver publishes; parts and checkpoints are uploaded by their writers.
_PUBLISHED = (
    "*.json",
    "*.parquet",
    "*.csv",
    "*.html",
    HYPOTHESES,
    QUARANTINE,
    "tokenizer/*",
    ASSIGNMENT_INDEX,
    LINEAGE_NOTE,
    TRAINED_NOTE,
)
# Changed in place, so that their ids are not known in advance.
_STATE = (STAGE_RECORDS, CONFIG, MLFLOW_RUN, METRICS)
_CONNECTIONS = 16
_PARTS = "runs/*/assignment/bucket=*/*"


def cache_folder() -> Path:
    """This machine's cache: `$RAYTRAIN_CACHE`, else `~/.cache/raytrain`."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/raytrain").expanduser().absolute()


def local_folder(location: str) -> Path:
    """Where a run folder's files are on this machine: the folder itself, or for a URI a folder of the cache."""
    if not is_uri(location):
        return Path(location)
    name = location.rstrip("/").rpartition("/")[2]
    return cache_folder() / "runs" / f"{name}-{content_id(location.rstrip('/'))}"


class DamagedFileError(StorageError):
    """A file at a URI is not the one that was written there."""


class RunStore:
    """The files of the run folder at `location`, a path or a URI; names are relative, with slashes.

    Raises `StorageReadError` and `StorageError` if the remote filesystem can't be read or written; a filesystem that is
    only unavailable is retried first (`raytrain.storage.patience`).
    """

    def __init__(self, location: str | Path, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.location = str(location).rstrip("/")
        self.is_remote = is_uri(self.location)
        self.local = local_folder(self.location)
        self._cache_bytes = cache_bytes
        self._ids: dict[str, str] | None = None

    def location_of(self, name: str) -> str:
        """Path or URI of a file that any node can read."""
        return f"{self.location}/{name}"

    def growing_file(self, name: str) -> Path:
        """Where a process writes a growing file that others read by its name; `sharing` puts it there."""
        return self._file(f"own/{name}" if self.is_remote else name)

    # --- artifacts with an id

    def sync(self) -> None:
        """Make this machine's copy match the remote folder; for the driver, before it starts."""
        if not self.is_remote:
            return
        make_folder(self.local)
        self._ids = None
        for name in _STATE:
            self.refresh(name)
        ids = self._published()
        for name in {*self._artifacts(), *ids}:
            if name not in ids or not self._is_fetched(name, ids[name]):
                self._file(name).unlink(missing_ok=True)
        steps = {Path(path).parent.name for path in self._below("checkpoints", "meta.json")}
        for folder in self.local.glob("checkpoints/step_*"):
            if folder.name not in steps:
                shutil.rmtree(folder, ignore_errors=True)

    def fetch(self, *names: str) -> None:
        """Fetch these artifacts as published; an artifact that was not published is removed here too."""
        for name in names if self.is_remote else ():
            identity = self._published().get(name)
            if identity is None or not self._is_fetched(name, identity):
                self._ids = None  # published again in the meantime
                identity = self._published().get(name)
                if identity is None:
                    self._file(name).unlink(missing_ok=True)
                elif not self._is_fetched(name, identity):
                    raise StorageError(
                        f"{self.location_of(name)} is not the file that was written there",
                        why="its content id is not the one in files.json",
                        remedy="rerun its stage",
                    )

    def fetch_folder(self, folder: str) -> None:
        """Fetch all published artifacts below a folder."""
        if self.is_remote:
            self.fetch(*(name for name in self._published() if name.startswith(f"{folder}/")))

    def publish(self) -> None:
        """Upload the artifacts that changed, their ids last; for the driver."""
        if not self.is_remote:
            return
        published, ids = self._published(), {name: file_id(self._file(name)) for name in self._artifacts()}
        for name, identity in ids.items():
            if published.get(name) != identity:
                upload(self._file(name), self.location_of(name))
        if ids != published:
            write_json(self._file(_INDEX), _INDEX_FORMAT, ids)
            self.share(_INDEX)
            self._ids = ids
        for name in published.keys() - ids.keys():
            self.discard(name)

    # --- files without an id

    def share(self, name: str, source: Path | None = None) -> None:
        """Upload a file as it is now, from its path here or from another `source`."""
        if self.is_remote:
            upload(source or self._file(name), self.location_of(name))

    def refresh(self, name: str) -> Path:
        """The path of a file, fetched as it is now; a file that is missing in the remote folder is removed here too."""
        path = self._file(name)
        if self.is_remote:
            with contextlib.suppress(FileNotFoundError):
                download(self.location_of(name), path)
                return path
            path.unlink(missing_ok=True)
        return path

    def names(self, folder: str, pattern: str) -> set[str]:
        """Names of the files in a folder, as stored with the run."""
        if self.is_remote:
            return {Path(path).name for path in self._below(folder, pattern, depth=0)}
        return {path.name for path in self._file(folder).glob(pattern)}

    def refresh_all(self, folder: str, pattern: str) -> None:
        """`refresh` for all files of a folder whose names match; files that are already here are not fetched again."""
        if not self.is_remote:
            return
        there = self.names(folder, pattern)
        here = {path.name for path in self._file(folder).glob(pattern)}
        for name in here - there:
            self._file(f"{folder}/{name}").unlink(missing_ok=True)
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(self.refresh, [f"{folder}/{name}" for name in sorted(there - here)]))

    def discard(self, name: str) -> None:
        """Remove a file here and in the remote folder, if there is one."""
        self._file(name).unlink(missing_ok=True)
        if self.is_remote:
            remove_file(self.location_of(name))

    def clear(self, folder: str) -> None:
        """Remove a folder with all files in it, here and in the remote folder."""
        shutil.rmtree(self._file(folder), ignore_errors=True)
        if self.is_remote:
            remove_files(self.location_of(folder))

    def set_aside(self, *names: str) -> None:
        """Move files and folders of the remote folder into its `previous/`, over what it holds, and drop them here."""
        if not self.is_remote:
            return
        for name in names:
            move_files(self.location_of(name), self.location_of(f"previous/{name}"))
            path = self._file(name)
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def sharing(self, name: str, path: Path, seconds: float = 5.0) -> Iterator[None]:
        """Upload a growing file every few seconds, and at the end, in a background thread while the body runs."""
        if not self.is_remote:
            yield
            return
        shared = -1

        def share() -> float:
            nonlocal shared
            began = time.monotonic()
            size = path.stat().st_size if path.exists() else -1
            if size != shared:
                with contextlib.suppress(StorageError):  # the next attempt may succeed
                    self.share(name, path)
                    shared = size
            return max(seconds, 20 * (time.monotonic() - began))  # a large file is uploaded less often

        with repeating(share, seconds, name="sharing", join_seconds=None):
            yield

    # --- parts of the assignment

    def put_part(self, name: str, identity: str, keep: bool = True) -> None:
        """Upload a part that this process wrote, and with `keep` put it into the cache under its content id."""
        path = self._file(name)
        upload(path, self.location_of(name))
        if keep:
            os.replace(path, self._part(name, identity))
            self._evict()
        else:
            path.unlink()

    def part(self, name: str, identity: str) -> Path:
        """A part in this machine's cache, fetched and checked if needed. The least used parts are evicted."""
        path = self._part(name, identity)
        try:
            os.utime(path)
            return path
        except FileNotFoundError:
            pass
        download(self.location_of(name), path, check=lambda copy: _check(copy, identity, self.location_of(name)))
        self._evict()
        return path

    def _part(self, name: str, identity: str) -> Path:
        return self.local / f"{name}.{identity}"

    def _evict(self) -> None:
        parts = []
        for path in cache_folder().glob(_PARTS):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                parts.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in parts)
        if total <= self._cache_bytes:
            return
        # Keep the newest: it is about to be read.
        for _, size, path in sorted(parts)[:-1]:
            path.unlink(missing_ok=True)
            total -= size
            if total <= 0.9 * self._cache_bytes:
                return

    # --- inside

    def _file(self, name: str) -> Path:
        return self.local / name

    def _artifacts(self) -> list[str]:
        """Names of the artifacts on this machine."""
        names = {path.relative_to(self.local).as_posix() for name in _PUBLISHED for path in self.local.glob(name)}
        hidden = {name for name in names if Path(name).name.startswith(".")}
        return sorted(names - hidden - {_INDEX, *_STATE})

    def _published(self) -> dict[str, str]:
        if self._ids is None:
            path = self.refresh(_INDEX)
            ids = read_json(path, _INDEX_FORMAT, dict[str, str])["body"] if path.exists() else {}
            for name in ids:
                parts = PurePosixPath(name).parts
                if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
                    raise ArtifactError(
                        f"{self.location_of(_INDEX)} names a file outside its folder",
                        got=repr(name),
                        remedy="delete it",
                    )
            self._ids = ids
        return self._ids

    def _is_fetched(self, name: str, identity: str) -> bool:
        path = self._file(name)
        if not (path.exists() and file_id(path) == identity):
            self.refresh(name)
        return path.exists() and file_id(path) == identity

    def _below(self, folder: str, pattern: str, depth: int = 1) -> list[str]:
        paths = list_files(self.location_of(folder), recursive=depth > 0, missing_ok=True)
        return [path for path in paths if fnmatch.fnmatchcase(path.rpartition("/")[2], pattern)]


def _check(path: Path, identity: str, location: str) -> None:
    actual = file_id(path)
    if actual != identity:
        raise DamagedFileError(
            f"{location} is damaged", got=f"content id {actual}", allowed=identity, remedy="rerun assign"
        )
