"""Files, local or remote: a path, or a URI of any filesystem that pyarrow or fsspec knows.

    with open_stream("corpus.jsonl.gz") as file: ... # decompressed according to its extension
    read_range("s3://speech/audio_0.tar", 512, 64044)

Credentials, endpoints and regions come from the environment, as each filesystem reads them (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, …). A filesystem that is unavailable (no connection, overloaded, an internal error) is retried for
`$RAYTRAIN_STORAGE_PATIENCE` seconds, 120 if unset; a refusal (no such file, no permission) is an error at once.
"""

from __future__ import annotations

import fnmatch
import functools
import io
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Concatenate, NamedTuple, ParamSpec, TypeVar

from raytrain.storage.artifacts import atomic_write_bytes, make_folder, storage_error
from raytrain.storage.locations import CHECK_THE_PATH, StorageReadError, is_uri, locate, natural_key, parent
from raytrain.storage.patience import patiently

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs

P = ParamSpec("P")
T = TypeVar("T")
_COMPRESSION = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_CONNECTIONS = 32
_BLOCK = 8 << 20


class Entry(NamedTuple):
    """A file or a folder, by its path or URI."""

    path: str
    is_file: bool


def _guarded(action: str) -> Callable[[Callable[Concatenate[str, P], T]], Callable[Concatenate[str, P], T]]:
    """Let a function of a path wait for an unavailable filesystem, and raise `StorageReadError`."""

    def decorate(function: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
        @functools.wraps(function)
        def call(path: str, /, *arguments: P.args, **options: P.kwargs) -> T:
            try:
                if is_uri(path):
                    return patiently(function, path, *arguments, **options)
                return function(path, *arguments, **options)
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                why = "no such file or directory" if missing else error.strerror or str(error)
                raise StorageReadError(f"can't {action} {path}", why=why, remedy=CHECK_THE_PATH) from error

        return call

    return decorate


@_guarded("read")
def open_file(path: str) -> pyarrow.NativeFile:
    """A file with `read`, `seek` and `size`, as stored, without decompression. Raises `StorageReadError`."""
    filesystem, name = locate(path)
    _check_regular(path, name)
    return filesystem.open_input_file(name)


@_guarded("read")
def open_stream(path: str) -> Stream:
    """A stream from the start, decompressed if the name ends in .gz or .zst. Raises `StorageReadError`, also later
    while reading, if the content does not match the extension."""
    filesystem, name = locate(path)
    _check_regular(path, name)
    kind = compression(path)
    if kind and not filesystem.get_file_info(name).size:
        raise _not_compressed(path, kind, "the file is empty")
    return Stream(path, kind, filesystem.open_input_stream(name, compression=kind))


def _check_regular(path: str, name: str) -> None:
    """Opening a pipe would block until it has a writer."""
    if not is_uri(path) and not stat.S_ISREG(os.stat(name).st_mode):
        kind = "it is a folder" if os.path.isdir(name) else "it is a pipe, a socket or a device"
        raise StorageReadError(f"can't read {path}", why=kind, remedy="name a file")


def _not_compressed(path: str, kind: str, why: str) -> StorageReadError:
    return StorageReadError(
        f"can't read {path} to its end",
        why=f"{why}: its name says {kind}, but its content is something else, damaged or truncated",
        remedy=f"check it with `{'zstd' if kind == 'zstd' else 'gzip'} -t`; write it again, or fix its extension",
    )


class Stream(io.BufferedIOBase):
    """A pyarrow stream whose errors name the file and a remedy, which pyarrow's own lack."""

    def __init__(self, path: str, kind: str | None, stream: pyarrow.NativeFile) -> None:
        self._path, self._kind, self._stream = path, kind, stream

    @property
    def name(self) -> str:
        """The file's path or URI."""
        return self._path

    def readable(self) -> bool:
        """True; text wrappers check this."""
        return True

    def read1(self, size: int = -1) -> bytes:
        """As `read`."""
        return self.read(size)

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes, or all. Raises `StorageReadError`."""
        try:
            return bytes(self._stream.read(None if size is None or size < 0 else size))
        except OSError as error:
            if self._kind:
                raise _not_compressed(self._path, self._kind, str(error)) from error
            raise StorageReadError(
                f"can't read {self._path} to its end", why=str(error), remedy="check the disk or the store"
            ) from error

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._stream.close()
        super().close()


@_guarded("read")
def read_range(path: str, start: int, size: int, *, most: int = sys.maxsize) -> bytes:
    """`size` bytes starting at `start`, or all if `size` is 0. Raises `StorageReadError`, also if the file is shorter
    or more than `most` bytes would be read."""
    filesystem, name = locate(path)
    with filesystem.open_input_file(name) as file:
        if (size or file.size()) > most:
            raise StorageReadError(
                f"{path} is too large to read at once",
                got=f"{size or file.size()} bytes",
                allowed=f"{most}",
                remedy="split it, or put it on a local disk",
            )
        data = file.read_at(size or file.size(), start)
    if size and len(data) != size:
        raise StorageReadError(
            f"{path} is truncated",
            got=f"{len(data)} bytes starting at {start}",
            allowed=f"{size}",
            remedy="copy the file again, then run `raytrain assign`",
        )
    return data


@_guarded("read")
def file_size(path: str) -> int:
    """A file's size in bytes. Raises `StorageReadError` if it doesn't exist."""
    filesystem, name = locate(path)
    info = filesystem.get_file_info(name)
    if not info.is_file:
        kind = "is a directory" if info.type.name == "Directory" else "no such file or directory"
        raise StorageReadError(f"can't read {path}", why=kind, remedy=CHECK_THE_PATH)
    if not is_uri(path):
        with open(path, "rb"):  # an unreadable file fails here, not on a worker
            pass
    return info.size


def file_sizes(paths: Sequence[str]) -> list[int]:
    """`file_size` of many files; remote files are queried concurrently."""
    if not any(map(is_uri, paths)):
        return list(map(file_size, paths))
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(file_size, paths))


@_guarded("read")
def is_folder(path: str) -> bool:
    """Whether a folder exists (for an object store: whether any key begins with it)."""
    filesystem, name = locate(path)
    return filesystem.get_file_info(name).type.name == "Directory"


def list_files(folder: str, pattern: str = "*", *, recursive: bool = False, missing_ok: bool = False) -> list[str]:
    """Files in a folder, in natural order, whose name matches a shell pattern; with `recursive`, those in subfolders
    too.

    Raises `StorageReadError`; with `missing_ok`, not for a missing folder."""
    entries = list_entries(folder, pattern, recursive=recursive, missing_ok=missing_ok)
    return [entry.path for entry in entries if entry.is_file]


@_guarded("list")
def list_entries(folder: str, pattern: str, *, recursive: bool = False, missing_ok: bool = False) -> list[Entry]:
    """The entries that `list_files` filters, folders included."""
    import pyarrow.fs

    filesystem, name = locate(folder)
    selector = pyarrow.fs.FileSelector(name, recursive=recursive, allow_not_found=missing_ok)
    base, skipped = folder.rstrip("/"), len(name.rstrip("/")) + 1
    entries = [
        Entry(f"{base}/{info.path[skipped:].rstrip('/')}", info.is_file)
        for info in filesystem.get_file_info(selector)
        if fnmatch.fnmatchcase(info.base_name, pattern)
    ]
    return sorted(entries, key=lambda entry: natural_key(entry.path))


class Fingerprint(NamedTuple):
    """Detects that a file changed without reading it; `mtime_ns` is its modification time."""

    size: int
    mtime_ns: int | None


@_guarded("read")
def fingerprint(path: str) -> Fingerprint | None:
    """A file's size and modification time; None for a folder.

    Raises `StorageReadError` if nothing is there.
    """
    filesystem, name = locate(path)
    info = filesystem.get_file_info(name)
    if info.type.name == "NotFound":
        raise StorageReadError(f"can't read {path}", why="no such file or directory", remedy=CHECK_THE_PATH)
    return Fingerprint(info.size, info.mtime_ns) if info.is_file else None


def fingerprints(paths: Sequence[str]) -> list[Fingerprint | None]:
    """`fingerprint` of many files; remote files are queried concurrently."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(fingerprint, paths))


@_guarded("read")
def exists(path: str) -> bool:
    """Whether a file exists. Raises `StorageReadError` if that can't be determined."""
    filesystem, name = locate(path)
    return filesystem.get_file_info(name).is_file


def download(path: str, target: Path, check: Callable[[Path], None] = lambda copy: None) -> None:
    """Copy a file to a local path, atomically, and only if `check` does not raise.

    Raises `FileNotFoundError` if it doesn't exist, and `StorageReadError`.
    """
    if not exists(path):
        raise FileNotFoundError(path)
    make_folder(target.parent)
    _download(path, target, check)


@_guarded("read")
def _download(path: str, target: Path, check: Callable[[Path], None]) -> None:
    filesystem, name = locate(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as out, filesystem.open_input_stream(name) as data:
            shutil.copyfileobj(data, out, _BLOCK)
        check(Path(temporary))
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def make_parent(filesystem: pyarrow.fs.FileSystem, name: str) -> None:
    """Create a file's parent folder on filesystems that have folders; in object stores, slashes are part of the
    name."""
    if filesystem.type_name not in ("s3", "gcs", "abfs"):
        filesystem.create_dir(parent(name), recursive=True)


def upload(source: Path, path: str) -> None:
    """Copy a local file to a path or URI. Raises `StorageError`."""
    _put(path, lambda out: _copy_into(source, out))


def write_bytes(path: str, data: bytes) -> None:
    """Write a small file to a path or URI, whole or not at all. Raises `StorageError`."""
    if is_uri(path) and not path.startswith("file://"):
        _put(path, lambda out: out.write(data))
    else:
        atomic_write_bytes(Path(path.removeprefix("file://")), data)


def _copy_into(source: Path, out: BinaryIO) -> None:
    with open(source, "rb") as data:
        shutil.copyfileobj(data, out, _BLOCK)


def _put(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Whether a write is atomic by itself: object stores show an object only when it is complete; elsewhere a reader
    may see half a file."""

    def put() -> None:
        filesystem, name = locate(path)
        make_parent(filesystem, name)
        with filesystem.open_output_stream(name) as out:
            write(out)

    try:
        patiently(put)
    except OSError as error:
        raise storage_error(path, error) from error


def remove_file(path: str) -> None:
    """Remove a file; a missing file is not an error. Raises `StorageError`."""

    def remove() -> None:
        filesystem, name = locate(path)
        if filesystem.get_file_info(name).is_file:
            filesystem.delete_file(name)

    try:
        patiently(remove)
    except OSError as error:
        raise storage_error(path, error) from error


def remove_files(folder: str) -> None:
    """Remove all files below a path or URI, if there are any. Raises `StorageError` and `StorageReadError`."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(remove_file, list_files(folder, recursive=True, missing_ok=True)))


def move_files(source: str, target: str) -> None:
    """Move a file, or all files of a folder, within a filesystem. Raises `StorageError`."""
    names = [source] if exists(source) else list_files(source, recursive=True, missing_ok=True)

    def move(name: str) -> None:
        filesystem, old = locate(name)
        _, new = locate(target + name.removeprefix(source))
        make_parent(filesystem, new)
        filesystem.copy_file(old, new)
        filesystem.delete_file(old)

    try:
        for name in names:
            patiently(move, name)
    except OSError as error:
        raise storage_error(source, error) from error


def compression(path: str) -> str | None:
    """`gzip` or `zstd` by the file's extension, None for plain files."""
    return _COMPRESSION.get(Path(path).suffix.lower())


def bare_name(path: str) -> str:
    """The last part of a path, without a compression extension."""
    name = path.rstrip("/").rpartition("/")[2]
    return name[: -len(Path(name).suffix)] if compression(name) else name
