"""Rows of manifests as requests for a text: what to read, and the prompt to decode it with.

Every row that is not blank comes back, in the order of the manifests: one that can't be used with the reason. The text
is what is asked for, so none is needed; a duration that a row lacks is read from its audio's header.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from raytrain.storage.filesystem import StorageReadError


class Request(NamedTuple):
    """One utterance to decode: its audio as `assignment.Row` names it, and the ids of its prompt."""

    audio_path: str
    audio_start: int
    audio_size: int
    offset_ms: int
    duration_ms: int
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class ManifestRow:
    """A row's own fields (NeMo's names) as `orjson.dumps` takes them, and its request, or what is wrong with it in
    `error`."""

    fields: dict[str, Any]
    request: Request | None = None
    error: str | None = None


@dataclass(frozen=True)
class Prompts:
    """Makes prompts for one model; `pnc` stands in where a row does not say."""

    tokenizer: CanaryTokenizer
    prompt_format: str
    max_positions: int
    pnc: bool = True

    def ids(self, row: Utterance) -> tuple[int, ...]:
        """The prompt of a row. Raises `TokenizerError`, also for one that leaves no room for a text."""
        found = tuple(key_prompt(self.tokenizer, row.prompt_key, self.prompt_format))
        if len(found) >= self.max_positions:
            raise TokenizerError(
                "the prompt leaves no room for text",
                got=f"{len(found)} tokens",
                allowed=f"{self.max_positions - 1}",
                remedy="shorten the row's decodercontext",
            )
        return found


def read_requests(chunks: Sequence[Chunk], prompts: Prompts) -> Iterator[ManifestRow]:
    """All rows of the chunks that are not blank, in order. Raises `StorageReadError` for an unreadable manifest."""
    for chunk in chunks:
        parser, finder = RowParser(chunk), AudioLocator(chunk)
        spelled = repeat({}) if chunk.path.endswith((".parquet", ".csv")) else spelled_numbers(chunk)
        for place, rows in raw_rows(chunk):
            numbers = range(chunk.first_line + place, chunk.first_line + place + len(rows))
            lines = zip(numbers, rows, islice(spelled, len(rows)), strict=True)
            kept = [line for line in lines if line[1] is not None]
            usable = _measured(chunk, [row for _, row, _ in kept])
            make = partial(_manifest_row, chunk, parser, finder, prompts)
            yield from (make(*line, use) for line, use in zip(kept, usable, strict=True))


def _measured(chunk: Chunk, rows: list[RawRow]) -> list[RawRow]:
    """The rows, with durations where they name none and their audio is a file of its own."""
    sources: list[str | bytes | None] = [None] * len(rows)
    for index, row in enumerate(rows):
        path = row.get("audio_filepath") if row.__class__ is dict and row.get("duration") is None else None
        if isinstance(path, str) and path:
            file, member = (one[0] for one in locate_audio(chunk, [path]))
            sources[index] = None if member else file
    return add_durations(rows, sources) if any(sources) else rows


def _manifest_row(
    chunk: Chunk,
    parser: RowParser,
    finder: AudioLocator,
    prompts: Prompts,
    number: int,
    given: RawRow,
    spelled: dict[str, Any],
    row: RawRow,
) -> ManifestRow:
    fields = {"manifest": chunk.path, "line": number}
    if given.__class__ is dict:
        fields = {name: spelled.get(name, value) for name, value in given.items()}
    if row.__class__ is dict:
        # Neither is for decoding to look at: a text is not needed, and `_skipme` is about training.
        asked = {**row, "text": "-", "_skipme": None}
        if row.get("pnc") is None:
            asked["pnc"] = prompts.pnc
        row = asked
    found = parser.parse(row)
    if not isinstance(found, Utterance):
        return ManifestRow(fields, error=": ".join(found))
    try:
        prompt = prompts.ids(found)
        (path,), (start,), (size,), (problem,) = finder.locate([row["audio_filepath"]])
    except TokenizerError as error:
        return ManifestRow(fields, error=str(error))
    except StorageReadError as error:
        return ManifestRow(fields, error=f"bad_audio: {error}")
    if problem:
        return ManifestRow(fields, error=f"bad_audio: {problem}")
    return ManifestRow(fields, Request(path, start, size, found.offset_ms, found.duration_ms, prompt))
