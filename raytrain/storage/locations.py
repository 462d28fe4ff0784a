"""Paths and URIs, and the filesystem that each belongs to."""

from __future__ import annotations

import functools
import os
import re
from typing import TYPE_CHECKING

from raytrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow.fs

_URI = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
CHECK_THE_PATH = (
    "check the path, data.root (or $RAYTRAIN_DATA_ROOT) and its permissions; `raytrain doctor` tries the storage on "
    "every node"
)


class StorageReadError(DataError):
    """A file or folder can't be listed or read."""


def is_uri(path: str) -> bool:
    """Whether a path names a filesystem, as `s3://bucket/key` does."""
    return bool(_URI.match(path))


def absolute(path: str, root: str = "") -> str:
    """`path` below `root` unless it is a URI or absolute; a local path is made absolute."""
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


def natural_key(path: str) -> tuple[tuple[str | int, ...], str]:
    """A natural sort key: `m_2` comes before `m_10`."""
    parts: list[str | int] = re.split(r"([0-9]+)", path)
    parts[1::2] = map(int, parts[1::2])
    return tuple(parts), path


@functools.lru_cache(maxsize=64)
def _filesystem(root: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow filesystem of `scheme://host`, and that root as the filesystem spells it. Raises
    `StorageReadError`."""
    import pyarrow.fs

    try:
        return pyarrow.fs.FileSystem.from_uri(root)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        pass  # not built into pyarrow
    except OSError as error:
        raise StorageReadError(f"can't reach {root}", why=str(error), remedy=CHECK_THE_PATH) from error
    import fsspec

    try:
        filesystem, base = fsspec.core.url_to_fs(root)
    except (ValueError, ImportError) as error:
        raise StorageReadError(
            f"no filesystem for {root}",
            why=str(error),
            allowed="any filesystem of pyarrow or fsspec",
            remedy="correct the address, or install the package that fsspec names for it",
        ) from error
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), base


def locate(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow filesystem of a path, and the path as that filesystem spells it."""
    if not is_uri(path) or path.startswith("file://"):
        import pyarrow.fs

        return pyarrow.fs.LocalFileSystem(), path.removeprefix("file://")
    scheme, _, rest = path.partition("://")
    host, _, key = rest.partition("/")
    # One connection per bucket; pyarrow infers the region from it.
    filesystem, base = _filesystem(f"{scheme}://{host}")
    return filesystem, f"{base.rstrip('/')}/{key}" if key else base
