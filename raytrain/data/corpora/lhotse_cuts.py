"""Lhotse cuts as JSONL, without making Lhotse's objects.

A cut's text is that of its supervisions in order of start, joined by spaces. The fields of a NeMo row (`source_lang`,
`pnc`, …) are taken from the cut's `custom`, as in NeMo, or else from the `custom` of the first supervision that has
them. A supervision's `language` is the source language if no field gives one; otherwise, since it is the text's
language, it is the target language if no field gives that.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter

from raytrain.data.corpora import lines
from raytrain.data.corpora.rows import MAX_DETAIL, PROMPT_FIELDS
from raytrain.data.corpora.types import Chunk, Fields, Problem, RawRow


def read(chunk: Chunk) -> Iterator[tuple[int, list[RawRow]]]:
    """Rows of a chunk; see `reading.read_blocks`."""
    return lines.read(chunk, cut_row)


def cut_row(cut: Fields, *, in_tar: bool = False) -> Fields | Problem:
    """A cut as a NeMo row, or (reason, detail); with `in_tar`, its audio is named after the cut's id."""
    try:
        source = _source(cut, in_tar)
        if isinstance(source, str):
            return "unsupported_audio", source[:MAX_DETAIL]
        audio = cut["id"] if in_tar else source["source"]
        span = {"audio_filepath": audio, "duration": cut["duration"], "offset": cut.get("start")}
        return {"id": cut.get("id"), **span, **_supervised(cut)}
    except Exception as error:  # any field of a cut may hold anything
        return "bad_json", f"not a cut as Lhotse writes it: {type(error).__name__}: {str(error)[:200]}"


def _source(cut: Fields, in_tar: bool) -> Fields | str:
    """The source of a cut's audio, or why it can't be used."""
    kind = cut.get("type", "MonoCut")
    if kind not in ("MonoCut", "MultiCut"):
        return f"a {kind} is not a span of one recording"
    recording = cut.get("recording")
    if not recording:
        return "the cut has no recording"
    channel, sources = cut["channel"], recording["sources"]
    wanted = channel if isinstance(channel, list) else [channel]
    if len(sources) > 1:
        sources = [source for source in sources if wanted[0] in source["channels"]]
    if len(sources) != 1 or sources[0]["channels"] != wanted or len(wanted) != 1:
        return f"channel {channel} of a recording with several: convert it to mono first"
    source: Fields = sources[0]
    if in_tar:
        return source
    # Audio is resampled to the model's rate anyway.
    names = [transform["name"] for transform in recording.get("transforms") or ()]
    changes = [name for name in names if name != "Resample"]
    if changes:
        return f"the recording has transforms to apply when it is read ({', '.join(changes)}): write it to a file first"
    if source["type"] not in ("file", "url"):
        return f"the recording's source is of type {source['type']!r}, not 'file' or 'url'"
    return source


def _supervised(cut: Fields) -> Fields:
    """The text, languages and prompt fields of a cut."""
    supervisions = sorted(cut.get("supervisions") or (), key=itemgetter("start"))
    row: Fields = {"text": " ".join(part["text"] for part in supervisions if part.get("text"))}
    for holder in (*reversed(supervisions), cut):
        custom = holder.get("custom")
        if custom:
            row |= {name: value for name, value in custom.items() if name in PROMPT_FIELDS and value is not None}
    language = next((part["language"] for part in supervisions if part.get("language")), None)
    if language:
        row.setdefault("target_lang" if "source_lang" in row or "lang" in row else "source_lang", language)
    return row
