"""Durations from the headers of audio, for rows that name none."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from raytrain.data.audio import AudioError, read_header
from raytrain.data.corpora.rows import RawRow, is_time

_READERS = 8


def add_durations(rows: Sequence[RawRow], sources: Sequence[str | bytes | None]) -> list[RawRow]:
    """The rows, those with a source (a path, URI or the audio itself) with what it lasts from their offset on.

    A row whose audio can't be opened becomes (`bad_audio`, detail).
    """
    measured = list(rows)
    wanted = [index for index, source in enumerate(sources) if source is not None]
    with ThreadPoolExecutor(_READERS) as pool:
        for index, found in zip(wanted, pool.map(_seconds, (sources[index] for index in wanted)), strict=True):
            if isinstance(found, str):
                measured[index] = "bad_audio", found
                continue
            offset = rows[index].get("offset")
            measured[index] = {**rows[index], "duration": found - (offset if is_time(offset) else 0)}
    return measured


def _seconds(source: str | bytes) -> float | str:
    path, data = ("the row's own audio", source) if isinstance(source, bytes) else (source, None)
    try:
        header = read_header(path, data=data)
    except AudioError as error:
        return str(error)
    return header.frames / header.sample_rate
