"""Corpora: what to read, cut into chunks that workers read on their own.

A `Corpus` is one entry of the configuration's `data.train`. `plan_chunks` looks at its files and gives `Chunk`s, and
`read_chunk` turns one chunk into `Utterance`s and `BadRow`s, in the order of the file; nothing is dropped in silence.

| format | what | a chunk |
|---|---|---|
| `nemo` | JSONL manifests with `audio_filepath`, `duration`, `text` | a byte range; a whole file if compressed |
| `nemo_tarred` | such manifests, one for each tar with the audio | one manifest with its tar |
| `lhotse_cuts` | cuts as JSONL | a byte range; a whole file if compressed |
| `lhotse_shar` | folders with `cuts.*.jsonl.gz` and `recording.*.tar` | one shard |
| `parquet` | Parquet with `audio` (bytes or a path) and `text` | row groups |
| `audiofolder` | a folder with `metadata.jsonl` or `metadata.csv` | a byte range; all of `metadata.csv` |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np

from raytrain.errors import ManifestError
from raytrain.settings import Range, Setting, refuse, setting_problems
from raytrain.storage.filesystem import (
    StorageReadError,
    absolute,
    bare_name,
    expand,
    is_folder,
    list_files,
    open_stream,
)

if TYPE_CHECKING:
    from raytrain.data.corpora.rows import Block, RawRow

Format = Literal["nemo", "nemo_tarred", "lhotse_cuts", "lhotse_shar", "parquet", "audiofolder"]
# Format → module with `make_chunks(corpus, paths, chunk_bytes)`, which yields chunks without number and languages, and
# `read(chunk)`, which yields (place of the first row in the chunk, rows as `rows.RawRow`), a few thousand at a time.
# Where a chunk's `first_line` can be 0, also `first_line(chunk)`.
_READERS = {
    "nemo": "manifest",
    "nemo_tarred": "tarred",
    "lhotse_cuts": "lhotse_cuts",
    "lhotse_shar": "lhotse_shar",
    "parquet": "parquet",
    "audiofolder": "audiofolder",
}
DEFAULT_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Corpus:
    """One corpus of a split."""

    __pydantic_config__ = {"extra": "forbid"}

    name: Annotated[str, Setting("The corpus' name, which no other corpus of the split has.")]
    path: Annotated[
        str | tuple[str, ...],
        Setting("Its files: local paths, relative to data.root, or URIs, with {0..7}, _OP_0..7_CL_ or * for several."),
    ]
    format: Annotated[Format | None, Setting("What the files are; detected from them by default.")] = None
    audio: Annotated[
        str | tuple[str, ...] | None,
        Setting(
            "The tars of nemo_tarred, and for other formats the folder of relative audio paths, by default the "
            "manifest's."
        ),
    ] = None
    language: Annotated[str | None, Setting("The spoken language of rows that name none.")] = None
    target_language: Annotated[str | None, Setting("The language of the text of rows that name none.")] = None
    weight: Annotated[float, Range(0, 10**9, above=True), Setting("Multiplies the corpus' share in training.")] = 1.0

    def __post_init__(self) -> None:
        problems = setting_problems(self)
        if not self.name:
            problems.append("a corpus needs a name")
        if not self.path:
            problems.append(f"corpus {self.name} names no path")
        if self.format == "nemo_tarred" and not self.audio:
            problems.append(f"corpus {self.name}: nemo_tarred needs audio, the names of its tars")
        refuse(problems)

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)

    def below(self, root: str) -> Corpus:
        """The same corpus with absolute paths."""
        audio = self.audio
        if audio is not None:
            audio = absolute(audio, root) if isinstance(audio, str) else tuple(absolute(one, root) for one in audio)
        return replace(self, path=tuple(absolute(path, root) for path in self.paths), audio=audio)


@dataclass(frozen=True)
class Chunk:
    """A part of a corpus that one worker reads; `index` numbers the chunks of a split.

    `start` and `end` are bytes of a manifest or rows of a Parquet file. `audio` is the tar that holds the audio, or the
    folder of relative audio paths. `first_line` is the number of the first line that begins in the chunk, 0 if it is
    not known. `shard` is the tar's number, None if its name has none.
    """

    path: str
    start: int
    end: int
    index: int = 0
    corpus: str = ""
    format: str = "nemo"
    audio: str = ""
    language: str | None = None
    target_language: str | None = None
    first_line: int = 0
    shard: int | None = None


class Utterance(NamedTuple):
    """A usable row. Times in whole milliseconds, the duration rounded up.

    `audio_path` is absolute or a URI. `member` is the name of the audio inside a tar, or its row in a Parquet file;
    empty where `audio_path` is the recording itself. `slots` are the further prompt slots that the row names, as
    (slot, value in the row). The prompt's format decides which of them count, and only those are checked:
    `timestamp` may be something else in a corpus made for `canary`.
    """

    audio_path: str
    offset_ms: int
    duration_ms: int
    text: str
    source_lang: str
    target_lang: str
    pnc: bool
    slots: tuple[tuple[str, Any], ...] = ()
    member: str = ""


class BadRow(NamedTuple):
    """A row that can't be used: where it stands (1-based line, or row of a Parquet file), why (one of
    `raytrain.data.corpora.rows.REASONS`), and what was found."""

    file: str
    line: int
    reason: str
    detail: str


def plan_chunks(corpora: Sequence[Corpus], chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> list[Chunk]:
    """Chunks of all corpora in order, numbered. Raises `ManifestError` for a missing file or an empty list."""
    if not corpora:
        raise ManifestError("no manifest is configured", remedy="list corpora under data.train, dev, test")
    chunks: list[Chunk] = []
    for corpus in corpora:
        try:
            paths = [one for path in corpus.paths for one in expand(path)]
            chosen = corpus.format or find_format(corpus, paths)
            found = list(_reader(chosen).make_chunks(corpus, paths, chunk_bytes))
        except StorageReadError as error:
            raise ManifestError(
                f"corpus {corpus.name}: {error.what}",
                why=error.why,
                remedy=error.remedy or "check data.root (or $RAYTRAIN_DATA_ROOT) and the name",
            ) from error
        for chunk in found:
            common = {"corpus": corpus.name, "format": chosen, "index": len(chunks)}
            languages = {"language": corpus.language, "target_language": corpus.target_language}
            chunks.append(replace(chunk, **common, **languages))
    return chunks


def read_blocks(chunk: Chunk) -> Iterator[Block]:
    """Rows of one chunk by columns, a few thousand at a time. Raises `StorageReadError`."""
    from raytrain.data.corpora.rows import RowParser

    parser, first = RowParser(chunk), chunk.first_line
    for place, rows in _reader(chunk.format).read(chunk):
        block = parser.block(np.arange(first + place, first + place + len(rows)), rows)
        if block.bad and not first:
            # Reading all that stands before the chunk is for the few files that hold bad rows.
            first = _reader(chunk.format).first_line(chunk)
            block.bad = [row._replace(line=row.line + first) for row in block.bad]
            block.numbers = block.numbers + first
        yield block


def raw_rows(chunk: Chunk) -> Iterator[tuple[int, list[RawRow]]]:
    """Rows of a chunk as its format's reader gives them, unchecked: (place of the first in the chunk, rows)."""
    return _reader(chunk.format).read(chunk)


def read_chunk(chunk: Chunk) -> Iterator[Utterance | BadRow]:
    """Rows of one chunk in order of the file. Raises `StorageReadError` where it can't be read."""
    for block in read_blocks(chunk):
        bad = iter(block.bad)
        waiting = next(bad, None)
        for number, row in zip(block.numbers.tolist(), block.utterances(), strict=True):
            while waiting is not None and waiting.line < number:
                yield waiting
                waiting = next(bad, None)
            yield row
        if waiting is not None:
            yield waiting
        yield from bad


def find_format(corpus: Corpus, paths: Sequence[str]) -> str:
    """The format that the first file or folder of a corpus has. Raises `ManifestError` where none fits."""
    first = paths[0]
    if corpus.audio and all(bare_name(one).endswith(".tar") for one in _as_tuple(corpus.audio)):
        return "nemo_tarred"
    if first.endswith(".parquet"):
        return "parquet"
    if is_folder(first):
        for pattern, name in (
            ("cuts.*.jsonl*", "lhotse_shar"),
            ("*.parquet", "parquet"),
            ("metadata.jsonl", "audiofolder"),
            ("metadata.csv", "audiofolder"),
        ):
            if list_files(first, pattern):
                return name
        raise ManifestError(
            f"corpus {corpus.name}: can't tell what {first} holds",
            allowed="Lhotse Shar (cuts.*.jsonl.gz), Parquet files, or a Hugging Face audio folder (metadata.jsonl)",
            remedy="name the files, or set format",
        )
    with open_stream(first) as file:
        head = bytes(file.read(1 << 16))
    line = head.lstrip(b"\xef\xbb\xbf \r\n\t").partition(b"\n")[0]
    if b'"supervisions"' not in line and not re.search(rb'"type":\s*"M(ono|ulti|ixed)Cut"', line):
        return "nemo"
    return "lhotse_shar" if re.search(rb'"type":\s*"shar"', line) else "lhotse_cuts"


def _reader(name: str) -> Any:
    return import_module(f"raytrain.data.corpora.{_READERS[name]}")


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
