"""Assigned rows on disk: one Arrow file per bucket and manifest chunk, read by row number.

    assignment/bucket=003/part-00000.arrow     rows of bucket 3 from chunk 0, memory-mapped
    assignment/rejected/part-00000.jsonl       rows that got no bucket, with their reason
    assignment/index.json                      rows per part; the order of a bucket's rows

Row i of a bucket is the i-th over its parts in chunk order, so the order depends on the manifests alone and
not on which machine wrote which part.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pyarrow as pa

from raytrain.artifacts import atomic_write, read_json
from raytrain.errors import ArtifactError

INDEX_FORMAT = "raytrain.assignment/1"
ROW_SCHEMA = pa.schema(
    [
        ("audio_path", pa.string()),
        ("offset_ms", pa.int64()),
        ("duration_ms", pa.int64()),
        ("text", pa.string()),
        ("language", pa.string()),
        ("prompt_length", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class Row:
    """One utterance as training needs it; `tokens` is prompt + text + end of text."""

    audio_path: str
    offset_ms: int
    duration_ms: int
    text: str
    language: str
    prompt_length: int
    tokens: tuple[int, ...]


def part_name(bucket: int, chunk: int) -> str:
    """Path of a part below the assignment folder."""
    return f"bucket={bucket:03d}/part-{chunk:05d}.arrow"


def write_part(path: Path, rows: list[dict]) -> None:
    """Write rows (dicts by `ROW_SCHEMA`) as one uncompressed Arrow file, which can be memory-mapped."""
    table = pa.Table.from_pylist(rows, schema=ROW_SCHEMA)
    with atomic_write(path) as file, pa.ipc.new_file(file, ROW_SCHEMA) as writer:
        writer.write_table(table)


class Assignment:
    """Random access to the rows of every bucket; parts are opened when first read."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        document = read_json(self.folder / "index.json", INDEX_FORMAT)
        self.id: str = document["id"]
        self.plan_id: str = document["parents"]["bucket_plan"]
        body = document["body"]
        self._chunks: list[list[int]] = [[part["chunk"] for part in parts] for parts in body["buckets"]]
        counts = [[part["rows"] for part in parts] for parts in body["buckets"]]
        self._ends = [list(accumulate(rows)) for rows in counts]
        self.rows_per_bucket: tuple[int, ...] = tuple(sum(rows) for rows in counts)
        self._tables: dict[tuple[int, int], pa.Table] = {}

    def row(self, bucket: int, number: int) -> Row:
        """Row `number` of a bucket. Raises `IndexError` out of range and `ArtifactError` for a lost part."""
        ends = self._ends[bucket]
        if not 0 <= number < self.rows_per_bucket[bucket]:
            raise IndexError(f"bucket {bucket} has {self.rows_per_bucket[bucket]} rows; got row {number}")
        part = bisect_right(ends, number)
        start = ends[part - 1] if part else 0
        values = self._table(bucket, self._chunks[bucket][part]).slice(number - start, 1).to_pylist()[0]
        return Row(**{**values, "tokens": tuple(values["tokens"])})

    def _table(self, bucket: int, chunk: int) -> pa.Table:
        key = (bucket, chunk)
        if key not in self._tables:
            path = self.folder / part_name(*key)
            try:
                self._tables[key] = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            except (OSError, pa.ArrowInvalid) as error:
                raise ArtifactError(f"{path} can't be read", why=str(error), remedy="rerun assign") from error
        return self._tables[key]
