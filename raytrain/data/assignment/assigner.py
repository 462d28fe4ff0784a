"""`ChunkAssigner`: puts each row of a chunk into its bucket in the plan, or into `rejected/` with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from raytrain.data.assignment.notes import ChunkNote
from raytrain.data.assignment.parts import PartsWriter
from raytrain.data.assignment.rows import ROW_SCHEMA, row_table
from raytrain.data.audio import PARQUET_ROW
from raytrain.data.corpora.blocks import Block
from raytrain.data.corpora.reading import read_blocks
from raytrain.data.corpora.rejected import RejectedRows
from raytrain.data.corpora.types import BadRow, Chunk
from raytrain.data.locator import AudioLocator
from raytrain.data.probe import NO_LISTING, AudioListing
from raytrain.data.sequences import BlockEncoder, EncodedBlock
from raytrain.errors import ManifestError
from raytrain.lengths.plan import BucketPlan
from raytrain.storage.artifacts import atomic_write
from raytrain.storage.run_store import DEFAULT_CACHE_BYTES, RunStore

_FLUSH_AT = 32_768  # rows buffered before each bucket's are written: small batches make slow files
_FLUSH_AUDIO_AT = 256  # rows whose audio is in memory at once
BAD_AUDIO = "bad_audio"


@dataclass(frozen=True)
class AssignSettings:
    """`sample_rate` is the rate of audio copies, None if audio is not copied; for `cache_size` see `RunSection`; with
    `check_audio`, rows whose file is missing are rejected."""

    prompt_format: str
    by_words: bool = True
    sample_rate: int | None = None
    cache_size: int = DEFAULT_CACHE_BYTES
    check_audio: bool = False


@dataclass(frozen=True)
class _PlacedRows:
    """Rows by `ROW_SCHEMA` with their (N,) buckets and lines."""

    buckets: np.ndarray
    lines: np.ndarray
    table: pa.Table

    @classmethod
    def concat(cls, parts: list[_PlacedRows]) -> _PlacedRows:
        """All rows in the order of the parts."""
        return cls(
            np.concatenate([part.buckets for part in parts]),
            np.concatenate([part.lines for part in parts]),
            pa.concat_tables([part.table for part in parts]),
        )

    def sliced(self, start: int, size: int) -> _PlacedRows:
        """At most `size` rows starting at `start`."""
        rows = slice(start, start + size)
        return _PlacedRows(self.buckets[rows], self.lines[rows], self.table.slice(start, size))

    def by_bucket(self) -> Iterator[tuple[int, pa.Table]]:
        """The rows of each bucket, in the corpus' order."""
        order = np.argsort(self.buckets, kind="stable")
        table, buckets = self.table.take(pa.array(order)), self.buckets[order]
        bounds = [0, *(np.flatnonzero(np.diff(buckets)) + 1).tolist(), len(buckets)]
        for start, stop in zip(bounds, bounds[1:], strict=False):
            if stop > start:
                yield int(buckets[start]), table.slice(start, stop - start)


class _RejectedFile:
    """Writes rejected rows as JSON lines, and counts them."""

    def __init__(self, file: BinaryIO, corpus: str, rejected: RejectedRows) -> None:
        self._file, self._corpus, self._rejected = file, corpus, rejected

    def write(self, row: BadRow, **values: str | int) -> None:
        """Record one row with further fields."""
        self._rejected.add(self._corpus, row)
        line = {"reason": row.reason, "corpus": self._corpus, "file": row.file, "line": row.line, "detail": row.detail}
        self._file.write(orjson.dumps({**line, **values}) + b"\n")


class ChunkAssigner:
    """Writes one chunk's parts below `folder`; rows whose audio file `listing` misses are rejected."""

    def __init__(
        self,
        chunk: Chunk,
        encoder: BlockEncoder,
        plan: BucketPlan,
        folder: Path,
        sample_rate: int | None,
        listing: AudioListing = NO_LISTING,
    ) -> None:
        self._chunk, self._encoder, self._plan, self._folder = chunk, encoder, plan, folder
        self._sample_rate, self._listing = sample_rate, listing
        self._audio = AudioLocator(chunk, sampled=sample_rate is None)  # copies have their own ids
        self._waiting: list[_PlacedRows] = []

    def run(self) -> ChunkNote:
        """Write all rows; returns the chunk's note (see `PartsWriter.note`). Call it once."""
        path, rejected = self._folder / _rejected_name(self._chunk), RejectedRows()
        with atomic_write(path) as file, PartsWriter(self._folder, self._chunk.index) as parts:
            self._assign(_RejectedFile(file, self._chunk.corpus, rejected), parts)
        if not rejected.counts:
            path.unlink()
        sources = self._audio.sample_ids if self._sample_rate is None else {}
        corpus = self._chunk.corpus
        return parts.note(corpus, rejected.of_corpus(corpus), rejected.first_of_corpus(corpus), sources)

    def share(self, note: ChunkNote, store: RunStore) -> None:
        """Upload the chunk's files to the run folder."""
        if not store.is_remote:
            return
        home = self._folder.name
        for name, identity in note.files.items():
            store.put_part(f"{home}/{name}", identity, keep=not name.endswith(".tar"))  # tars are read by ranges
        if note.rejected:
            store.share(f"{home}/{_rejected_name(self._chunk)}")

    def _assign(self, rejected: _RejectedFile, parts: PartsWriter) -> None:
        flush_at = _FLUSH_AT if self._sample_rate is None else _FLUSH_AUDIO_AT
        for raw in read_blocks(self._chunk):
            block = self._listing.check(self._encoder.check(raw))
            for row in block.bad:
                rejected.write(row)
            if len(block):
                self._waiting.append(self._placed(block, rejected))
            if sum(rows.table.num_rows for rows in self._waiting) >= flush_at:
                self._flush(rejected, parts)
        self._flush(rejected, parts)

    def _placed(self, block: Block, rejected: _RejectedFile) -> _PlacedRows:
        """The block's rows that go into a bucket; the rest is rejected."""
        encoded = self._encoder.encode(block)
        buckets, reasons = self._plan.assign(block.duration_ms, encoded.lengths)
        table, problems = row_table(block, encoded, self._audio)
        self._check_random_access(table)
        wrong = np.array([problem is not None for problem in problems], bool)
        for index in np.flatnonzero((buckets < 0) | wrong).tolist():
            if buckets[index] < 0:
                detail = f"{int(block.duration_ms[index])} ms, {int(encoded.lengths[index])} tokens"
                row = BadRow(self._chunk.path, int(block.numbers[index]), str(reasons[index]), detail)
            else:
                row = BadRow(self._chunk.path, int(block.numbers[index]), BAD_AUDIO, problems[index] or "")
            rejected.write(row, **_values_of(block, encoded, table, index))
        kept = (buckets >= 0) & ~wrong
        return _PlacedRows(buckets[kept], block.numbers[kept], table.filter(pa.array(kept)))

    def _check_random_access(self, table: pa.Table) -> None:
        if self._sample_rate is None and pc.any(pc.equal(table["audio_size"], PARQUET_ROW)).as_py():
            raise ManifestError(
                f"corpus {self._chunk.corpus} holds audio inside Parquet",
                why="training reads rows in any order, but Parquet only reads whole row groups",
                remedy="set assign.materialize to true, which copies the audio",
            )

    def _flush(self, rejected: _RejectedFile, parts: PartsWriter) -> None:
        """Write the buffered rows."""
        if not self._waiting:
            return
        rows = _PlacedRows.concat(self._waiting)
        self._waiting = []
        if self._sample_rate is None:
            for bucket, table in rows.by_bucket():
                parts.write(bucket, table)
            return
        for start in range(0, len(rows.buckets), _FLUSH_AUDIO_AT):
            self._copy_audio(rows.sliced(start, _FLUSH_AUDIO_AT), self._sample_rate, rejected, parts)

    def _copy_audio(self, rows: _PlacedRows, sample_rate: int, rejected: _RejectedFile, parts: PartsWriter) -> None:
        """Write rows with copies of their audio; those whose audio can't be read are rejected."""
        from raytrain.data.materialize import make_flacs  # with the audio libraries, which only copies need

        flacs = make_flacs(rows.table, sample_rate)
        for bucket in np.unique(rows.buckets).tolist():
            copies: dict[int, bytes] = {}
            for index in np.flatnonzero(rows.buckets == bucket).tolist():
                flac = flacs[index]
                if isinstance(flac, bytes):
                    copies[index] = flac
                    continue
                values = rows.table.slice(index, 1).to_pylist()[0]
                columns = ("audio_path", "offset_ms", "duration_ms", "text")
                bad = BadRow(self._chunk.path, int(rows.lines[index]), BAD_AUDIO, str(flac))
                rejected.write(bad, **{name: values[name] for name in columns})
            if copies:
                path, starts, sizes = parts.write_audio(bucket, list(copies.values()))
                parts.write(bucket, _with_audio(rows.table.take(pa.array(list(copies))), path, starts, sizes))


def _rejected_name(chunk: Chunk) -> str:
    """Path of a chunk's rejected rows below the assignment folder."""
    return f"rejected/part-{chunk.index:05d}.jsonl"


def _values_of(block: Block, encoded: EncodedBlock, table: pa.Table, index: int) -> dict[str, str | int]:
    """The record of a rejected row."""
    return {
        "audio_path": table["audio_path"][index].as_py(),
        "offset_ms": int(block.offset_ms[index]),
        "duration_ms": int(block.duration_ms[index]),
        "tokens": int(encoded.lengths[index]),
        "text": table["text"][index].as_py(),
    }


def _with_audio(rows: pa.Table, path: str, starts: list[int], sizes: list[int]) -> pa.Table:
    """The rows with the locations of their copies, each of which starts with the recording."""
    for name, values in (
        ("audio_path", [path] * len(starts)),
        ("audio_start", starts),
        ("audio_size", sizes),
        ("offset_ms", [0] * len(starts)),
    ):
        number = ROW_SCHEMA.get_field_index(name)
        rows = rows.set_column(number, name, pa.array(values, ROW_SCHEMA.field(name).type))
    return rows
