"""Durations from audio headers, for rows without one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from raytrain.data.audio import AudioError, read_header
from raytrain.data.corpora.rows import is_time
from raytrain.data.corpora.types import RawRow

_READERS = 8


def add_durations(rows: Sequence[RawRow], sources: Sequence[str | bytes | None]) -> list[RawRow]:
    """The rows; those with a source (a path, URI or the audio itself) get its duration from their offset on.

    A row whose audio can't be opened becomes (`bad_audio`, detail).
    """
    measured = list(rows)
    wanted = [index for index, source in enumerate(sources) if source is not None]
    with ThreadPoolExecutor(_READERS) as pool:
        for index, seconds in zip(wanted, pool.map(_seconds, (sources[index] for index in wanted)), strict=True):
            row = rows[index]
            if isinstance(seconds, str):
                measured[index] = "bad_audio", seconds
            elif isinstance(row, dict):
                offset = row.get("offset")
                measured[index] = {**row, "duration": seconds - (offset if is_time(offset) else 0)}
    return measured


def _seconds(source: str | bytes | None) -> float | str:
    """A recording's duration, or why it can't be read."""
    try:
        header = read_header(source) if isinstance(source, str) else read_header("the row's own audio", data=source)
    except AudioError as error:
        return str(error)
    return header.frames / header.sample_rate
