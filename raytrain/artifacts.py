"""Artefacts: files with a format, a content id and their parents' ids, written atomically.

The id of an artefact is a hash of its body and format alone, so two equal runs write equal bytes and a
stage can tell whether its inputs changed. A reader names the format it expects:

    >>> import tempfile; from pathlib import Path
    >>> path = Path(tempfile.mkdtemp()) / "a.json"
    >>> made = write_json(path, "example/1", {"x": 1})
    >>> read_json(path, "example/1")["body"], read_json(path, "example/1")["id"] == made
    ({'x': 1}, True)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from raytrain.errors import ArtifactError, StorageError


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys: equal values give equal bytes. NaN and infinity are refused."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def content_id(value: Any) -> str:
    """16 hex digits that name a JSON value, or a `bytes` object, by its content."""
    data = value if isinstance(value, bytes) else canonical_json(value)
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def file_id(path: Path) -> str:
    """The content id of a file's bytes, read in blocks."""
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def make_folder(path: Path) -> Path:
    """Create a folder with its parents. Raises `StorageError` where that can't be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(path, error) from error
    return path


def storage_error(path: Path | str, error: OSError) -> StorageError:
    """What to tell a user when the operating system refuses a write."""
    return StorageError(
        f"can't write {path}",
        why=(error.strerror or str(error)).lower(),
        remedy="free space, or choose another folder (run.root); finished artefacts are kept as they were",
    )


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` whole or not at all. Raises `StorageError`."""
    path = Path(path)
    make_folder(path.parent)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; artefacts are for whoever may read the folder.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def check_absent(path: Path, overwrite: bool) -> None:
    """Raises `StorageError` where a command would write over something unasked."""
    path = Path(path)
    if path.is_dir() or (not overwrite and (path.exists() or path.is_symlink())):
        remedy = "name a file" if path.is_dir() else "choose another name, or say --overwrite"
        raise StorageError(f"{path} exists already", why="it would be overwritten", remedy=remedy)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(data)


def write_json(path: Path, format: str, body: Any, parents: Mapping[str, str] | None = None) -> str:
    """Write an artefact and return its id; `parents` maps a role to the id of the artefact it came from."""
    identity = content_id({"format": format, "body": body})
    document = {"format": format, "id": identity, "parents": dict(parents or {}), "body": body}
    atomic_write_bytes(path, canonical_json(document))
    return identity


def read_json(path: Path, format: str) -> dict[str, Any]:
    """Read an artefact: a dict with `format`, `id`, `parents`, `body`. Raises `ArtifactError`."""
    try:
        document = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing", remedy="run the stage that makes it") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} can't be read", why=str(error), remedy="delete it and rerun") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != format:
        raise ArtifactError(f"{path} has another format", got=found, allowed=format, remedy="rerun its stage")
    if document["id"] != content_id({"format": format, "body": document["body"]}):
        raise ArtifactError(f"{path} was changed after it was written", remedy="delete it and rerun its stage")
    return document
