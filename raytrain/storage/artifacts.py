"""Artifacts: files with a format, a content id and their parents' ids, written atomically.

The id of an artifact is a hash of its body and format alone, so two equal runs write equal bytes and a
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
import io
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from raytrain.errors import ArtifactError, StorageError, system_reason

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from typing_extensions import Buffer

_Kind = TypeVar("_Kind")


def canonical_json(value: object) -> bytes:
    """UTF-8 JSON with sorted keys: equal values give equal bytes. NaN and infinity are refused."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def content_id(value: object) -> str:
    """16 hex digits that name a JSON value, or bytes, by its content."""
    data = value if isinstance(value, bytes | memoryview) else canonical_json(value)
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def file_id(path: Path) -> str:
    """The content id of a file's bytes, read in blocks."""
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb", opener=_without_waiting) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _without_waiting(name: str, flags: int) -> int:
    """Opens a file for reading without blocking: a pipe without a writer reads as empty."""
    return os.open(name, flags | os.O_NONBLOCK)


def read_at_once(path: Path) -> bytes:
    """A file's bytes. Raises `OSError`."""
    with open(path, "rb", opener=_without_waiting) as file:
        return file.read() or b""


def lines_of(path: Path) -> list[bytes]:
    """The lines of a notes file, with their line endings; empty if it is missing or can't be read."""
    try:
        return read_at_once(path).splitlines(keepends=True)
    except OSError:
        return []


class HashingFile(io.RawIOBase):
    """A binary file that hashes what is written to it: `id` equals `file_id` without reading the file again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._size = file, hashlib.blake2b(digest_size=8), 0

    @property
    def id(self) -> str:
        """The content id of the bytes written so far."""
        return self._digest.hexdigest()

    def writable(self) -> bool:
        """True; pyarrow checks this."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def write(self, data: Buffer) -> int:
        """Append bytes."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._file.write(view)
        self._size += len(view)
        return len(view)


def make_folder(path: Path) -> Path:
    """Create a folder with its parents. Raises `StorageError` if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(path, error) from error
    return path


def storage_error(path: Path | str, error: OSError) -> StorageError:
    """The error to show a user when the operating system refuses a write."""
    return StorageError(
        f"can't write {path}",
        why=system_reason(error),
        remedy="free space, or choose another folder (run.root); finished artifacts are kept as they were",
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
        # mkstemp makes files private; artifacts are for everyone who can read the folder.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def check_absent(path: Path, overwrite: bool) -> None:
    """Raises `StorageError` if a command would overwrite something without permission."""
    path = Path(path)
    try:
        kind: int | None = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        kind = stat.S_IFREG if path.is_symlink() else None
    except OSError as error:
        raise storage_error(path, error) from error
    if kind not in (None, stat.S_IFREG):  # a device would be replaced, for every process
        raise StorageError(f"{path} exists already", why="it is not a file", remedy="name a file")
    if kind is not None and not overwrite:
        remedy = "choose another name, or pass --overwrite"
        raise StorageError(f"{path} exists already", why="it would be overwritten", remedy=remedy)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(data)


def json_artifact(format: str, body: object, parents: Mapping[str, str] | None = None) -> tuple[str, bytes]:
    """An artifact's id and bytes; `parents` maps a role to the id of the artifact it came from."""
    identity = content_id({"format": format, "body": body})
    return identity, canonical_json({"format": format, "id": identity, "parents": dict(parents or {}), "body": body})


def write_json(path: Path, format: str, body: object, parents: Mapping[str, str] | None = None) -> str:
    """Write an artifact and return its id; see `json_artifact`."""
    identity, data = json_artifact(format, body, parents)
    atomic_write_bytes(path, data)
    return identity


def read_json(path: Path, format: str, kind: object = None) -> dict[str, Any]:
    """Read an artifact: a dict with `format`, `id`, `parents`, `body`. The body fits `kind` (see `fitting`), if given.

    Raises `ArtifactError`.
    """
    try:
        document = parse_json(read_at_once(path))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing", remedy="run the stage that makes it") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} can't be read", why=str(error), remedy=_RERUN) from error
    stated = document.get("format") if isinstance(document, dict) else None
    if stated != format:
        got = stated if isinstance(stated, str) else type(document).__name__
        raise ArtifactError(f"{path} has another format", got=got, allowed=format, remedy=_RERUN)
    parents, why = document.get("parents"), None
    if not isinstance(parents, dict) or not all(isinstance(parent, str) for parent in parents.values()):
        why = "it does not list its parents"
    try:
        if document.get("id") != content_id({"format": format, "body": document.get("body")}):
            raise ArtifactError(f"{path} was changed after it was written", remedy=_RERUN)
        if kind is not None:
            fitting(document.get("body"), kind)
    except (ValueError, RecursionError) as error:
        why = str(error)
    if why:
        raise ArtifactError(f"{path} is not valid output of its stage", why=why, remedy=_RERUN)
    return document


_RERUN = "delete it and rerun its stage"


def read_state(path: Path, kind: object) -> Any:
    """The JSON values of a file of small state that fit `kind` (see `fitting`).

    None where the file is missing, can't be read, or holds anything else: the caller continues without it.
    """
    try:
        return fitting(parse_json(read_at_once(path)), kind)
    except (OSError, ValueError):
        return None


def parse_json(data: bytes) -> Any:
    """JSON whose numbers are finite and have at most 64 bits. Raises `ValueError`."""
    try:
        return json.loads(data, parse_constant=_refuse, parse_float=_finite, parse_int=_of_64_bits)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def fitting(value: object, kind: object) -> Any:
    """The JSON value itself, if it fits a type; for a dataclass, extra fields are allowed.

    Nothing is converted. Raises `ValueError` that names the first field that does not fit.
    """
    _validated(value, kind)
    return value


def view_of(value: object, kind: type[_Kind]) -> _Kind:
    """The JSON value as a `kind`, such as a dataclass with just the fields that the caller reads.

    Raises `ValueError` that names the first field that does not fit.
    """
    view: _Kind = _validated(value, kind)
    return view


def _validated(value: object, kind: object) -> Any:
    # Model-only installs have no pydantic; the files that they read are checked by hand.
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(json.dumps(value, allow_nan=False), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{field or 'it'}: {first['msg'].removeprefix('Value error, ')}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@cache
def _adapter(kind: Any) -> TypeAdapter[object]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def is_count(value: object, least: int = 0) -> bool:
    """Whether a JSON value is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _of_64_bits(text: str) -> int:
    number = int(text) if len(text) <= 20 else 1 << 64
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{text[:40]} is too large a number")
    return number
