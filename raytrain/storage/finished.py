"""Finished parts of an output file, so that a restarted job only does what is missing.

    parts = FinishedParts(Path("out.jsonl"), key="5f0c…")       # in out.jsonl.parts/
    parts.write(0, rows_id, [b'{"pred_text":"one"}'], num_failed=0)
    parts.find(0, rows_id)                                       # Finished(num_rows=1, num_failed=0)
    parts.join(1)                                                # out.jsonl; the folder is gone

A part is one file, written atomically: a header line, then its rows. It counts only for the same `key` (model and
settings) and the same rows. An existing output is left alone unless overwriting is allowed.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson

from raytrain.storage.artifacts import (
    atomic_write,
    atomic_write_bytes,
    check_absent,
    content_id,
    fitting,
    make_folder,
    parse_json,
    storage_error,
)

_FORMAT = "raytrain.transcript_part/1"


class Finished(NamedTuple):
    """A finished part: its number of rows, and how many of them failed."""

    num_rows: int
    num_failed: int


@dataclass(frozen=True)
class PartNote:
    """The first line of a part."""

    format: str
    key: str
    rows_id: str
    body_id: str
    num_rows: int
    num_failed: int


class FinishedParts:
    """The parts of `output`, in a folder next to it. Raises `StorageError` if that can't be created, or if the output
    exists and `overwrite` is off."""

    def __init__(self, output: Path, key: str, overwrite: bool = False) -> None:
        self.output, self._key, self._overwrite = Path(output), key, overwrite
        check_absent(self.output, overwrite)
        self.folder = make_folder(self.output.with_name(self.output.name + ".parts"))

    def find(self, number: int, rows_id: str) -> Finished | None:
        """A finished part; None if it is missing, damaged, or made with another model, other settings or other rows."""
        try:
            head, _, body = self._path(number).read_bytes().partition(b"\n")
            note = fitting(parse_json(head), PartNote)
        except (OSError, ValueError):
            return None
        identity = (note["format"], note["key"], note["rows_id"], note["body_id"])
        if identity != (_FORMAT, self._key, rows_id, content_id(body)):
            return None
        return Finished(note["num_rows"], note["num_failed"])

    def write(self, number: int, rows_id: str, lines: Sequence[bytes], num_failed: int) -> Finished:
        """Write a part: its rows as JSON in order. Raises `StorageError`."""
        body = b"".join(line + b"\n" for line in lines)
        note = {
            "format": _FORMAT,
            "key": self._key,
            "rows_id": rows_id,
            "body_id": content_id(body),
            "num_rows": len(lines),
            "num_failed": num_failed,
        }
        atomic_write_bytes(self._path(number), orjson.dumps(note) + b"\n" + body)
        return Finished(len(lines), num_failed)

    def join(self, num_parts: int) -> None:
        """Join the first `num_parts` parts into the output, and remove the folder. Raises `StorageError`."""
        check_absent(self.output, self._overwrite)  # it may have appeared while the parts were made
        try:
            with atomic_write(self.output) as output:
                for number in range(num_parts):
                    with open(self._path(number), "rb") as part:
                        part.readline()
                        shutil.copyfileobj(part, output)
            for path in self.folder.glob("*part-*.jsonl*"):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(self.output, error) from error
        with contextlib.suppress(OSError):  # not empty: it holds files that are not ours
            self.folder.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.jsonl"
