"""Hugging Face's audio folder: recordings, and a `metadata.jsonl` or `metadata.csv` that names them.

A row has `file_name` and its text in `transcription`, `text` or `sentence`; other fields have NeMo's names (`offset`,
`source_lang`, …), and `language` applies if the corpus sets none. A missing `duration` is read from the audio's header.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from raytrain.data.corpora import lines
from raytrain.data.corpora.blocks import locate_audio
from raytrain.data.corpora.durations import add_durations
from raytrain.data.corpora.types import Chunk, Corpus, Fields, RawRow
from raytrain.errors import ManifestError
from raytrain.storage.filesystem import file_size, is_folder, list_files, open_stream
from raytrain.storage.locations import StorageReadError

_NAMES = ("metadata.jsonl", "metadata.csv")
_TEXTS = ("transcription", "text", "sentence")
_ROWS = 4096


def make_chunks(corpus: Corpus, paths: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    """Byte ranges of `metadata.jsonl`; all of a `metadata.csv`. `paths` are folders or such files."""
    for path in paths:
        file = _metadata(corpus, path) if is_folder(path) else path
        if _is_csv(file):
            file_size(file)  # a missing file fails here, not on a worker
            yield Chunk(file, 0, lines.WHOLE, audio=corpus.audio if isinstance(corpus.audio, str) else "", first_line=1)
        else:
            yield from lines.make_chunks(corpus, [file], chunk_bytes)


def read(chunk: Chunk) -> Iterator[tuple[int, list[RawRow]]]:
    """Rows of a chunk; see `reading.read_blocks`."""
    convert = partial(_renamed, has_language=chunk.language is not None)
    for position, rows in _read_csv(chunk, convert) if _is_csv(chunk.path) else lines.read(chunk, convert):
        yield position, add_durations(rows, [_unmeasured(chunk, row) for row in rows])


def _metadata(corpus: Corpus, folder: str) -> str:
    files = {path.rpartition("/")[2]: path for path in list_files(folder, "metadata.*")}
    for name in _NAMES:
        if name in files:
            return files[name]
    raise ManifestError(
        f"corpus {corpus.name}: {folder} has no metadata",
        allowed=" or ".join(_NAMES),
        remedy="put metadata.csv or metadata.jsonl into the folder, or set the corpus' format",
    )


def _is_csv(path: str) -> bool:
    return path.endswith(".csv")


def _renamed(row: Fields, has_language: bool) -> Fields:
    text = next((row[name] for name in _TEXTS if row.get(name) is not None), None)
    renamed = {**row, "audio_filepath": row.get("file_name"), "text": text}
    if not has_language and "lang" not in row:
        renamed["lang"] = row.get("language")
    return renamed


def _unmeasured(chunk: Chunk, row: RawRow) -> str | None:
    """The audio of a row without a duration."""
    if not isinstance(row, dict) or row.get("duration") is not None:
        return None
    path = row["audio_filepath"]
    return locate_audio(chunk, [path])[0][0] if isinstance(path, str) and path else None


def _read_csv(chunk: Chunk, convert: Callable[[Fields], Fields]) -> Iterator[tuple[int, list[RawRow]]]:
    """One row per line of the file, so that line numbers are right; None for the heading and where a row continues."""
    rows: list[RawRow] = []
    position = last = 0
    try:
        with open_stream(chunk.path) as file:
            reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""))
            heading: list[str] = []
            for values in reader:
                is_row = bool(heading and values)
                rows.append(_csv_row(heading, values, convert) if is_row else None)
                rows += [None] * (reader.line_num - last - 1)
                heading, last = heading or values, reader.line_num
                if len(rows) >= _ROWS:
                    yield position, rows
                    position, rows = position + len(rows), []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StorageReadError(
            f"can't read {chunk.path} to its end",
            why=str(error),
            remedy="write the file again as UTF-8 with one heading line, and check that it is whole",
        ) from error
    yield position, rows


def _csv_row(heading: list[str], values: list[str], convert: Callable[[Fields], Fields]) -> RawRow:
    if len(values) != len(heading):
        return "bad_json", f"{len(values)} values, where the heading has {len(heading)}"
    # CSV has only strings, and empty ones for missing values.
    row: Fields = {name: value for name, value in zip(heading, values, strict=True) if value}
    for name in ("duration", "offset"):
        with suppress(KeyError, ValueError):  # `RowParser` reports the problem
            row[name] = float(row[name])
    row["_skipme"] = row.get("_skipme", "").lower() in ("true", "yes", "1")
    return convert(row)
