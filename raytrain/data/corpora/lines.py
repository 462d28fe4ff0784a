"""Lines of JSONL files in byte ranges, so that many workers share one file: NeMo's manifests, and a base for other
formats with a row per line.

A line belongs to the range that contains its first byte. Compressed files can't be split and are one range.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson

from raytrain.data.corpora.types import Chunk, Corpus, Fields, RawRow
from raytrain.storage.filesystem import compression, file_sizes, open_file, open_stream
from raytrain.storage.locations import StorageReadError

WHOLE = -1  # `end` of a chunk whose uncompressed size is unknown
_BLOCK = 1 << 20
_LONGEST = 64 << 20
_MARK = b"\xef\xbb\xbf"


def make_chunks(corpus: Corpus, paths: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    """Ranges of at most `chunk_bytes` of each file."""
    audio = corpus.audio if isinstance(corpus.audio, str) else ""
    for path, size in zip(paths, file_sizes(paths), strict=True):
        if compression(path):
            yield Chunk(path, 0, WHOLE, audio=audio, first_line=1)
            continue
        for start in range(0, max(size, 1), chunk_bytes):
            yield Chunk(path, start, min(size, start + chunk_bytes), audio=audio, first_line=int(start == 0))


def read(chunk: Chunk, convert: Callable[[Fields], RawRow] | None = None) -> Iterator[tuple[int, list[RawRow]]]:
    """Batches of a chunk's lines as (0-based position of the first in the chunk, rows).

    Each line is a JSON object; `convert` renames its fields to NeMo's.
    """
    position = 0
    for lines in _blocks(chunk):
        try:
            rows: list[RawRow] = list(map(orjson.loads, lines))
        except orjson.JSONDecodeError:
            rows = [_load(line) for line in lines]
        if convert is not None:
            rows = [convert(row) if isinstance(row, dict) else row for row in rows]
        yield position, rows
        position += len(lines)


def _load(line: bytes) -> RawRow:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return ("bad_json", str(error)) if line.strip() else None


def spelled_numbers(chunk: Chunk) -> Iterator[Fields]:
    """For each line of a chunk, the fields with a number that would be reformatted on output (more than 64 bits, 1.50),
    such that `orjson.dumps` writes it as in the file."""
    for lines in _blocks(chunk):
        yield from map(_spelled, lines)


def _spelled(line: bytes) -> Fields:
    fragments: list[orjson.Fragment] = []

    def keep(text: str) -> Any:
        fragments.append(orjson.Fragment(text.encode()))
        return fragments[-1]

    def whole(text: str) -> Any:
        number = int(text) if len(text) <= 20 else 1 << 64
        return number if -(1 << 63) <= number < 1 << 64 and str(number) == text else keep(text)

    def real(text: str) -> Any:
        number = float(text)
        return number if orjson.dumps(number) == text.encode() else keep(text)

    try:
        row = json.loads(line, parse_int=whole, parse_float=real)
    except (ValueError, RecursionError):
        return {}
    if not fragments or row.__class__ is not dict:
        return {}
    return {name: value for name, value in row.items() if _has_fragment(value)}


def _has_fragment(value: object) -> bool:
    if isinstance(value, list | dict):
        return any(map(_has_fragment, value.values() if isinstance(value, dict) else value))
    return isinstance(value, orjson.Fragment)


def first_line(chunk: Chunk) -> int:
    """Number of the first line that begins in the chunk, 1-based, by reading everything before it."""
    number, left = 1, chunk.start
    with open_file(chunk.path) as file:
        last = b""
        while left > 0 and (block := file.read(min(left, _BLOCK))):
            number += block.count(b"\n")
            left -= len(block)
            last = block
    # A line that straddles the chunk's start began before it.
    return number if last.endswith(b"\n") or not last else number + 1


def _blocks(chunk: Chunk) -> Iterator[list[bytes]]:
    """Lists of whole lines without their line feeds; the empty text after the last line feed is not a line."""
    rest, is_first = b"", chunk.start == 0
    try:
        for data in _range(chunk) if chunk.end != WHOLE else _stream(chunk.path):
            lines = (rest + data).split(b"\n")
            rest = lines.pop()
            if len(rest) > _LONGEST:
                raise StorageReadError(
                    f"{chunk.path} has a line of more than {_LONGEST >> 20} MiB",
                    remedy="write a JSON object on each line",
                )
            if lines and is_first:
                lines[0], is_first = lines[0].removeprefix(_MARK), False
            yield lines
    except OSError as error:
        remedy = "check the disk or the store"
        raise StorageReadError(f"can't read {chunk.path} to its end", why=str(error), remedy=remedy) from error
    if rest:
        yield [rest.removeprefix(_MARK) if is_first else rest]


def _range(chunk: Chunk) -> Iterator[bytes]:
    with open_file(chunk.path) as file:
        position = chunk.start
        if position:
            # Back by one byte: a range that begins right after a line feed begins with a line.
            file.seek(position - 1)
            position -= 1
            while True:
                block = file.read(min(_BLOCK, 1 << 16))
                if not block:
                    return
                cut = block.find(b"\n")
                if cut >= 0:
                    break
                position += len(block)
            position += cut + 1
            file.seek(position)
            if position >= chunk.end:
                return
        last = b"\n"
        while position < chunk.end:
            block = file.read(min(_BLOCK, chunk.end - position))
            if not block:
                return
            position += len(block)
            last = block[-1:]
            yield block
        # The last line may end beyond the range.
        while last != b"\n":
            block = file.read(1 << 16)
            cut = block.find(b"\n")
            if not block or cut >= 0:
                yield block[: cut + 1]
                return
            yield block


def _stream(path: str) -> Iterator[bytes]:
    with open_stream(path) as file:
        while block := bytes(file.read(_BLOCK)):
            yield block
