"""Parquet files with audio and text in columns, as Hugging Face's `datasets` writes them.

`audio` is a struct of `bytes` and `path`, bytes alone, or a path. The text is in the first of `text`, `sentence`,
`transcription`, `normalized_text` that there is; other columns have NeMo's names (`offset`, `source_lang`, …), and
`language` counts where the corpus has none of its own. Without a column `duration` it is read from the audio's header.
Audio is read for no other reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raytrain.data.corpora.durations import add_durations
from raytrain.data.corpora.rows import PROMPT_FIELDS, RawRow, audio_places
from raytrain.data.corpora.types import Chunk, Corpus
from raytrain.errors import ManifestError
from raytrain.storage.filesystem import StorageReadError, is_folder, list_files, open_file

_TEXTS = ("text", "sentence", "transcription", "normalized_text")
_ROWS, _ROWS_WITH_AUDIO = 4096, 64
_BUFFER = 1 << 20  # a column is read in pieces of this size, so that a large row group needs little memory
_CONNECTIONS = 16


def make_chunks(corpus: Corpus, paths: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    """Row groups of about `chunk_bytes` of each file. Raises `ManifestError` for missing files or columns."""
    audio = corpus.audio if isinstance(corpus.audio, str) else ""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        files = [file for found in pool.map(_files, paths) for file in found]
        if not files:
            raise ManifestError(
                f"corpus {corpus.name}: no *.parquet in {', '.join(paths)}",
                remedy="check the path, or set the corpus' format if its files are not Parquet",
            )
        for path, spans in zip(files, pool.map(partial(_spans, chunk_bytes=chunk_bytes), files), strict=True):
            for start, end in spans:
                yield Chunk(path, start, end, audio=audio, first_line=start + 1)


def read(chunk: Chunk) -> Iterator[tuple[int, list[RawRow]]]:
    """Rows of a chunk; see `corpus.read_blocks`."""
    with _opened(chunk.path) as file:
        first = 0
        for index in range(file.num_row_groups):
            if chunk.start <= first < chunk.end:
                for row, rows in _group_rows(file, index, first, chunk):
                    yield row - chunk.start, rows
            first += file.metadata.row_group(index).num_rows


def read_audio_bytes(path: str, rows: Sequence[int]) -> dict[int, bytes]:
    """Row (from 0 on) → its audio's bytes. No other audio is held. Raises `StorageReadError` where a row has none."""
    found: dict[int, bytes | None] = {}
    with _opened(path) as file:
        leaf, first = _leaves(file.schema_arrow)[0], 0
        for index in range(file.num_row_groups):
            last = first + file.metadata.row_group(index).num_rows
            wanted = sorted({row for row in rows if first <= row < last})
            if wanted and leaf:
                for batch in file.iter_batches(_ROWS_WITH_AUDIO, row_groups=[index], columns=[leaf]):
                    column = _column(batch, leaf)
                    while wanted and wanted[0] < first + len(column):
                        row = wanted.pop(0)
                        found[row] = column[row - first].as_py()
                    if not wanted:
                        break
                    first += len(column)
            first = last
    missing = [row for row in rows if found.get(row) is None]
    if missing:
        raise StorageReadError(
            f"{path} holds no audio in row {missing[0] + 1}",
            why="its column audio has neither bytes nor a path there",
            remedy="write the file again without this row, or with its audio",
        )
    return found


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        with open_file(path) as file:
            yield pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER)
    except (pa.ArrowException, OSError) as error:
        raise StorageReadError(
            f"can't read {path} as Parquet",
            why=str(error),
            remedy="check that the file is whole: copy it again, or write it again",
        ) from error


def _files(path: str) -> list[str]:
    return list_files(path, "*.parquet") if is_folder(path) else [path]


def _spans(path: str, chunk_bytes: int) -> list[tuple[int, int]]:
    spans, start, end, size = [], 0, 0, 0
    with _opened(path) as file:
        names = file.schema_arrow.names
        if "audio" not in names or not any(name in names for name in _TEXTS):
            raise ManifestError(
                f"{path} lacks a column",
                got=", ".join(names),
                allowed=f"audio, and one of {', '.join(_TEXTS)}",
                remedy="rename the column of the audio or of the text",
            )
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            end, size = end + group.num_rows, size + group.total_byte_size
            if size >= chunk_bytes or index == file.num_row_groups - 1:
                spans.append((start, end))
                start, size = end, 0
    return spans


def _leaves(schema: pa.Schema) -> tuple[str | None, str | None]:
    """The columns of embedded audio and of its paths, as Parquet spells them; None where there is no such column."""
    kind = schema.field("audio").type
    if pa.types.is_struct(kind):
        data, path = (f"audio.{name}" if kind.get_field_index(name) >= 0 else None for name in ("bytes", "path"))
        return data, path
    return ("audio", None) if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else (None, "audio")


def _column(batch: pa.RecordBatch, leaf: str | None) -> pa.Array | None:
    if leaf is None:
        return None
    _, dot, name = leaf.partition(".")
    return pc.struct_field(batch["audio"], name) if dot else batch["audio"]


def _nulls(group: Any, leaf: str) -> int | None:
    """Rows without a value, None where the file doesn't tell."""
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema == leaf and column.statistics and column.statistics.has_null_count:
            return column.statistics.null_count
    return None


def _group_rows(file: Any, index: int, first: int, chunk: Chunk) -> Iterator[tuple[int, list[RawRow]]]:
    """(first row, rows) of batches of a row group, whose own first row is `first`."""
    schema, group = file.schema_arrow, file.metadata.row_group(index)
    names = {name: name for name in ("duration", "offset", *PROMPT_FIELDS) if name in schema.names}
    names["text"] = next(name for name in _TEXTS if name in schema.names)
    if chunk.language is None and "language" in schema.names:
        names.setdefault("lang", "language")
    is_measured = "duration" not in names
    data_leaf, path_leaf = _leaves(schema)
    nulls = _nulls(group, data_leaf) if data_leaf else group.num_rows
    if not is_measured and nulls in (0, group.num_rows):
        data_leaf = None  # whether a row holds its audio is known without it
    if nulls == 0:
        path_leaf = None
    columns = [*names.values(), *filter(None, (data_leaf, path_leaf))]
    size = _ROWS_WITH_AUDIO if data_leaf else _ROWS
    for batch in file.iter_batches(size, row_groups=[index], columns=columns):
        data, where = _column(batch, data_leaf), _column(batch, path_leaf)
        paths = [None] * len(batch) if where is None else map(_path, where.to_pylist())
        embedded = [nulls == 0] * len(batch) if data is None else data.is_valid().to_pylist()
        values = {name: batch[column].to_pylist() for name, column in names.items()}
        values["audio_filepath"] = [
            str(row) if is_embedded else path
            for row, (is_embedded, path) in enumerate(zip(embedded, paths, strict=True), first)
        ]
        rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        yield first, _measured(chunk, rows, data) if is_measured else rows
        first += len(rows)


def _path(path: Any) -> Any:
    # A bare number would name a row; see `rows.audio_places`.
    return f"./{path}" if isinstance(path, str) and path.isdecimal() else path


def _measured(chunk: Chunk, rows: list[RawRow], data: pa.Array | None) -> list[RawRow]:
    held = [None] * len(rows) if data is None else data.to_pylist()
    sources = []
    for row, audio in zip(rows, held, strict=True):
        path = row["audio_filepath"]
        is_file = audio is None and isinstance(path, str) and path
        sources.append(audio_places(chunk, [path])[0][0] if is_file else audio)
    return add_durations(rows, sources)
