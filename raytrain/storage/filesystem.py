"""Files wherever they are: a local path, or a URI of any filesystem that pyarrow or fsspec knows.

    expand("s3://speech/manifest_{0..7}.jsonl")      # eight URIs; _OP_0..7_CL_ is NeMo's spelling of the same
    with open_stream("corpus.jsonl.gz") as file: ... # decompressed by its ending
    read_range("s3://speech/audio_0.tar", 512, 64044)

Credentials, endpoints and regions come from the environment, as each filesystem reads them (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, …). A filesystem that is away (no connection, overloaded, an error of its own) is asked again for
`$RAYTRAIN_STORAGE_PATIENCE` seconds, 120 if unset; what it refuses (no such file, no permission) is told at once.
"""

from __future__ import annotations

import fnmatch
import functools
import io
import itertools
import math
import os
import random
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from raytrain.errors import DataError, StorageError
from raytrain.storage.artifacts import atomic_write_bytes, make_folder, storage_error
from raytrain.waiting import AFTER_SECONDS, EVERY_SECONDS, tell

_URI = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_COMPRESSION = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_BRACES = re.compile(r"\{([^{}]*)\}|_OP_(.*?)_CL_")
_NUMBERS = re.compile(r"([+-]?[0-9]+)\.\.([+-]?[0-9]+)(?:\.\.([+-]?[0-9]+))?")
_PADDED = re.compile(r"-?0[0-9]")
_LETTERS = re.compile(r"([a-z])\.\.([a-z])|([A-Z])\.\.([A-Z])")
_MAX_EXPANDED = 1_000_000
_CONNECTIONS = 32
_BLOCK = 8 << 20
PATIENCE_VARIABLE = "RAYTRAIN_STORAGE_PATIENCE"
# How filesystems say that it is they who can't, and not the request that is wrong.
_AWAY = re.compile(
    r"NETWORK_CONNECTION|curlCode|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT"
    r"|HTTP status 5\d\d|timed? ?out|connection (?:refused|reset|aborted|closed)|can't connect|couldn't connect"
    r"|temporarily unavailable|name resolution",
    re.IGNORECASE,
)


_REACHED = (
    "check the path, data.root (or $RAYTRAIN_DATA_ROOT) and who may read it; `raytrain doctor` tries the storage on "
    "every node"
)


class StorageReadError(DataError):
    """A file or folder can't be listed or read."""


def is_uri(path: str) -> bool:
    """Whether a path names a filesystem, as `s3://bucket/key` does."""
    return bool(_URI.match(path))


def absolute(path: str, root: str = "") -> str:
    """`path` below `root` unless it is a URI or absolute; a local result is absolute."""
    if is_uri(path):
        return path
    path = os.path.expanduser(path)
    if root and not os.path.isabs(path):
        path = os.path.expanduser(f"{root.rstrip('/')}/{path}")
    return path if is_uri(path) else os.path.abspath(path)


def parent(path: str) -> str:
    """The folder that holds `path`."""
    head, slash, _ = path.rpartition("/")
    return head or slash


@functools.lru_cache(maxsize=64)
def _filesystem(root: str) -> tuple[Any, str]:
    """The pyarrow filesystem of `scheme://host`, and how it spells that root."""
    import pyarrow.fs

    try:
        return pyarrow.fs.FileSystem.from_uri(root)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        pass  # not one of pyarrow's own
    except OSError as error:
        raise StorageReadError(f"can't reach {root}", why=str(error), remedy=_REACHED) from error
    import fsspec

    try:
        filesystem, base = fsspec.core.url_to_fs(root)
    except (ValueError, ImportError) as error:
        raise StorageReadError(
            f"no filesystem for {root}",
            why=str(error),
            allowed="what pyarrow or fsspec knows",
            remedy="correct the address, or install the package that fsspec names for it",
        ) from error
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), base


def locate(path: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a path, and the path as that filesystem spells it."""
    if not is_uri(path) or path.startswith("file://"):
        import pyarrow.fs

        return pyarrow.fs.LocalFileSystem(), path.removeprefix("file://")
    scheme, _, rest = path.partition("://")
    host, _, key = rest.partition("/")
    # One connection for a bucket; pyarrow takes the region from it.
    filesystem, base = _filesystem(f"{scheme}://{host}")
    return filesystem, f"{base.rstrip('/')}/{key}" if key else base


def is_away(error: BaseException) -> bool:
    """Whether an error says that a filesystem can't be reached or can't answer now, so that asking again may help."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    return isinstance(error, ConnectionError | TimeoutError) or bool(_AWAY.search(str(error)))


def patiently(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function that may be called again, until no filesystem that it asks is away, or patience is at its end."""
    until = time.monotonic() + float(os.environ.get(PATIENCE_VARIABLE) or 120)
    wait, told, start = 0.25, AFTER_SECONDS, time.monotonic()
    while True:
        try:
            return function(*arguments, **options)
        except (OSError, DataError, StorageError) as error:
            if not is_away(error) or time.monotonic() + wait > until:
                raise
            if time.monotonic() - start > told:
                told += EVERY_SECONDS
                tell(f"storage to answer ({' '.join(str(error).split())[:200]})", time.monotonic() - start)
        time.sleep(wait * random.uniform(0.5, 1.5))  # many workers ask at the same time
        wait = min(2 * wait, 8.0)


def _guarded(action: str):
    def decorate(function):
        @functools.wraps(function)
        def call(path: str, *arguments: Any, **options: Any) -> Any:
            try:
                if is_uri(path):
                    return patiently(function, path, *arguments, **options)
                return function(path, *arguments, **options)
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                why = "no such file or directory" if missing else error.strerror or str(error)
                raise StorageReadError(f"can't {action} {path}", why=why, remedy=_REACHED) from error

        return call

    return decorate


@_guarded("read")
def open_file(path: str) -> Any:
    """A file with `read`, `seek` and `size`, as it lies there. Raises `StorageReadError`."""
    filesystem, name = locate(path)
    _check_regular(path, name)
    return filesystem.open_input_file(name)


@_guarded("read")
def open_stream(path: str) -> io.RawIOBase:
    """A stream from the start, decompressed if the name ends in .gz or .zst. Raises `StorageReadError`, also where it
    is read and is not what its name says."""
    filesystem, name = locate(path)
    _check_regular(path, name)
    kind = compression(path)
    if kind and not filesystem.get_file_info(name).size:
        raise _not_compressed(path, kind, "the file is empty")
    return _Stream(path, kind, filesystem.open_input_stream(name, compression=kind))


def _check_regular(path: str, name: str) -> None:
    """Opening a pipe would wait for its other end."""
    if not is_uri(path) and not stat.S_ISREG(os.stat(name).st_mode):
        kind = "it is a folder" if os.path.isdir(name) else "it is a pipe, a socket or a device"
        raise StorageReadError(f"can't read {path}", why=kind, remedy="name a file")


def _not_compressed(path: str, kind: str, why: str) -> StorageReadError:
    return StorageReadError(
        f"can't read {path} to its end",
        why=f"{why}: its name says {kind}, and its content is none, or damaged or cut",
        remedy=f"check it with `{'zstd' if kind == 'zstd' else 'gzip'} -t`; write it anew, or rename it if it is plain",
    )


class _Stream(io.RawIOBase):
    """What pyarrow reads and decompresses, whose errors name neither the file nor what to do."""

    def __init__(self, path: str, kind: str | None, stream: Any) -> None:
        self._path, self._kind, self._stream = path, kind, stream

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._stream.read(None if size < 0 else size))
        except OSError as error:
            if self._kind:
                raise _not_compressed(self._path, self._kind, str(error)) from error
            raise StorageReadError(
                f"can't read {self._path} to its end", why=str(error), remedy="check the disk or the store"
            ) from error

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


@_guarded("read")
def read_range(path: str, start: int, size: int, *, most: int = sys.maxsize) -> bytes:
    """`size` bytes from `start` on, or all if `size` is 0. Raises `StorageReadError`, also where there are fewer, and
    where there would be more than `most`."""
    filesystem, name = locate(path)
    with filesystem.open_input_file(name) as file:
        if (size or file.size()) > most:
            raise StorageReadError(
                f"{path} is too large to be read at once",
                got=f"{size or file.size()} bytes",
                allowed=f"{most}",
                remedy="cut it, or put it on a local disk",
            )
        data = file.read_at(size or file.size(), start)
    if size and len(data) != size:
        raise StorageReadError(
            f"{path} is cut short",
            got=f"{len(data)} bytes from {start} on",
            allowed=f"{size}",
            remedy="copy the file again, then run `raytrain assign`",
        )
    return data


@_guarded("read")
def file_size(path: str) -> int:
    """Bytes of a file. Raises `StorageReadError` where there is none."""
    filesystem, name = locate(path)
    info = filesystem.get_file_info(name)
    if not info.is_file:
        kind = "is a directory" if info.type.name == "Directory" else "no such file or directory"
        raise StorageReadError(f"can't read {path}", why=kind, remedy=_REACHED)
    if not is_uri(path):
        with open(path, "rb"):  # a forbidden file fails here, not on a worker
            pass
    return info.size


def file_sizes(paths: Sequence[str]) -> list[int]:
    """`file_size` of many files; remote ones are asked for at the same time."""
    if not any(map(is_uri, paths)):
        return list(map(file_size, paths))
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(file_size, paths))


@_guarded("read")
def is_folder(path: str) -> bool:
    """Whether there is a folder (for an object store: whether keys begin with it)."""
    filesystem, name = locate(path)
    return filesystem.get_file_info(name).type.name == "Directory"


def natural_key(path: str) -> tuple[Any, ...]:
    """Sorts `m_2` before `m_10`, as their numbers are."""
    parts: list[Any] = re.split(r"([0-9]+)", path)
    parts[1::2] = map(int, parts[1::2])
    return tuple(parts), path


def list_files(folder: str, pattern: str = "*", *, recursive: bool = False, missing_ok: bool = False) -> list[str]:
    """Files in a folder, in natural order, whose name matches a shell pattern; with `recursive` those of its folders
    too.

    Raises `StorageReadError`, with `missing_ok` not for a folder that is not there."""
    return [path for path, is_file in _list(folder, pattern, recursive=recursive, missing_ok=missing_ok) if is_file]


@_guarded("list")
def _list(folder: str, pattern: str, *, recursive: bool = False, missing_ok: bool = False) -> list[tuple[str, bool]]:
    """(path, whether it is a file) of what `list_files` looks at, and of folders."""
    import pyarrow.fs

    filesystem, name = locate(folder)
    selector = pyarrow.fs.FileSelector(name, recursive=recursive, allow_not_found=missing_ok)
    base, skipped = folder.rstrip("/"), len(name.rstrip("/")) + 1
    found = [
        (f"{base}/{one.path[skipped:].rstrip('/')}", one.is_file)
        for one in filesystem.get_file_info(selector)
        if fnmatch.fnmatchcase(one.base_name, pattern)
    ]
    return sorted(found, key=lambda one: natural_key(one[0]))


@_guarded("read")
def fingerprint(path: str) -> list[Any] | None:
    """Size and time of change: tells that a file changed without reading it; None for a folder.

    Raises `StorageReadError` where there is nothing.
    """
    filesystem, name = locate(path)
    info = filesystem.get_file_info(name)
    if info.type.name == "NotFound":
        raise StorageReadError(f"can't read {path}", why="no such file or directory", remedy=_REACHED)
    return [info.size, info.mtime_ns] if info.is_file else None


def fingerprints(paths: Sequence[str]) -> list[list[Any] | None]:
    """`fingerprint` of many files; remote ones are asked for at the same time."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(fingerprint, paths))


@_guarded("read")
def exists(path: str) -> bool:
    """Whether there is a file. Raises `StorageReadError` where that can't be told."""
    filesystem, name = locate(path)
    return filesystem.get_file_info(name).is_file


def download(path: str, target: Path, check: Callable[[Path], None] = lambda copy: None) -> None:
    """Copy a file to a local path, where it appears whole or not at all, and only if `check` does not raise.

    Raises `FileNotFoundError` where there is none, and `StorageReadError`.
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


def make_parent(filesystem: Any, name: str) -> None:
    """Create the folder of a file where the filesystem has folders; object stores have names with slashes."""
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


def _copy_into(source: Path, out: Any) -> None:
    with open(source, "rb") as data:
        shutil.copyfileobj(data, out, _BLOCK)


def _put(path: str, write: Callable[[Any], Any]) -> None:
    """An object store shows an object when it is whole; on other filesystems a reader may see half of it."""

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
    """Remove a file; one that is not there is fine. Raises `StorageError`."""

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
    """Move a file, or all files of a folder, to another place of the same filesystem. Raises `StorageError`."""
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
    """`gzip` or `zstd` by the name's ending, None for plain files."""
    return _COMPRESSION.get(Path(path).suffix.lower())


def bare_name(path: str) -> str:
    """The last part of a path without a compression's ending."""
    name = path.rstrip("/").rpartition("/")[2]
    return name[: -len(Path(name).suffix)] if compression(name) else name


def expand(pattern: str) -> list[str]:
    """Paths that a pattern stands for: `{0..7}`, `{a,b}`, `_OP_0..7_CL_`, and `*`, `?` in the last part.

    Braces mean what they mean to a shell, but do not nest: `{0..11}` is 0 to 11, `{00..11}` keeps the zeros,
    `{8..0..2}` goes down by 2. What a `*` stands for comes in natural order (2 before 10): files, or folders where no
    file matches, and none whose name begins with a dot. Raises `StorageReadError` where a `*` matches nothing.
    """
    parts, end = [], 0
    for match in _BRACES.finditer(pattern):
        parts += [[pattern[end : match.start()]], _choices(match)]
        end = match.end()
    parts.append([pattern[end:]])
    if math.prod(map(len, parts)) > _MAX_EXPANDED:
        raise _too_many(pattern)
    found: list[str] = []
    for name in map("".join, itertools.product(*parts)):
        folder, slash, last = name.rpartition("/")
        if not any(mark in last for mark in "*?"):
            found.append(name)
            continue
        matches = [
            one for one in _list(folder or slash or ".", last) if last[0] == "." or "/." not in one[0][len(folder) :]
        ]
        chosen = [path for path, is_file in matches if is_file] or [path for path, _ in matches]
        if not chosen:
            raise StorageReadError(
                f"no file matches {name}", remedy="check the pattern and data.root (or $RAYTRAIN_DATA_ROOT)"
            )
        found += chosen
    return found


def _too_many(pattern: str) -> StorageReadError:
    return StorageReadError(
        f"{pattern} stands for too many files", allowed=f"{_MAX_EXPANDED}", remedy="check the numbers in its braces"
    )


def _choices(match: re.Match) -> Sequence[str]:
    inner = match[1] if match[1] is not None else match[2]
    if letters := _LETTERS.fullmatch(inner):
        first, last = (ord(letter) for letter in letters.groups() if letter)
        return [chr(number) for number in _span(first, last, 1)]
    span = _NUMBERS.fullmatch(inner)
    if not span:
        # As in a shell, {name} is a name.
        return inner.split(",") if "," in inner else [match[0]]
    first, last, step = int(span[1]), int(span[2]), abs(int(span[3] or 1)) or 1
    if abs(last - first) // step >= _MAX_EXPANDED:
        raise _too_many(match.string)
    ends = span[1], span[2]
    width = max(map(len, ends)) if any(map(_PADDED.match, ends)) else 0
    return [f"{number:0{width}d}" for number in _span(first, last, step)]


def _span(first: int, last: int, step: int) -> range:
    return range(first, last + 1, step) if last >= first else range(first, last - 1, -step)
