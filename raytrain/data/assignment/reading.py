"""`Assignment`: the rows of every bucket by their numbers, over the parts of all chunks."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytrain.data.assignment.index import INDEX_FORMAT, IndexBody
from raytrain.data.assignment.notes import NOTE_FORMAT, ChunkNote, note_name, part_name
from raytrain.data.assignment.parts import ChangedError, MappedPart
from raytrain.data.assignment.rows import Row
from raytrain.errors import ArtifactError, RaytrainError
from raytrain.storage.artifacts import read_json
from raytrain.storage.locations import is_uri
from raytrain.storage.run_store import DamagedFileError, RunStore

_MAX_OPEN_PARTS = 2048  # a process may map 65530 files, and a billion rows have more parts


class DamagedPartError(ArtifactError):
    """Assigned rows changed after they were written; their chunk's note was removed, and `assign` redoes the chunk."""


class Assignment:
    """Random access to the rows of every bucket; parts are opened and checked when first read, and the least recently
    used are closed. Safe to share between threads. `store` is its run folder, from which parts are fetched if that is
    not on this machine."""

    def __init__(self, folder: Path, store: RunStore | None = None) -> None:
        self.folder = Path(folder)
        self._store = store if store is not None and store.is_remote else None
        self._ids: dict[int, dict[str, str]] = {}
        self._checked: set[tuple[int, int]] = set()
        document = read_json(self.folder / "index.json", INDEX_FORMAT, IndexBody)
        body = document["body"]
        self.id: str = document["id"]
        self.plan_id: str = document["parents"].get("bucket_plan", "")
        self._notes: list[str] = body["notes"]
        counts: list[list[int]] = body["buckets"]
        self._ends = [list(accumulate(rows)) for rows in counts]
        self.rows_per_bucket: tuple[int, ...] = tuple(sum(rows) for rows in counts)
        # (max_duration_ms, max_tokens) of each bucket
        self.edges: list[tuple[int, int]] = [tuple(edges) for edges in body["grid"]]
        chunks = [number for _, number in body["corpora"]]
        bounds = [0, *accumulate(chunks)]
        self.corpora: tuple[str, ...] = tuple(name for name, _ in body["corpora"])
        # Rows of each bucket by corpus: a corpus' chunks are contiguous.
        self.rows_by_corpus: tuple[tuple[int, ...], ...] = tuple(
            tuple(sum(rows[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)) for rows in counts
        )
        self._parts: OrderedDict[tuple[int, int], MappedPart] = OrderedDict()
        self._lock = threading.Lock()

    def row(self, bucket: int, number: int) -> Row:
        """Row `number` of a bucket. Raises `IndexError` if it is out of range and `DamagedPartError` for a lost or
        changed part."""
        return self.rows(bucket, [number])[0]

    def rows(self, bucket: int, numbers: Sequence[int] | np.ndarray) -> list[Row]:
        """Rows of a bucket in the order of `numbers`, which may repeat. Raises as `row` does."""
        wanted = np.asarray(numbers, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.rows_per_bucket[bucket]:
            raise IndexError(
                f"bucket {bucket} has {self.rows_per_bucket[bucket]} rows; got row {wanted.min()} … {wanted.max()}"
            )
        ends = self._ends[bucket]
        chunks = np.searchsorted(ends, wanted, side="right").tolist()
        return [
            self._absolute(self._part(bucket, chunk).row(number - (ends[chunk - 1] if chunk else 0)))
            for chunk, number in zip(chunks, wanted.tolist(), strict=True)
        ]

    def _absolute(self, row: Row) -> Row:
        if row.audio_path.startswith("/") or is_uri(row.audio_path):
            return row
        # Copied audio moves with the folder.
        home = self._store.location_of(self.folder.name) if self._store else str(self.folder.absolute())
        return row._replace(audio_path=f"{home}/{row.audio_path}")

    def lengths(self, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """Durations in ms and tokens of all rows of a bucket by row number, (N,) int64 each."""
        durations, tokens = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        starts = [0, *self._ends[bucket]]
        for chunk, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
            if end > start:
                for batch in self._part(bucket, chunk).batches:
                    durations.append(batch["duration_ms"].to_numpy())
                    tokens.append(pc.list_value_length(batch["tokens"]).to_numpy().astype(np.int64))
        return np.concatenate(durations), np.concatenate(tokens)

    def _part(self, bucket: int, chunk: int) -> MappedPart:
        key = (bucket, chunk)
        with self._lock:
            if key in self._parts:
                self._parts.move_to_end(key)
                return self._parts[key]
        part = self._open(bucket, chunk)
        with self._lock:
            self._parts[key] = part
            if len(self._parts) > _MAX_OPEN_PARTS:
                self._parts.popitem(last=False)
        return part

    def _open(self, bucket: int, chunk: int, attempts: int = 5) -> MappedPart:
        name = part_name(bucket, chunk)
        path = self.folder / name
        try:
            identity = self._identity(chunk, name)
            for left in reversed(range(attempts)):
                try:
                    if self._store:
                        path = self._store.part(f"{self.folder.name}/{name}", identity)
                    part = MappedPart(path, None if (bucket, chunk) in self._checked else identity)
                    self._checked.add((bucket, chunk))
                    return part
                except FileNotFoundError:  # evicted for another part before it was opened
                    if not (self._store and left):
                        raise
                except ChangedError:  # this machine's copy; the part itself may be whole
                    if not (self._store and left):
                        raise
                    path.unlink(missing_ok=True)
            raise AssertionError
        except (FileNotFoundError, DamagedFileError, ChangedError, pa.ArrowInvalid) as error:
            self._void(chunk)
            why = f"{path} is missing" if isinstance(error, FileNotFoundError) else str(error)
            raise DamagedPartError(
                f"assigned rows of bucket {bucket}, chunk {chunk} were changed after they were written",
                why=why,
                remedy="run the same command again, or `raytrain assign`: these rows are assigned again",
            ) from error
        except OSError as error:
            raise ArtifactError(
                f"{path} can't be read", why=str(error), remedy="check the disk, then run the same command again"
            ) from error

    def _identity(self, chunk: int, name: str) -> str:
        if chunk not in self._ids:
            note = f"{self.folder.name}/{note_name(chunk)}"
            path = self._store.refresh(note) if self._store else self.folder / note_name(chunk)
            try:
                document = read_json(path, NOTE_FORMAT, ChunkNote)
            except ArtifactError as error:
                raise ChangedError(str(error)) from error
            if document["id"] != self._notes[chunk]:
                raise ChangedError(f"{path} is not the note that index.json names")
            self._ids[chunk] = document["body"]["files"]
        return self._ids[chunk][name]

    def _void(self, chunk: int) -> None:
        with contextlib.suppress(OSError, RaytrainError):  # the original error is reported anyway
            if self._store:
                self._store.discard(f"{self.folder.name}/{note_name(chunk)}")
            else:
                (self.folder / note_name(chunk)).unlink(missing_ok=True)
