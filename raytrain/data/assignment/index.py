"""`index.json`: the number of rows per bucket and chunk, which determines the order of a bucket's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from raytrain.data.assignment.notes import ChunkNote, audio_name, part_name
from raytrain.data.corpora.rejected import RejectedExamples, RejectedRows
from raytrain.errors import ArtifactError
from raytrain.storage.artifacts import content_id, write_json

INDEX_FORMAT = "raytrain.assignment/4"


@dataclass(frozen=True)
class IndexBody:
    """The content of the assignment's `index.json`: rows by bucket and chunk, (corpus, number of chunks) in order,
    rejected rows, and the ids of the chunks' notes; `rows_id` covers all rows of all buckets."""

    buckets: list[list[int]]
    corpora: list[tuple[str, int]]
    rows: int
    rows_id: str
    notes: list[str]
    rejected: dict[str, int]
    rejected_examples: list[RejectedExamples]
    grid: list[tuple[int, int]]

    def __post_init__(self) -> None:
        chunks = sum(number for _, number in self.corpora)
        if len(self.buckets) != len(self.grid) or {len(self.notes), *map(len, self.buckets)} != {chunks}:
            raise ValueError("its lists differ in length")
        if min([0, *(number for rows in self.buckets for number in rows), *(n for _, n in self.corpora)]) < 0:
            raise ValueError("a number of rows is negative")


class _BucketCounts:
    """Rows by bucket and chunk, and the content ids of their files."""

    def __init__(self, notes: Sequence[ChunkNote], num_buckets: int) -> None:
        self.rows = [[0] * len(notes) for _ in range(num_buckets)]
        self.parts: list[list[str]] = [[] for _ in range(num_buckets)]
        for note in notes:
            for bucket, rows in ((int(name), rows) for name, rows in note.rows.items()):
                self.rows[bucket][note.chunk] = rows
                names = (part_name(bucket, note.chunk), audio_name(bucket, note.chunk))
                self.parts[bucket] += [note.files[name] for name in names if name in note.files]
        self.sources = [source for note in notes for source in (note.sources or {}).values()]
        self.total = sum(map(sum, self.rows))

    def rows_id(self, grid: Sequence[tuple[int, int]]) -> str:
        """The content id of all rows of all buckets."""
        edges = [list(bucket) for bucket in grid]
        return content_id([edges, self.parts, self.sources] if self.sources else [edges, self.parts])


def write_index(
    folder: Path,
    notes: Sequence[ChunkNote],
    grid: Sequence[tuple[int, int]],
    num_rows: int,
    parents: Mapping[str, str],
) -> str:
    """Write `index.json` from the notes of all chunks; `grid` has each bucket's (max_duration_ms, max_tokens).

    Raises `ArtifactError` unless each of `num_rows` rows is in one bucket or rejected.
    """
    notes = sorted(notes, key=lambda note: note.chunk)
    rejected = RejectedRows()
    for note in notes:
        for reason, rows in note.rejected.items():
            rejected.extend(note.corpus, reason, rows, note.examples[reason])
    counts = _BucketCounts(notes, len(grid))
    if counts.total + rejected.counts.total() != num_rows:
        raise ArtifactError(
            "the assignment does not add up",
            got=f"{counts.total} assigned + {rejected.counts.total()} rejected",
            allowed=f"{num_rows} rows, as statistics counted",
            why="the manifests changed in between",
            remedy="run statistics again",
        )
    body = IndexBody(
        buckets=counts.rows,
        corpora=[(name, len(list(chunks))) for name, chunks in groupby(notes, key=lambda note: note.corpus)],
        rows=counts.total,
        rows_id=counts.rows_id(grid),
        notes=[note.id for note in notes],
        rejected=dict(sorted(rejected.by_reason().items())),
        rejected_examples=rejected.summary(),
        grid=list(grid),
    )
    return write_json(folder / "index.json", INDEX_FORMAT, asdict(body), parents)
