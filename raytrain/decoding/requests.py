"""Rows of manifests as requests for a text: the audio to read, and the prompt to decode it with.

All nonblank rows are returned, in the order of the manifests; an unusable row has the reason. Rows need no text, since
decoding produces it; a missing duration is read from the audio's header.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any, NamedTuple

from raytrain.data.corpora.blocks import locate_audio
from raytrain.data.corpora.durations import add_durations
from raytrain.data.corpora.lines import spelled_numbers
from raytrain.data.corpora.reading import raw_rows
from raytrain.data.corpora.rows import RowParser
from raytrain.data.corpora.types import Chunk, RawRow, Utterance
from raytrain.data.locator import AudioLocator
from raytrain.data.text.prompt import key_prompt
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.errors import TokenizerError
from raytrain.storage.locations import StorageReadError


class Request(NamedTuple):
    """One utterance to decode: its audio, located as in `assignment.Row`, and the ids of its prompt."""

    audio_path: str
    audio_start: int
    audio_size: int
    offset_ms: int
    duration_ms: int
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class ManifestRow:
    """A row's fields (NeMo's names) in a form for `orjson.dumps`, and its request, or the problem in `error`."""

    fields: dict[str, Any]
    request: Request | None = None
    error: str | None = None


@dataclass(frozen=True)
class Prompts:
    """Makes prompts for one model; `pnc` is for rows without that field."""

    tokenizer: CanaryTokenizer
    prompt_format: str
    max_positions: int
    pnc: bool = True

    def ids(self, row: Utterance) -> tuple[int, ...]:
        """The prompt of a row. Raises `TokenizerError`, also if the prompt leaves no room for text."""
        prompt = tuple(key_prompt(self.tokenizer, row.prompt_key, self.prompt_format))
        if len(prompt) >= self.max_positions:
            raise TokenizerError(
                "the prompt leaves no room for text",
                got=f"{len(prompt)} tokens",
                allowed=f"{self.max_positions - 1}",
                remedy="shorten the row's decodercontext",
            )
        return prompt


def read_requests(chunks: Sequence[Chunk], prompts: Prompts) -> Iterator[ManifestRow]:
    """All nonblank rows of the chunks, in order. Raises `StorageReadError` for an unreadable manifest."""
    for chunk in chunks:
        reader = _ChunkReader(chunk, prompts, RowParser(chunk), AudioLocator(chunk))
        spelled = repeat({}) if chunk.path.endswith((".parquet", ".csv")) else spelled_numbers(chunk)
        for first, rows in raw_rows(chunk):
            numbers = range(chunk.first_line + first, chunk.first_line + first + len(rows))
            lines = zip(numbers, rows, islice(spelled, len(rows)), strict=True)
            kept = [line for line in lines if line[1] is not None]
            measured = _measured(chunk, [row for _, row, _ in kept])
            for (number, given, numbers_as_spelled), row in zip(kept, measured, strict=True):
                yield reader.read(row, _fields(chunk, number, given, numbers_as_spelled))


def _fields(chunk: Chunk, number: int, row: RawRow, spelled: dict[str, Any]) -> dict[str, Any]:
    """The fields to write for a row: its own with numbers as spelled, or the position of a bad row."""
    if not isinstance(row, dict):
        return {"manifest": chunk.path, "line": number}
    return {name: spelled.get(name, value) for name, value in row.items()}


def _measured(chunk: Chunk, rows: list[RawRow]) -> list[RawRow]:
    """The rows, with durations filled in if they have none and their audio is a separate file."""
    sources: list[str | bytes | None] = [None] * len(rows)
    for index, row in enumerate(rows):
        path = row.get("audio_filepath") if isinstance(row, dict) and row.get("duration") is None else None
        if isinstance(path, str) and path:
            (file,), (member,) = locate_audio(chunk, [path])
            sources[index] = None if member else file
    return add_durations(rows, sources) if any(sources) else rows


@dataclass(frozen=True)
class _ChunkReader:
    """Makes requests of a chunk's rows."""

    chunk: Chunk
    prompts: Prompts
    parser: RowParser
    locator: AudioLocator

    def read(self, row: RawRow, fields: dict[str, Any]) -> ManifestRow:
        """A nonblank row."""
        if isinstance(row, dict):
            # Neither matters for decoding: no text is needed, and `_skipme` is about training.
            row = {**row, "text": "-", "_skipme": None}
            if row.get("pnc") is None:
                row["pnc"] = self.prompts.pnc
        utterance = self.parser.parse(row)
        if not isinstance(utterance, Utterance):
            return ManifestRow(fields, error=": ".join(utterance))
        assert isinstance(row, dict)  # only objects parse as utterances
        try:
            prompt = self.prompts.ids(utterance)
            (path,), (start,), (size,), (problem,) = self.locator.locate([row["audio_filepath"]])
        except TokenizerError as error:
            return ManifestRow(fields, error=str(error))
        except StorageReadError as error:
            return ManifestRow(fields, error=f"bad_audio: {error}")
        if problem:
            return ManifestRow(fields, error=f"bad_audio: {problem}")
        request = Request(path, start, size, utterance.offset_ms, utterance.duration_ms, prompt)
        return ManifestRow(fields, request)
