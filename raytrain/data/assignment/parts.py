"""Parts: a chunk's rows of one bucket as an Arrow file, written row by row and read by row number."""

from __future__ import annotations

import contextlib
import io
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, count
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from raytrain.data.assignment.notes import ChunkNote, audio_name, part_name
from raytrain.data.assignment.rows import ROW_SCHEMA, Row
from raytrain.data.corpora.rejected import ExampleRow
from raytrain.storage.artifacts import HashingFile, atomic_write, content_id


class PartsWriter:
    """Writes one chunk's rows by bucket as they arrive; all files appear when the `with` block ends without an error,
    and then `note` describes them."""

    def __init__(self, folder: Path, chunk: int) -> None:
        self._folder, self._chunk = Path(folder), chunk
        self._files: dict[str, HashingFile] = {}
        self._rows: Counter[int] = Counter()
        self._stack = contextlib.ExitStack()
        self._writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
        self._tars: dict[int, tuple[tarfile.TarFile, Iterator[int]]] = {}

    def __enter__(self) -> PartsWriter:
        self._stack.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, traceback)

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
        tar.getmembers().clear()  # tarfile remembers every member
        return audio_name(bucket, self._chunk), starts, [len(flac) for flac in flacs]

    def note(
        self,
        corpus: str,
        rejected: Mapping[str, int] | None = None,
        examples: Mapping[str, Sequence[ExampleRow]] | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> ChunkNote:
        """The chunk's note: rows of each bucket, the files' content ids, rejections by reason with examples, and ids of
        the `sources` that audio is read from in place."""
        return ChunkNote(
            self._chunk,
            corpus,
            rows={str(bucket): number for bucket, number in sorted(self._rows.items())},
            rejected=dict(sorted((rejected or {}).items())),
            examples={reason: list(rows) for reason, rows in (examples or {}).items()},
            files={name: file.id for name, file in sorted(self._files.items())},
            sources=dict(sorted((sources or {}).items())),
        )

    def _open(self, name: str) -> HashingFile:
        self._files[name] = HashingFile(self._stack.enter_context(atomic_write(self._folder / name)))
        return self._files[name]


class ChangedError(Exception):
    """A file's content does not match its id."""


class MappedPart:
    """One memory-mapped part. Single rows are read from Arrow's buffers: a batch takes scattered rows, and Arrow's own
    row access costs ten times as much. Raises `ChangedError` if the content id is not `identity`."""

    def __init__(self, path: Path, identity: str | None) -> None:
        mapped = pa.memory_map(str(path))
        if identity is not None and content_id(memoryview(mapped.read_buffer())) != identity:
            raise ChangedError(f"{path} does not match its chunk's note")
        reader = pa.ipc.open_file(mapped)
        self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._ends = list(accumulate(batch.num_rows for batch in self.batches))
        self._views = [_views(batch) for batch in self.batches]

    def row(self, number: int) -> Row:
        """Row `number` of the part."""
        index = bisect_right(self._ends, number)
        position = number - (self._ends[index - 1] if index else 0)
        return Row(*(read(position) for read in self._views[index]))


def _views(batch: pa.RecordBatch) -> list[Callable[[int], Any]]:
    """For each field of `Row`, a function from a row's position to its value."""
    return [_view(batch.column(name)) for name in Row._fields]


def _view(column: pa.Array) -> Callable[[int], Any]:
    if pa.types.is_string(column.type):
        _, offsets, data = column.buffers()
        bounds = memoryview(offsets).cast("i") if offsets is not None else (0, 0)
        text, first = memoryview(data) if data is not None else b"", column.offset
        return lambda row: str(text[bounds[first + row] : bounds[first + row + 1]], "utf-8")
    if pa.types.is_list(column.type):
        bounds, first = memoryview(column.buffers()[1]).cast("i"), column.offset
        values = column.values.to_numpy(zero_copy_only=True)
        return lambda row: tuple(values[bounds[first + row] : bounds[first + row + 1]].tolist())
    return column.to_numpy(zero_copy_only=True).item
