"""Audio inside Parquet files, in a column `audio`: a struct of `bytes` and `path`, bytes alone, or a path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from raytrain.storage.filesystem import open_file
from raytrain.storage.locations import StorageReadError

ROWS_WITH_AUDIO = 64  # rows read at a time
_BUFFER = 1 << 20  # a column is read in pieces of this size, so that a large row group needs little memory


def read_audio_bytes(path: str, rows: Sequence[int]) -> dict[int, bytes]:
    """Row (0-based) → its audio's bytes. Only these rows' audio is kept in memory. Raises `StorageReadError` if a row
    has none."""
    audio: dict[int, bytes] = {}
    with open_parquet(path) as file:
        leaf, first = audio_leaves(file.schema_arrow)[0], 0
        for index in range(file.num_row_groups):
            last = first + file.metadata.row_group(index).num_rows
            wanted = sorted({row for row in rows if first <= row < last})
            if wanted and leaf:
                for batch in file.iter_batches(ROWS_WITH_AUDIO, row_groups=[index], columns=[leaf]):
                    column = audio_column(batch, leaf)
                    while wanted and wanted[0] < first + len(column):
                        row = wanted.pop(0)
                        if (data := column[row - first].as_py()) is not None:
                            audio[row] = data
                    if not wanted:
                        break
                    first += len(column)
            first = last
    missing = [row for row in rows if row not in audio]
    if missing:
        raise StorageReadError(
            f"{path} holds no audio in row {missing[0] + 1}",
            why="its column audio has neither bytes nor a path there",
            remedy="write the file again without this row, or with its audio",
        )
    return audio


@contextmanager
def open_parquet(path: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    """A Parquet file. Raises `StorageReadError` if it can't be opened, or read in the `with` block."""
    try:
        with open_file(path) as file:
            yield pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER)
    except (pa.ArrowException, OSError) as error:
        raise StorageReadError(
            f"can't read {path} as Parquet",
            why=str(error),
            remedy="check that the file is whole: copy it again, or write it again",
        ) from error


def audio_leaves(schema: pa.Schema) -> tuple[str | None, str | None]:
    """The columns of embedded audio and of its paths, as Parquet spells them; None if there is no such column."""
    kind = schema.field("audio").type
    if pa.types.is_struct(kind):
        data, path = (f"audio.{name}" if kind.get_field_index(name) >= 0 else None for name in ("bytes", "path"))
        return data, path
    return ("audio", None) if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else (None, "audio")


def audio_column(batch: pa.RecordBatch, leaf: str) -> pa.Array:
    """The values of one of `audio_leaves`."""
    _, dot, name = leaf.partition(".")
    return pc.struct_field(batch["audio"], name) if dot else batch["audio"]
