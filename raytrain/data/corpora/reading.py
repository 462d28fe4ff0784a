"""Reading corpora: `plan_chunks` splits their files into chunks, and `read_blocks` reads one chunk.

Rows come in file order, and none is dropped silently: an unusable row becomes a `BadRow`.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np

from raytrain.data.corpora import audiofolder, lhotse_cuts, lhotse_shar, lines, parquet, tarred
from raytrain.data.corpora.blocks import Block
from raytrain.data.corpora.rows import RowParser
from raytrain.data.corpora.types import BadRow, Chunk, Corpus, RawRow, Utterance
from raytrain.errors import ManifestError
from raytrain.storage.filesystem import bare_name, is_folder, list_files, open_stream
from raytrain.storage.locations import StorageReadError
from raytrain.storage.patterns import expand

DEFAULT_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class _Reader:
    """Reads one format. `make_chunks(corpus, paths, chunk_bytes)` gives chunks without index and languages,
    `read(chunk)` gives (position of the first row in the chunk, rows), a few thousand at a time, and
    `first_line(chunk)` the number of a chunk's first line if the chunk doesn't have it."""

    make_chunks: Callable[[Corpus, Sequence[str], int], Iterator[Chunk]]
    read: Callable[[Chunk], Iterator[tuple[int, list[RawRow]]]]
    first_line: Callable[[Chunk], int] = attrgetter("first_line")


_READERS = {
    "nemo": _Reader(lines.make_chunks, lines.read, lines.first_line),
    "nemo_tarred": _Reader(tarred.make_chunks, lines.read),
    "lhotse_cuts": _Reader(lines.make_chunks, lhotse_cuts.read, lines.first_line),
    "lhotse_shar": _Reader(lhotse_shar.make_chunks, lhotse_shar.read),
    "parquet": _Reader(parquet.make_chunks, parquet.read),
    "audiofolder": _Reader(audiofolder.make_chunks, audiofolder.read, lines.first_line),
}


def plan_chunks(corpora: Sequence[Corpus], chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> list[Chunk]:
    """Chunks of all corpora in order, numbered. Raises `ManifestError` for a missing file or an empty list."""
    if not corpora:
        raise ManifestError("no manifest is configured", remedy="list corpora under data.train, dev, test")
    chunks: list[Chunk] = []
    for corpus in corpora:
        try:
            paths = [path for pattern in corpus.paths for path in expand(pattern)]
            format = corpus.format or find_format(corpus, paths)
            planned = list(_READERS[format].make_chunks(corpus, paths, chunk_bytes))
        except StorageReadError as error:
            raise ManifestError(
                f"corpus {corpus.name}: {error.what}",
                why=error.why,
                remedy=error.remedy or "check data.root (or $RAYTRAIN_DATA_ROOT) and the name",
            ) from error
        for chunk in planned:
            chunks.append(
                replace(
                    chunk,
                    corpus=corpus.name,
                    format=format,
                    index=len(chunks),
                    language=corpus.language,
                    target_language=corpus.target_language,
                )
            )
    return chunks


def read_blocks(chunk: Chunk) -> Iterator[Block]:
    """Rows of one chunk by columns, a few thousand at a time. Raises `StorageReadError`."""
    parser, first = RowParser(chunk), chunk.first_line
    for position, rows in _READERS[chunk.format].read(chunk):
        block = parser.block(np.arange(first + position, first + position + len(rows)), rows)
        if block.bad and not first:
            # Only the few files with bad rows pay for reading everything before the chunk.
            first = _READERS[chunk.format].first_line(chunk)
            block.bad = [row._replace(line=row.line + first) for row in block.bad]
            block.numbers = block.numbers + first
        yield block


def raw_rows(chunk: Chunk) -> Iterator[tuple[int, list[RawRow]]]:
    """Rows of a chunk as its format's reader gives them, unchecked: (position of the first in the chunk, rows)."""
    return _READERS[chunk.format].read(chunk)


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
    """The format of a corpus' first file or folder. Raises `ManifestError` if none fits."""
    first = paths[0]
    tars = (corpus.audio,) if isinstance(corpus.audio, str) else corpus.audio or ()
    if tars and all(bare_name(tar).endswith(".tar") for tar in tars):
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
