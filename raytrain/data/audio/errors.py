"""`AudioError`, and the errors that several readers of audio raise."""

from __future__ import annotations

import re

from raytrain.errors import DataError
from raytrain.storage.locations import StorageReadError

MAX_HOURS = 8  # of one span: 1.8 GB at 16 kHz
_OBJECT = re.compile(r"<[\w.]+ object at 0x\w+>")  # in libsndfile's messages, different in each run


class AudioError(DataError):
    """A recording is missing, broken, or too short for its manifest row."""


def audio_error(path: str, error: Exception) -> AudioError:
    """The error of a recording, for any exception of its decoder."""
    if isinstance(error, AudioError):
        return error
    if isinstance(error, StorageReadError):
        why: str | None = error.why or error.what
    elif isinstance(error, FileNotFoundError):
        why = "no such file"
    else:
        why = getattr(error, "strerror", None) or _OBJECT.sub("its bytes", str(error)) or repr(error)
    remedy = "check that the file exists and is complete, or leave its row out"
    return AudioError(f"can't read audio {shown(path)}", why=why, remedy=remedy)


def no_audio(path: str, got: str) -> AudioError:
    """The error of a span without samples."""
    return AudioError(f"no audio in {shown(path)}", got=got, remedy="correct its manifest row, or leave it out")


def too_long(path: str) -> AudioError:
    """The error of a span of more than `MAX_HOURS`."""
    return AudioError(
        f"audio {shown(path)} is too long to read at once",
        allowed=f"{MAX_HOURS} hours of one span",
        remedy="split the recording, or select spans of it by offset and duration",
    )


def shown(path: str) -> str:
    """A path as one readable line."""
    return path if path.isprintable() else ascii(path)
