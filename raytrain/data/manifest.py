"""NeMo JSONL manifests, read in line-aligned byte ranges so that many workers can share one file.

A line belongs to the range in which its first byte lies. A bad line becomes a `BadRow` with file, line and
reason; nothing is dropped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from raytrain.data.slots import slot_token
from raytrain.errors import ManifestError, TokenizerError

REASONS = ("bad_json", "missing_field", "bad_duration", "empty_text", "unknown_language", "bad_slot", "skipme")
# Field of a manifest row → prompt slot.
_SLOTS = {
    "taskname": "task", "task": "task", "decodercontext": "decodercontext", "emotion": "emotion", "itn": "itn",
    "timestamp": "timestamp", "diarize": "diarize",
}  # fmt: skip
# About thirty years; what lies beyond is a fault, and would not fit an int64 of milliseconds.
_MAX_SECONDS = 1e9


@dataclass(frozen=True)
class ManifestChunk:
    """Bytes `start` to `end` of a manifest; `index` numbers the chunks of a corpus."""

    path: str
    start: int
    end: int
    index: int


@dataclass(frozen=True)
class Utterance:
    """A usable row. Times in whole milliseconds, the duration rounded up; `audio_path` is absolute; `slots` are
    the further prompt slots that the row names, as (slot, value in the row). The prompt's format decides which of
    them count, and only those are checked: `timestamp` may be something else in a corpus made for `canary`."""

    audio_path: str
    offset_ms: int
    duration_ms: int
    text: str
    source_lang: str
    target_lang: str
    pnc: bool
    slots: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used: where it stands, why (one of `REASONS`), and what was found."""

    file: str
    line: int
    reason: str
    detail: str


def split_manifests(paths: list[Path], chunk_bytes: int = 16 << 20) -> list[ManifestChunk]:
    """Byte ranges of at most `chunk_bytes` over all files. Raises `ManifestError` for a missing or empty list."""
    if not paths:
        raise ManifestError("no manifest is configured", remedy="list manifests under data.train, dev, test")
    chunks: list[ManifestChunk] = []
    for path in paths:
        # Workers have other working folders.
        path = Path(path).absolute()
        try:
            with open(path, "rb") as file:  # a folder or a forbidden file fails here, not on a worker
                size = file.seek(0, 2)
        except OSError as error:
            raise ManifestError(
                f"manifest {path} can't be read",
                why=str(error.strerror).lower(),
                remedy="check data.root (or $RAYTRAIN_DATA_ROOT) and the manifest's name",
            ) from error
        for start in range(0, max(size, 1), chunk_bytes):
            chunks.append(ManifestChunk(str(path), start, min(size, start + chunk_bytes), len(chunks)))
    return chunks


def read_chunk(
    chunk: ManifestChunk,
    languages: set[str] | None,
    default_language: str | None = None,
    check: Callable[[Utterance], object] | None = None,
) -> Iterator[Utterance | BadRow]:
    """Rows of one byte range in order; `languages` limits what a row may name, None allows any.

    A row for which `check` raises `TokenizerError` is a bad one too.
    """
    folder = Path(chunk.path).parent
    for position, line in _lines(chunk):
        if not line.strip():
            continue
        row = _parse(line, folder, languages, default_language)
        if check is not None and isinstance(row, Utterance):
            try:
                check(row)
            except TokenizerError as error:
                row = "bad_slot", str(error)
        if isinstance(row, tuple):
            reason, detail = row
            yield BadRow(chunk.path, _line_number(chunk.path, position), reason, detail)
        else:
            yield row


def _lines(chunk: ManifestChunk) -> Iterator[tuple[int, bytes]]:
    with open(chunk.path, "rb") as file:
        position = chunk.start
        if position:
            # The line that straddles the start belongs to the range before.
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < chunk.end:
            line = file.readline()
            if not line:
                return
            start, position = position, position + len(line)
            yield start, line.removeprefix(b"\xef\xbb\xbf") if start == 0 else line


def _line_number(path: str, position: int) -> int:
    """1-based; counted only for bad rows, which are rare."""
    with open(path, "rb") as file:
        count = 1
        while position > 0 and (block := file.read(min(position, 1 << 20))):
            count += block.count(b"\n")
            position -= len(block)
    return count


def _parse(
    line: bytes, folder: Path, languages: set[str] | None, default_language: str | None
) -> Utterance | tuple[str, str]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return "bad_json", str(error)
    if not isinstance(row, dict):
        return "bad_json", f"a row must be an object; got {type(row).__name__}"
    if row.get("_skipme"):
        return "skipme", "_skipme is set"
    missing = [name for name in ("audio_filepath", "duration", "text") if row.get(name) is None]
    if missing or not isinstance(row["audio_filepath"], str) or not row["audio_filepath"]:
        return "missing_field", f"needs {', '.join(missing) or 'audio_filepath as text'}"
    duration, offset = (
        _milliseconds(row["duration"], up=True),
        _milliseconds(row.get("offset") or 0, up=False),
    )
    if duration is None or duration <= 0 or offset is None or offset < 0:
        return "bad_duration", f"duration {row['duration']!r}, offset {row.get('offset')!r}"
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        return "empty_text", f"text {text!r}"
    source = row.get("source_lang") or row.get("lang") or default_language
    target = row.get("target_lang") or source
    if source is None:
        return "missing_field", "needs source_lang or lang, or data.default_language"
    if not (isinstance(source, str) and isinstance(target, str)):
        return "unknown_language", f"{source!r} → {target!r}: a language is a text"
    source, target = (name.removeprefix("<|").removesuffix("|>") for name in (source, target))
    if languages is not None and not {source, target} <= languages:
        return "unknown_language", f"{source} → {target}; the tokenizer has {', '.join(sorted(languages))}"
    try:
        pnc = row.get("pnc") is None or slot_token("pnc", row["pnc"]) == "<|pnc|>"
    except TokenizerError as error:
        return "bad_slot", str(error)
    return Utterance(
        audio_path=str(folder / row["audio_filepath"]),
        offset_ms=offset,
        duration_ms=duration,
        text=" ".join(text.split()),
        source_lang=source,
        target_lang=target,
        pnc=pnc,
        slots=tuple((slot, row[name]) for name, slot in _SLOTS.items() if row.get(name) is not None),
    )


def _milliseconds(seconds: Any, *, up: bool) -> int | None:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not abs(seconds) <= _MAX_SECONDS:
        return None
    # Nanometre-sized float noise (2.3 s read as 2.3000000000000003) must not cost a millisecond.
    value = round(seconds * 1000, 6)
    return math.ceil(value) if up else math.floor(value)
