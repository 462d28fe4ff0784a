"""Durations from the headers of audio, for rows that name none."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from raytrain.data.rows import RawRow
from raytrain.data.storage import StorageReadError, open_file

_READERS = 8
_HEADER = 1 << 16


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
            measured[index] = {**rows[index], "duration": found - (offset if isinstance(offset, int | float) else 0)}
    return measured


def _seconds(source: str | bytes) -> float | str:
    import soundfile

    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_file(source) as file:
            return soundfile.info(io.BufferedReader(file, _HEADER)).duration
    except StorageReadError as error:
        return str(error)
    except (OSError, RuntimeError) as error:
        return f"can't read the audio's header: {error}" if isinstance(source, bytes) else f"{source}: {error}"
