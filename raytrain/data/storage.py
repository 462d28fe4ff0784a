"""Files wherever they are: a local path, or a URI of any filesystem that pyarrow or fsspec knows.

    expand("s3://speech/manifest_{0..7}.jsonl")      # eight URIs; _OP_0..7_CL_ is NeMo's spelling of the same
    with open_stream("corpus.jsonl.gz") as file: ... # decompressed by its ending
    read_range("s3://speech/audio_0.tar", 512, 64044)

Credentials, endpoints and regions come from the environment, as each filesystem reads them (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, …).
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from raytrain.errors import DataError

_URI = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_COMPRESSION = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_BRACES = re.compile(r"\{([^{}]*)\}|_OP_(.*?)_CL_")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_EXPANDED = 1_000_000
_CONNECTIONS = 32


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
        path = f"{root.rstrip('/')}/{path}"
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
        raise StorageReadError(f"can't reach {root}", why=str(error)) from error
    import fsspec

    try:
        filesystem, base = fsspec.core.url_to_fs(root)
    except (ValueError, ImportError) as error:
        raise StorageReadError(
            f"no filesystem for {root}", why=str(error), allowed="what pyarrow or fsspec knows"
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


def _guarded(action: str):
    def decorate(function):
        @functools.wraps(function)
        def call(path: str, *arguments: Any, **options: Any) -> Any:
            try:
                return function(path, *arguments, **options)
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                why = "no such file or directory" if missing else error.strerror or str(error)
                raise StorageReadError(f"can't {action} {path}", why=why) from error

        return call

    return decorate


@_guarded("read")
def open_file(path: str) -> Any:
    """A file with `read`, `seek` and `size`, as it lies there. Raises `StorageReadError`."""
    filesystem, name = locate(path)
    return filesystem.open_input_file(name)


@_guarded("read")
def open_stream(path: str) -> Any:
    """A stream from the start, decompressed if the name ends in .gz or .zst. Raises `StorageReadError`."""
    filesystem, name = locate(path)
    return filesystem.open_input_stream(name, compression=compression(path))


@_guarded("read")
def read_range(path: str, start: int, size: int) -> bytes:
    """`size` bytes from `start` on, or all if `size` is 0. Raises `StorageReadError`, also where there are fewer."""
    filesystem, name = locate(path)
    with filesystem.open_input_file(name) as file:
        data = file.read_at(size or file.size(), start)
    if size and len(data) != size:
        raise StorageReadError(f"{path} is cut short", got=f"{len(data)} bytes from {start} on", allowed=f"{size}")
    return data


@_guarded("read")
def file_size(path: str) -> int:
    """Bytes of a file. Raises `StorageReadError` where there is none."""
    filesystem, name = locate(path)
    info = filesystem.get_file_info(name)
    if not info.is_file:
        kind = "is a directory" if info.type.name == "Directory" else "no such file or directory"
        raise StorageReadError(f"can't read {path}", why=kind)
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


@_guarded("list")
def list_files(folder: str, pattern: str = "*") -> list[str]:
    """Files in a folder, sorted, whose name matches a shell pattern. Raises `StorageReadError`."""
    import pyarrow.fs

    filesystem, name = locate(folder)
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(name))
    base = folder.rstrip("/")
    names = [info.base_name for info in found if info.is_file and fnmatch.fnmatchcase(info.base_name, pattern)]
    return [f"{base}/{name}" for name in sorted(names)]


@_guarded("read")
def fingerprint(path: str) -> list[Any] | None:
    """Size and time of change: tells that a file changed without reading it; None for a folder.

    Raises `StorageReadError` where there is nothing.
    """
    filesystem, name = locate(path)
    info = filesystem.get_file_info(name)
    if info.type.name == "NotFound":
        raise StorageReadError(f"can't read {path}", why="no such file or directory")
    return [info.size, info.mtime_ns] if info.is_file else None


def fingerprints(paths: Sequence[str]) -> list[list[Any] | None]:
    """`fingerprint` of many files; remote ones are asked for at the same time."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(fingerprint, paths))


def compression(path: str) -> str | None:
    """`gzip` or `zstd` by the name's ending, None for plain files."""
    return _COMPRESSION.get(Path(path).suffix.lower())


def bare_name(path: str) -> str:
    """The last part of a path without a compression's ending."""
    name = path.rstrip("/").rpartition("/")[2]
    return name[: -len(Path(name).suffix)] if compression(name) else name


def expand(pattern: str) -> list[str]:
    """Paths that a pattern stands for: `{0..7}`, `{a,b}`, `_OP_0..7_CL_`, and `*`, `?` in the last part.

    Numbers keep leading zeros (`{00..15}`). Raises `StorageReadError` where a `*` matches nothing.
    """
    parts, end = [], 0
    for match in _BRACES.finditer(pattern):
        parts += [[pattern[end : match.start()]], _choices(match)]
        end = match.end()
    parts.append([pattern[end:]])
    if math.prod(map(len, parts)) > _MAX_EXPANDED:
        raise StorageReadError(f"{pattern} stands for too many files", allowed=f"{_MAX_EXPANDED}")
    found: list[str] = []
    for name in map("".join, itertools.product(*parts)):
        folder, _, last = name.rpartition("/")
        if not any(mark in last for mark in "*?"):
            found.append(name)
            continue
        matches = list_files(folder or ".", last)
        if not matches:
            raise StorageReadError(f"no file matches {name}")
        found += matches
    return found


def _choices(match: re.Match) -> Sequence[str]:
    inner = match[1] if match[1] is not None else match[2]
    span = _RANGE.fullmatch(inner)
    if not span:
        # As in a shell, {name} is a name.
        return inner.split(",") if "," in inner else [match[0]]
    first, last = int(span[1]), int(span[2])
    if abs(last - first) >= _MAX_EXPANDED:
        raise StorageReadError(f"{match.string} stands for too many files", allowed=f"{_MAX_EXPANDED}")
    width = max(len(text) for text in span.groups()) if any(text[0] == "0" for text in span.groups()) else 0
    step = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]
