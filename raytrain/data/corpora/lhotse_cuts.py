"""Lhotse cuts as JSONL, without making Lhotse's objects.

A cut's text is that of its supervisions in order of their start, joined by a space. The fields of a NeMo row
(`source_lang`, `pnc`, …) are taken from the cut's `custom`, where NeMo looks for them, or else from the `custom` of the
first supervision that has them. A supervision's `language` is the source language where no field names one, and else,
being that of the text, the target language where no field names that.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from raytrain.data.corpora.lines import first_line, line_chunks, read_lines
from raytrain.data.corpora.rows import PROMPT_FIELDS, RawRow
from raytrain.data.corpora.types import Chunk

make_chunks = line_chunks
__all__ = ["cut_row", "first_line", "make_chunks", "read"]

_MAX_DETAIL = 500  # characters: a cut may hold anything


def read(chunk: Chunk) -> Iterator[tuple[int, list[RawRow]]]:
    """Rows of a chunk; see `corpus.read_blocks`."""
    return read_lines(chunk, cut_row)


def cut_row(cut: dict[str, Any], *, in_tar: bool = False) -> RawRow:
    """A cut as a NeMo row, or (reason, detail); with `in_tar` its audio is named by the cut's id."""
    try:
        source = _source(cut, in_tar)
        if source.__class__ is str:
            return "unsupported_audio", source[:_MAX_DETAIL]
        audio = cut["id"] if in_tar else source["source"]
        place = {"audio_filepath": audio, "duration": cut["duration"], "offset": cut.get("start")}
        return {"id": cut.get("id"), **place, **_described(cut)}
    except Exception as error:  # a cut may hold anything anywhere
        return "bad_json", f"not a cut as Lhotse writes it: {type(error).__name__}: {str(error)[:200]}"


def _source(cut: dict[str, Any], in_tar: bool) -> dict[str, Any] | str:
    """The one source of a cut's audio, or why it can't be used."""
    kind = cut.get("type", "MonoCut")
    if kind not in ("MonoCut", "MultiCut"):
        return f"a {kind} is no span of one recording"
    recording = cut.get("recording")
    if not recording:
        return "the cut has no recording"
    channel, sources = cut["channel"], recording["sources"]
    wanted = channel if isinstance(channel, list) else [channel]
    if len(sources) > 1:
        sources = [one for one in sources if wanted[0] in one["channels"]]
    if len(sources) != 1 or sources[0]["channels"] != wanted or len(wanted) != 1:
        return f"channel {channel} of a recording with several: make it mono first"
    if in_tar:
        return sources[0]
    # Audio is resampled to the model's rate in any case.
    changes = [one["name"] for one in recording.get("transforms") or () if one["name"] != "Resample"]
    if changes:
        return f"the recording is to be changed when it is read ({', '.join(changes)}): write it to a file first"
    if sources[0]["type"] not in ("file", "url"):
        return f"the recording's source is of type {sources[0]['type']!r}, not 'file' or 'url'"
    return sources[0]


def _described(cut: dict[str, Any]) -> RawRow:
    supervisions = sorted(cut.get("supervisions") or (), key=itemgetter("start"))
    row = {"text": " ".join(one["text"] for one in supervisions if one.get("text"))}
    for holder in (*reversed(supervisions), cut):
        custom = holder.get("custom")
        if custom:
            row |= {name: value for name, value in custom.items() if name in PROMPT_FIELDS and value is not None}
    language = next((one["language"] for one in supervisions if one.get("language")), None)
    if language:
        row.setdefault("target_lang" if "source_lang" in row or "lang" in row else "source_lang", language)
    return row
