"""Assigned rows on disk: one Arrow file for each bucket and chunk, read by row number.

    assignment/bucket=003/part-00000.arrow     rows of bucket 3 from chunk 0, memory-mapped
    assignment/bucket=003/audio-00000.tar      their audio as FLAC, if it was copied
    assignment/rejected/part-00000.jsonl       rows that got no bucket, with their reason
    assignment/parts/00000.json                the note that chunk 0 is done, with the content ids of its files
    assignment/index.json                      rows for each bucket and chunk; the order of a bucket's rows

Row i of a bucket is the i-th over its parts in chunk order, so the order is that of the corpora and depends neither on
how they were cut nor on which machine wrote which part.

The index names each note by its id, and its `rows_id` covers the bytes of every part, and some of each tar that rows
point into: what follows from the rows depends on that. A process checks a part against its note when it opens it first;
where they differ it removes the note, so that `assign` makes the chunk anew.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytrain.data.corpora.rejected import NUM_EXAMPLES, ExampleRow, RejectedExamples
from raytrain.data.corpora.rows import Block
from raytrain.data.materialize import AudioFinder
from raytrain.data.text.sequences import EncodedBlock
from raytrain.errors import ArtifactError, RaytrainError
from raytrain.storage.artifacts import HashingFile, atomic_write, content_id, json_artefact, read_json, write_json
from raytrain.storage.filesystem import is_uri, write_bytes
from raytrain.storage.run_store import DamagedFileError, RunStore

_MAX_OPEN_PARTS = 2048  # a process may map 65530 files, and a billion rows have more parts
INDEX_FORMAT = "raytrain.assignment/4"
NOTE_FORMAT = "raytrain.assigned_chunk/1"
ROW_SCHEMA = pa.schema(
    [
        ("audio_path", pa.string()),
        ("audio_start", pa.int64()),
        ("audio_size", pa.int64()),
        ("offset_ms", pa.int64()),
        ("duration_ms", pa.int64()),
        ("text", pa.string()),
        ("corpus", pa.string()),
        ("language", pa.string()),
        ("prompt_length", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
    ]
)


class DamagedPartError(ArtifactError):
    """Assigned rows are not what was written; their chunk's note is gone, and `assign` makes the chunk anew."""


class Row(NamedTuple):
    """One utterance as training needs it; `tokens` is prompt + text + end of text.

    Its audio is `audio_size` bytes of `audio_path` from `audio_start` on, the whole file if `audio_size` is 0.
    """

    audio_path: str
    offset_ms: int
    duration_ms: int
    text: str
    language: str
    prompt_length: int
    tokens: tuple[int, ...]
    audio_start: int = 0
    audio_size: int = 0
    corpus: str = ""


def row_table(block: Block, encoded: EncodedBlock, finder: AudioFinder) -> tuple[pa.Table, list[str | None]]:
    """A block's rows by `ROW_SCHEMA`, and what is wrong with each one's audio, None if nothing."""
    paths, starts, sizes, problems = finder.places(block.paths)
    languages = np.array([key.target_lang for key in block.prompts], object)[block.prompt_of]
    ends = np.concatenate(([0], np.cumsum(encoded.lengths))).astype(np.int32)
    columns = [
        pa.array(paths, pa.string()),
        pa.array(starts, pa.int64()),
        pa.array(sizes, pa.int64()),
        pa.array(block.offset_ms),
        pa.array(block.duration_ms),
        pa.array([" ".join(text.split()) for text in block.texts], pa.string()),
        pa.array([block.chunk.corpus] * len(block), pa.string()),
        pa.array(languages, pa.string()),
        pa.array(encoded.prompt_lengths.astype(np.int32)),
        pa.ListArray.from_arrays(pa.array(ends), pa.array(encoded.ids)),
    ]
    return pa.Table.from_arrays(columns, schema=ROW_SCHEMA), problems


def rows_of(table: pa.Table) -> list[Row]:
    """Rows of a small table of `ROW_SCHEMA`."""
    columns = {name: table[name].to_pylist() for name in Row._fields}
    columns["tokens"] = list(map(tuple, columns["tokens"]))
    return list(map(Row._make, zip(*columns.values(), strict=True)))


def part_name(bucket: int, chunk: int) -> str:
    """Path of a part below the assignment folder."""
    return f"bucket={bucket:03d}/part-{chunk:05d}.arrow"


def audio_name(bucket: int, chunk: int) -> str:
    """Path of a part's audio below the assignment folder."""
    return f"bucket={bucket:03d}/audio-{chunk:05d}.tar"


def note_name(chunk: int) -> str:
    """Path of the note that a chunk is done, below the assignment folder."""
    return f"parts/{chunk:05d}.json"


class PartsWriter:
    """Writes one chunk's rows, bucket by bucket, as they come; all files appear when the `with` block ends well, after
    which `note` says what they are."""

    def __init__(self, folder: Path, chunk: int) -> None:
        self._folder, self._chunk = Path(folder), chunk
        self._files: dict[str, HashingFile] = {}
        self._rows: Counter[int] = Counter()
        self._stack = contextlib.ExitStack()
        self._writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
        self._tars: dict[int, tuple[tarfile.TarFile, Any]] = {}

    def __enter__(self) -> PartsWriter:
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def write(self, bucket: int, rows: pa.Table) -> None:
        """Append rows of `ROW_SCHEMA` to a bucket's part, uncompressed, so that it can be memory-mapped."""
        if bucket not in self._writers:
            file = self._open(part_name(bucket, self._chunk))
            self._writers[bucket] = self._stack.enter_context(pa.ipc.new_file(file, ROW_SCHEMA))
        self._writers[bucket].write_table(rows)
        self._rows[bucket] += rows.num_rows

    def write_audio(self, bucket: int, flacs: Sequence[bytes]) -> tuple[str, list[int], list[int]]:
        """Append recordings to a bucket's tar; returns its path below the folder, starts and sizes in bytes."""
        if bucket not in self._tars:
            file = self._open(audio_name(bucket, self._chunk))
            tar = self._stack.enter_context(tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT))
            self._tars[bucket] = (tar, count())
        tar, numbers = self._tars[bucket]
        starts = []
        for flac in flacs:
            member = tarfile.TarInfo(f"{next(numbers):06d}.flac")
            member.size = len(flac)
            starts.append(tar.offset + tarfile.BLOCKSIZE)
            tar.addfile(member, io.BytesIO(flac))
        tar.members.clear()  # tarfile remembers every member
        return audio_name(bucket, self._chunk), starts, [len(flac) for flac in flacs]

    def note(
        self,
        corpus: str,
        rejected: Mapping[str, int] | None = None,
        examples: Mapping[str, Any] | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The chunk's note: rows of each bucket, the files' content ids, rejections by reason with examples, and ids of
        the `sources` that audio is read from where it is."""
        return {
            "chunk": self._chunk,
            "corpus": corpus,
            "rows": {str(bucket): number for bucket, number in sorted(self._rows.items())},
            "files": {name: file.id for name, file in sorted(self._files.items())},
            "rejected": dict(sorted((rejected or {}).items())),
            "examples": dict(examples or {}),
            "sources": dict(sorted((sources or {}).items())),
        }

    def _open(self, name: str) -> HashingFile:
        self._files[name] = HashingFile(self._stack.enter_context(atomic_write(self._folder / name)))
        return self._files[name]


@dataclass(frozen=True)
class ChunkNote:
    """What assign notes of a chunk: rows by bucket, rejections by reason with examples, content ids of the files by
    name, and `TarIndex.sample_id` of the tars that it reads."""

    chunk: int
    corpus: str
    rows: dict[str, int]
    rejected: dict[str, int]
    examples: dict[str, list[ExampleRow]]
    files: dict[str, str]
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(bucket.isascii() and bucket.isdecimal() for bucket in self.rows):
            raise ValueError("a bucket is not a number")
        if min([0, *self.rows.values(), *self.rejected.values()]) < 0:
            raise ValueError("there are less than 0 rows")
        if not self.rejected.keys() <= self.examples.keys():
            raise ValueError("a reason has no example")
        if not {part_name(int(bucket), self.chunk) for bucket in self.rows} <= self.files.keys():
            raise ValueError("a part has no id")


@dataclass(frozen=True)
class IndexBody:
    """What the assignment's `index.json` holds: rows by bucket and chunk, (corpus, number of chunks) in order, what was
    rejected, and the ids of the chunks' notes; `rows_id` covers all rows of all buckets."""

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
            raise ValueError("there are less than 0 rows")


def write_note(place: str | Path, note: dict[str, Any]) -> None:
    """Write a chunk's note to a path or URI, after its files: a chunk without one is made again."""
    write_bytes(str(place), json_artefact(NOTE_FORMAT, note)[1])


def read_note(path: Path) -> dict[str, Any] | None:
    """A chunk's note, None where there is none or it is damaged."""
    try:
        return read_json(path, NOTE_FORMAT, ChunkNote)["body"]
    except ArtifactError:
        return None


def write_index(
    folder: Path,
    notes: Sequence[dict[str, Any]],
    grid: Sequence[Sequence[int]],
    num_rows: int,
    parents: Mapping[str, str],
) -> str:
    """Write `index.json` of the notes of all chunks; `grid` has each bucket's [max_duration_ms, max_tokens].

    Raises `ArtifactError` unless each of `num_rows` rows is in one bucket or rejected.
    """
    rejected: Counter = Counter()
    by_corpus: Counter = Counter()
    examples: dict[tuple[str, str], list[dict[str, Any]]] = {}
    corpora: list[list[Any]] = []
    buckets = [[0] * len(notes) for _ in grid]
    parts: list[list[str]] = [[] for _ in grid]
    sources: list[str] = []
    notes = sorted(notes, key=lambda note: note["chunk"])
    for note in notes:
        chunk = note["chunk"]
        if not corpora or corpora[-1][0] != note["corpus"]:
            corpora.append([note["corpus"], 0])
        corpora[-1][1] += 1
        rejected.update(note["rejected"])
        sources += note.get("sources", {}).values()
        for reason, number in note["rejected"].items():
            place = (note["corpus"], reason)
            by_corpus[place] += number
            examples[place] = [*examples.get(place, []), *note["examples"][reason]][:NUM_EXAMPLES]
        for bucket, rows in ((int(name), rows) for name, rows in note["rows"].items()):
            buckets[bucket][chunk] = rows
            names = (part_name(bucket, chunk), audio_name(bucket, chunk))
            parts[bucket] += [note["files"][name] for name in names if name in note["files"]]
    assigned = sum(map(sum, buckets))
    if assigned + rejected.total() != num_rows:
        raise ArtifactError(
            "the assignment does not add up",
            got=f"{assigned} assigned + {rejected.total()} rejected",
            allowed=f"{num_rows} rows, as statistics counted",
            why="the manifests changed in between",
            remedy="run statistics again",
        )
    grid = [list(edges) for edges in grid]
    body = {
        "buckets": buckets,
        "corpora": corpora,  # names and numbers of chunks, in the order of chunks
        "rows": assigned,
        "rows_id": content_id([grid, parts, sources] if sources else [grid, parts]),
        "notes": [json_artefact(NOTE_FORMAT, note)[0] for note in notes],
        "rejected": dict(sorted(rejected.items())),
        "rejected_examples": [
            {"corpus": corpus, "reason": reason, "rows": number, "first": examples[corpus, reason]}
            for (corpus, reason), number in sorted(by_corpus.items())
        ],
        "grid": grid,
    }
    return write_json(folder / "index.json", INDEX_FORMAT, body, parents)


class Assignment:
    """Random access to the rows of every bucket; parts are opened and checked when first read, and the
    least used ones closed. Safe to share between threads. `store` is the run folder that it belongs to, from which
    parts are brought where that is not on this machine."""

    def __init__(self, folder: Path, store: RunStore | None = None) -> None:
        self.folder = Path(folder)
        self._store = store if store is not None and store.is_remote else None
        self._ids: dict[int, dict[str, str]] = {}
        self._checked: set[tuple[int, int]] = set()
        document = read_json(self.folder / "index.json", INDEX_FORMAT, IndexBody)
        self.id: str = document["id"]
        self.plan_id: str = document["parents"].get("bucket_plan", "")
        self._notes: list[str] = document["body"]["notes"]
        counts: list[list[int]] = document["body"]["buckets"]
        self._ends = [list(accumulate(rows)) for rows in counts]
        self.rows_per_bucket: tuple[int, ...] = tuple(sum(rows) for rows in counts)
        # (max_duration_ms, max_tokens) of each bucket
        self.edges: list[tuple[int, int]] = [tuple(edges) for edges in document["body"]["grid"]]
        chunks = [number for _, number in document["body"]["corpora"]]
        bounds = [0, *accumulate(chunks)]
        self.corpora: tuple[str, ...] = tuple(name for name, _ in document["body"]["corpora"])
        # Rows of each bucket by corpus: a corpus' chunks stand together.
        self.rows_by_corpus: tuple[tuple[int, ...], ...] = tuple(
            tuple(sum(rows[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)) for rows in counts
        )
        self._parts: OrderedDict[tuple[int, int], _Part] = OrderedDict()
        self._lock = threading.Lock()

    def row(self, bucket: int, number: int) -> Row:
        """Row `number` of a bucket. Raises `IndexError` out of range and `DamagedPartError` for a lost or changed
        part."""
        return self.rows(bucket, [number])[0]

    def rows(self, bucket: int, numbers: Sequence[int] | np.ndarray) -> list[Row]:
        """Rows of a bucket in the order of `numbers`, which may repeat. Raises as `row` does."""
        places = np.asarray(numbers, np.int64)
        if len(places) and not 0 <= places.min() <= places.max() < self.rows_per_bucket[bucket]:
            raise IndexError(
                f"bucket {bucket} has {self.rows_per_bucket[bucket]} rows; got row {places.min()} … {places.max()}"
            )
        ends = self._ends[bucket]
        chunks = np.searchsorted(ends, places, side="right").tolist()
        return [
            self._absolute(self._part(bucket, chunk).row(number - (ends[chunk - 1] if chunk else 0)))
            for chunk, number in zip(chunks, places.tolist(), strict=True)
        ]

    def _absolute(self, row: Row) -> Row:
        if row.audio_path.startswith("/") or is_uri(row.audio_path):
            return row
        # Copied audio moves with the folder.
        home = self._store.place(self.folder.name) if self._store else str(self.folder.absolute())
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

    def _part(self, bucket: int, chunk: int) -> _Part:
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

    def _open(self, bucket: int, chunk: int, attempts: int = 5) -> _Part:
        name = part_name(bucket, chunk)
        path = self.folder / name
        try:
            identity = self._identity(chunk, name)
            for left in reversed(range(attempts)):
                try:
                    if self._store:
                        path = self._store.part(f"{self.folder.name}/{name}", identity)
                    part = _Part(path, None if (bucket, chunk) in self._checked else identity)
                    self._checked.add((bucket, chunk))
                    return part
                except FileNotFoundError:  # it made way for another part before it was opened
                    if not (self._store and left):
                        raise
                except _ChangedError:  # this machine's copy; the part itself may be whole
                    if not (self._store and left):
                        raise
                    path.unlink(missing_ok=True)
            raise AssertionError
        except (FileNotFoundError, DamagedFileError, _ChangedError, pa.ArrowInvalid) as error:
            self._void(chunk)
            why = f"{path} is missing" if isinstance(error, FileNotFoundError) else str(error)
            raise DamagedPartError(
                f"assigned rows of bucket {bucket}, chunk {chunk} were changed after they were written",
                why=why,
                remedy="run the same command again, or `raytrain assign`: these rows are assigned anew",
            ) from error
        except OSError as error:
            raise ArtifactError(
                f"{path} can't be read", why=str(error), remedy="check the disk, then run the same command again"
            ) from error

    def _identity(self, chunk: int, name: str) -> str:
        if chunk not in self._ids:
            note = f"{self.folder.name}/{note_name(chunk)}"
            path = self._store.look(note) if self._store else self.folder / note_name(chunk)
            try:
                document = read_json(path, NOTE_FORMAT, ChunkNote)
            except ArtifactError as error:
                raise _ChangedError(str(error)) from error
            if document["id"] != self._notes[chunk]:
                raise _ChangedError(f"{path} is not the note that index.json names")
            self._ids[chunk] = document["body"]["files"]
        return self._ids[chunk][name]

    def _void(self, chunk: int) -> None:
        with contextlib.suppress(OSError, RaytrainError):  # whoever can't write there can still tell
            if self._store:
                self._store.discard(f"{self.folder.name}/{note_name(chunk)}")
            else:
                (self.folder / note_name(chunk)).unlink(missing_ok=True)


class _ChangedError(Exception):
    """A file has another content than its id says."""


class _Part:
    """One memory-mapped part. Single rows are read from Arrow's buffers: a batch takes one row here and one there, and
    Arrow's own ways to a row cost ten times as much. Raises `_ChangedError` where the content id is not `identity`."""

    def __init__(self, path: Path, identity: str | None) -> None:
        mapped = pa.memory_map(str(path))
        if identity is not None and content_id(memoryview(mapped.read_buffer())) != identity:
            raise _ChangedError(f"{path} has another content than its chunk's note says")
        reader = pa.ipc.open_file(mapped)
        self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._ends = list(accumulate(batch.num_rows for batch in self.batches))
        self._views = [_views(batch) for batch in self.batches]

    def row(self, number: int) -> Row:
        """Row `number` of the part."""
        index = bisect_right(self._ends, number)
        place = number - (self._ends[index - 1] if index else 0)
        return Row(*(read(place) for read in self._views[index]))


def _views(batch: pa.RecordBatch) -> list[Callable[[int], Any]]:
    """For each field of `Row` a function from a row's place to its value."""
    return [_view(batch.column(name)) for name in Row._fields]


def _view(column: pa.Array) -> Callable[[int], Any]:
    if pa.types.is_string(column.type):
        _, offsets, data = column.buffers()
        bounds = memoryview(offsets).cast("i") if offsets is not None else (0, 0)
        text, first = memoryview(data) if data is not None else b"", column.offset
        return lambda place: str(text[bounds[first + place] : bounds[first + place + 1]], "utf-8")
    if pa.types.is_list(column.type):
        bounds, first = memoryview(column.buffers()[1]).cast("i"), column.offset
        values = column.values.to_numpy(zero_copy_only=True)
        return lambda place: tuple(values[bounds[first + place] : bounds[first + place + 1]].tolist())
    return column.to_numpy(zero_copy_only=True).item
