"""Parquet files with audio and text in columns, as Hugging Face's `datasets` writes them.

`audio` is a struct of `bytes` and `path`, bytes alone, or a path. The text is in the first existing column of `text`,
`sentence`, `transcription`, `normalized_text`; other columns have NeMo's names (`offset`, `source_lang`, …), and
`language` applies if the corpus sets none. Without a column `duration` it is read from the audio's header. Audio is
read for no other reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa
from pyarrow.parquet import ParquetFile, RowGroupMetaData

from raytrain.data.audio.embedded import ROWS_WITH_AUDIO, audio_column, audio_leaves, open_parquet
from raytrain.data.corpora.blocks import locate_audio
from raytrain.data.corpora.durations import add_durations
from raytrain.data.corpora.rows import PROMPT_FIELDS
from raytrain.data.corpora.types import Chunk, Corpus, Fields, RawRow
from raytrain.errors import ManifestError
from raytrain.storage.filesystem import is_folder, list_files

_TEXTS = ("text", "sentence", "transcription", "normalized_text")
_ROWS = 4096
_CONNECTIONS = 16


def make_chunks(corpus: Corpus, paths: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    """Row groups of about `chunk_bytes` of each file. Raises `ManifestError` for missing files or columns."""
    audio = corpus.audio if isinstance(corpus.audio, str) else ""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        files = [file for files in pool.map(_files, paths) for file in files]
        if not files:
            raise ManifestError(
                f"corpus {corpus.name}: no *.parquet in {', '.join(paths)}",
                remedy="check the path, or set the corpus' format if its files are not Parquet",
            )
        for path, spans in zip(files, pool.map(partial(_spans, chunk_bytes=chunk_bytes), files), strict=True):
            for start, end in spans:
                yield Chunk(path, start, end, audio=audio, first_line=start + 1)


def read(chunk: Chunk) -> Iterator[tuple[int, list[RawRow]]]:
    """Rows of a chunk; see `reading.read_blocks`."""
    with open_parquet(chunk.path) as file:
        first = 0
        for index in range(file.num_row_groups):
            if chunk.start <= first < chunk.end:
                for row, rows in _group_rows(file, index, first, chunk):
                    yield row - chunk.start, rows
            first += file.metadata.row_group(index).num_rows


def _files(path: str) -> list[str]:
    return list_files(path, "*.parquet") if is_folder(path) else [path]


def _spans(path: str, chunk_bytes: int) -> list[tuple[int, int]]:
    spans, start, end, size = [], 0, 0, 0
    with open_parquet(path) as file:
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


def _nulls(group: RowGroupMetaData, leaf: str) -> int | None:
    """Number of rows without a value, None if the file doesn't record it."""
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema == leaf and column.statistics and column.statistics.has_null_count:
            return column.statistics.null_count
    return None


def _group_rows(file: ParquetFile, index: int, first: int, chunk: Chunk) -> Iterator[tuple[int, list[RawRow]]]:
    """(first row, rows) of batches of a row group whose first row is `first`."""
    names = _field_columns(file.schema_arrow, chunk)
    num_rows = file.metadata.row_group(index).num_rows
    data_leaf, path_leaf = audio_leaves(file.schema_arrow)
    nulls = _nulls(file.metadata.row_group(index), data_leaf) if data_leaf else num_rows
    is_measured = "duration" not in names
    if not is_measured and nulls in (0, num_rows):
        data_leaf = None  # embedded audio is detected without it
    if nulls == 0:
        path_leaf = None
    columns = [*names.values(), *filter(None, (data_leaf, path_leaf))]
    size = ROWS_WITH_AUDIO if data_leaf else _ROWS
    for batch in file.iter_batches(size, row_groups=[index], columns=columns):
        data = audio_column(batch, data_leaf) if data_leaf else None
        paths = map(_path, audio_column(batch, path_leaf).to_pylist()) if path_leaf else [None] * len(batch)
        embedded = [nulls == 0] * len(batch) if data is None else data.is_valid().to_pylist()
        values = {name: batch[column].to_pylist() for name, column in names.items()}
        values["audio_filepath"] = [
            str(row) if is_embedded else path
            for row, (is_embedded, path) in enumerate(zip(embedded, paths, strict=True), first)
        ]
        rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        yield first, _measured(chunk, rows, data) if is_measured else list(rows)
        first += len(rows)


def _field_columns(schema: pa.Schema, chunk: Chunk) -> dict[str, str]:
    """Field of a row → column of a file."""
    names = {name: name for name in ("duration", "offset", *PROMPT_FIELDS) if name in schema.names}
    names["text"] = next(name for name in _TEXTS if name in schema.names)
    if chunk.language is None and "language" in schema.names:
        names.setdefault("lang", "language")
    return names


def _path(path: object) -> object:
    # A bare number would mean a row; see `blocks.locate_audio`.
    return f"./{path}" if isinstance(path, str) and path.isdecimal() else path


def _measured(chunk: Chunk, rows: list[Fields], data: pa.Array | None) -> list[RawRow]:
    held = [None] * len(rows) if data is None else data.to_pylist()
    sources = []
    for row, audio in zip(rows, held, strict=True):
        path = row["audio_filepath"]
        is_file = audio is None and isinstance(path, str) and path
        sources.append(locate_audio(chunk, [path])[0][0] if is_file else audio)
    return add_durations(rows, sources)
