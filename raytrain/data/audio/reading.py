"""`read_header` and `read_audio`: from a recording's location to its header or samples.

Short FLAC, Vorbis and MP3 files go through miniaudio, whose decoders are 1.2 to 1.5 times as fast; everything else goes
through libsndfile. Every decoder exception becomes an `AudioError` with the file's name.
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from raytrain.data.audio.errors import AudioError, audio_error, no_audio, shown
from raytrain.data.audio.files import FIRST_BYTES, local_bytes, read_bytes
from raytrain.data.audio.headers import HEAD_BYTES, AudioHeader, checked, flac_header
from raytrain.storage.filesystem import open_file
from raytrain.storage.locations import is_uri

if TYPE_CHECKING:
    from raytrain.data.audio.samples import Source

_UNKNOWN = 1 << 62  # frames or more: libsndfile's value for a file of unknown length


def read_header(path: str, *, start: int = 0, size: int = 0, data: bytes | None = None) -> AudioHeader:
    """The header of the recording that `read_audio` would read from the same location. Reads no more than necessary.

    Raises `AudioError` if the recording can't be opened, is not audio, or has a rate or channels outside the limits.
    """
    try:
        if data is None and size:
            if size > FIRST_BYTES and (header := flac_header(read_bytes(path, start, HEAD_BYTES))):
                return checked(path, header)
            data = read_bytes(path, start, size)
        if data is not None:
            return _header(path, data[:HEAD_BYTES], data)
        if is_uri(path):
            with open_file(path) as file:
                buffered = io.BufferedReader(file, FIRST_BYTES)
                return _header(path, buffered.peek(HEAD_BYTES)[:HEAD_BYTES], buffered)
        return _header(path, local_bytes(path, 0, HEAD_BYTES), path)
    except Exception as error:  # whatever a file does to its decoder is that file's fault
        raise audio_error(path, error) from error


def read_audio(
    path: str,
    *,
    sample_rate: int,
    offset_ms: int = 0,
    duration_ms: int | None = None,
    start: int = 0,
    size: int = 0,
    data: bytes | None = None,
) -> np.ndarray:
    """Samples of one utterance: (num_samples,) float32 in [-1, 1], mono, at `sample_rate` Hz.

    `path` is a file or URI; with `size` the recording is that many bytes of it starting at `start` (a tar member). If
    its bytes are already in memory, pass them as `data`. Without `duration_ms` the span goes to the recording's end.
    Raises `AudioError` if the file can't be opened or decoded, or if the span has no samples or is longer than
    `MAX_HOURS`.
    """
    from raytrain.data.audio import samples  # the decoders' libraries

    try:
        if data is None and (size or is_uri(path)):
            data = read_bytes(path, start, size)
        decoded = samples.short_file(path, data, offset_ms, duration_ms)
        mono, rate = decoded or samples.span(path, data, offset_ms, duration_ms, sample_rate)
        if not len(mono):
            raise no_audio(path, f"offset {offset_ms} ms")
        if rate != sample_rate:
            num_samples = len(mono)
            mono = samples.resampled(mono, rate, sample_rate)
            if not len(mono):
                raise no_audio(path, f"{num_samples} sample(s)")
        if not (np.isfinite(mono.min()) and np.isfinite(mono.max())):
            raise AudioError(f"audio {shown(path)} has non-finite samples", remedy="write the file again")
        return np.ascontiguousarray(mono, dtype=np.float32)
    except Exception as error:  # whatever a file does to its decoder is that file's fault
        raise audio_error(path, error) from error


def _header(path: str, head: bytes, source: Source) -> AudioHeader:
    """The header of `source`: a local path, bytes, or an open file, which begins with `head`."""
    from raytrain.data.audio import samples  # the decoders' libraries

    header = flac_header(head)
    if header is None:
        with samples.sound_file(source) as file:
            header = AudioHeader(file.frames, file.samplerate, file.channels)
    checked(path, header)
    if header.frames >= _UNKNOWN:
        header = replace(header, frames=samples.count_frames(path, source))
    return header
