"""Notes of finished chunks, and the names of a chunk's files below the assignment folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raytrain.data.corpora.rejected import ExampleRow
from raytrain.errors import ArtifactError
from raytrain.storage.artifacts import json_artifact, read_json
from raytrain.storage.filesystem import write_bytes

NOTE_FORMAT = "raytrain.assigned_chunk/1"


def part_name(bucket: int, chunk: int) -> str:
    """Path of a part below the assignment folder."""
    return f"bucket={bucket:03d}/part-{chunk:05d}.arrow"


def audio_name(bucket: int, chunk: int) -> str:
    """Path of a part's audio below the assignment folder."""
    return f"bucket={bucket:03d}/audio-{chunk:05d}.tar"


def note_name(chunk: int) -> str:
    """Path of a finished chunk's note, below the assignment folder."""
    return f"parts/{chunk:05d}.json"


@dataclass(frozen=True)
class ChunkNote:
    """A finished chunk's note: rows by bucket, rejections by reason with examples, content ids of the files by name,
    and `TarIndex.sample_id` of the tars that it reads, which older notes lack."""

    chunk: int
    corpus: str
    rows: dict[str, int]
    rejected: dict[str, int]
    examples: dict[str, list[ExampleRow]]
    files: dict[str, str]
    sources: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if not all(bucket.isascii() and bucket.isdecimal() for bucket in self.rows):
            raise ValueError("a bucket is not a number")
        if min([0, *self.rows.values(), *self.rejected.values()]) < 0:
            raise ValueError("a number of rows is negative")
        if not self.rejected.keys() <= self.examples.keys():
            raise ValueError("a reason has no example")
        if not {part_name(int(bucket), self.chunk) for bucket in self.rows} <= self.files.keys():
            raise ValueError("a part has no id")

    @property
    def id(self) -> str:
        """Its content id, listed in the index."""
        return json_artifact(NOTE_FORMAT, self.to_dict())[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChunkNote:
        """The inverse of `to_dict`."""
        examples = {
            reason: [ExampleRow(row["file"], row["line"], row["detail"]) for row in rows]
            for reason, rows in values["examples"].items()
        }
        return cls(
            values["chunk"],
            values["corpus"],
            values["rows"],
            values["rejected"],
            examples,
            values["files"],
            values.get("sources"),
        )


def write_note(path: str | Path, note: ChunkNote) -> None:
    """Write a chunk's note to a path or URI, after its files: a chunk without one is assigned again."""
    write_bytes(str(path), json_artifact(NOTE_FORMAT, note.to_dict())[1])


def read_note(path: Path) -> ChunkNote | None:
    """A chunk's note, None if it is missing or damaged."""
    try:
        return ChunkNote.from_dict(read_json(path, NOTE_FORMAT, ChunkNote)["body"])
    except ArtifactError:
        return None
