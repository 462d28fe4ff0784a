"""Bytes of recordings: of regular files only, of ranges of files, and of objects in a store, with retries."""

from __future__ import annotations

import os
import stat
import time

from raytrain.data.audio.headers import format_of
from raytrain.storage.filesystem import read_range
from raytrain.storage.locations import StorageReadError, is_uri

RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0)
PARQUET_ROW = -1  # as `size`: the audio is row `start` of a Parquet file
MAX_FILE_BYTES = 4 << 30  # for data read whole: a tar member, an object in a store
FIRST_BYTES = 1 << 16  # five seconds of FLAC


def open_regular(path: str) -> tuple[int, int]:
    """Descriptor and size of a regular file that is not empty. Does not wait for a pipe's other end."""
    handle = os.open(path.removeprefix("file://"), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_size:  # files in /proc have size 0
        return handle, status.st_size
    os.close(handle)
    if stat.S_ISREG(status.st_mode):
        raise OSError("the file is empty")
    raise OSError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is a pipe, a socket or a device")


def local_bytes(path: str, start: int, size: int) -> bytes:
    """At most `size` bytes of a local file starting at `start`."""
    handle, _ = open_regular(path)
    try:
        return os.pread(handle, size, start)
    finally:
        os.close(handle)


def short_file_bytes(path: str, most_bytes: float) -> bytes:
    """A local file's bytes, empty if there are more than `most_bytes` or miniaudio does not support the format. There
    are many short files, so each is opened once and read in one call."""
    handle, length = open_regular(path)
    try:
        head = os.read(handle, FIRST_BYTES)
        if format_of(head) is None or length > most_bytes:
            return b""
        while len(head) < length and (more := os.read(handle, length - len(head))):
            head += more
        return head
    finally:
        os.close(handle)


def read_bytes(path: str, start: int, size: int) -> bytes:
    """`size` bytes starting at `start`, or all. A failing store is retried after 0.5, 1, 2 and 4 s, unless the file is
    missing."""
    if size > MAX_FILE_BYTES:
        raise OSError(f"it has {size} bytes, and at most {MAX_FILE_BYTES} are read at once")
    if size > 0 and not is_uri(path):
        data = local_bytes(path, start, size)
        if len(data) < size:
            raise OSError(f"{path} is truncated: {len(data)} bytes from {start} on, not {size}")
        return data
    for pause in (*RETRY_SECONDS, None):
        try:
            if size == PARQUET_ROW:
                from raytrain.data.audio.embedded import read_audio_bytes  # needs pyarrow

                return read_audio_bytes(path, [start])[start]
            return read_range(path, start, size, most=MAX_FILE_BYTES)
        except StorageReadError as error:
            if pause is None or not is_uri(path) or isinstance(error.__cause__, FileNotFoundError):
                raise
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
