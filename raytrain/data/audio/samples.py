"""Samples of recordings, decoded by miniaudio where that is faster and otherwise by libsndfile, and resampled.

This module imports the decoder libraries, so `reading` imports it only when it reads the first recording.
"""

from __future__ import annotations

import io
import math
import os
from contextlib import closing
from typing import BinaryIO

import miniaudio
import numpy as np
import soundfile
import soxr

from raytrain.data.audio.errors import MAX_HOURS, no_audio, too_long
from raytrain.data.audio.files import MAX_FILE_BYTES, open_regular, short_file_bytes
from raytrain.data.audio.headers import HEAD_BYTES, AudioHeader, checked, flac_header, format_of, mp3_header

Source = str | bytes | BinaryIO  # a local path, a recording's bytes, or an open file
_BYTES_PER_SECOND = 200_000  # a file with more than this is not worth decoding whole
_FRAMES_BEYOND = 2  # nor is a file with more than this many times the requested frames
_BLOCK_SAMPLES = 1 << 22  # over all channels, decoded at a time
_MOST_STREAMED = 1 << 28  # samples held at the file's own rate


def _frames(duration_ms: int, rate: int) -> int:
    """Durations are rounded up to whole milliseconds."""
    return -(-duration_ms * rate // 1000)


def _mixed_down(samples: np.ndarray) -> np.ndarray:
    """(frames, channels) to (frames,)."""
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)


def short_file(path: str, data: bytes | None, offset_ms: int, duration_ms: int | None) -> tuple[np.ndarray, int] | None:
    """(frames,) float32 and the sample rate of a file's first `duration_ms`; None if libsndfile has to read it: another
    format, a span that starts later, a file that holds much more than requested, or a broken file."""
    if offset_ms:
        return None
    most_bytes = math.inf if duration_ms is None else max(1, duration_ms / 1000) * _BYTES_PER_SECOND
    if data is None:
        data = short_file_bytes(path, most_bytes)
    head = data[:HEAD_BYTES]
    kind = format_of(head) if len(data) <= most_bytes else None
    if kind is None:
        return None
    try:
        header = flac_header(head) if kind == "flac" else None
        if header is None:
            return _streamed(path, data, kind, duration_ms)
        checked(path, header)
        wanted = header.frames if duration_ms is None else _frames(duration_ms, header.sample_rate)
        most = min(_FRAMES_BEYOND * max(wanted, header.sample_rate), 4 * _BLOCK_SAMPLES // header.channels)
        if header.frames > most:
            return None
        samples = np.frombuffer(miniaudio.flac_read_f32(data).samples, np.float32).reshape(-1, header.channels)
        if not len(samples) or len(samples) < header.frames:
            return None
        return _mixed_down(samples[:wanted]), header.sample_rate
    except miniaudio.MiniaudioError:
        return None


def _streamed(path: str, data: bytes, kind: str, duration_ms: int | None) -> tuple[np.ndarray, int] | None:
    """`short_file` if no header gives the length: decodes block by block, and no more than requested."""
    if kind == "mp3":
        header, expected = mp3_header(data), 0
    else:
        info = miniaudio.vorbis_get_info(data) if kind == "vorbis" else miniaudio.flac_get_info(data)
        header, expected = AudioHeader(info.num_frames, info.sample_rate, info.nchannels), info.num_frames
    if header is None:
        return None
    rate, channels = checked(path, header).sample_rate, header.channels
    most = _MOST_STREAMED if duration_ms is None else _frames(duration_ms, rate)
    piece = max(1, min(most, _BLOCK_SAMPLES // channels))
    pieces, total = [], 0
    with closing(miniaudio.stream_memory(data, miniaudio.SampleFormat.FLOAT32, channels, rate, piece)) as decoded:
        for samples in decoded:
            pieces.append(_mixed_down(np.frombuffer(samples, np.float32).reshape(-1, channels)))
            total += len(pieces[-1])
            if total >= most:
                break
    if not total or total < min(expected, most) or total >= _MOST_STREAMED:
        return None
    return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces))[:most], rate


def span(
    path: str, data: bytes | None, offset_ms: int, duration_ms: int | None, sample_rate: int
) -> tuple[np.ndarray, int]:
    """(frames,) float32 of a span and their sample rate, by libsndfile: the file's own rate, or `sample_rate` if the
    span is long: then it is mixed down and resampled block by block."""
    if data is None and offset_ms:  # otherwise `short_file` came first
        os.close(open_regular(path)[0])  # libsndfile would block on a pipe
    with sound_file(path if data is None else data) as file:
        header = checked(path, AudioHeader(file.frames, file.samplerate, file.channels))
        rate, first = header.sample_rate, offset_ms * header.sample_rate // 1000
        if first >= header.frames:
            raise no_audio(path, f"offset {offset_ms} ms of {header.duration_ms} ms")
        if first:
            file.seek(first)
        # Reading past the end returns what is left.
        left = header.frames - first if duration_ms is None else min(_frames(duration_ms, rate), header.frames - first)
        size = max(1, _BLOCK_SAMPLES // header.channels)
        if left <= size:
            return _mixed_down(file.read(left, dtype="float32", always_2d=True)), rate
        if left > MAX_HOURS * 3600 * rate:
            raise too_long(path)
        return _resampled_blocks(file, header, left, size, sample_rate), sample_rate


def _resampled_blocks(
    file: soundfile.SoundFile, header: AudioHeader, left: int, size: int, sample_rate: int
) -> np.ndarray:
    """The next `left` frames of a file at `sample_rate`, decoded `size` at a time."""
    rate = header.sample_rate
    stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
    # Memory is allocated as it is filled, so a wrong header costs nothing.
    mono, end = np.empty(_frames(left * 1000, sample_rate) // rate + sample_rate, np.float32), 0
    while left > 0:
        block = file.read(min(size, left), dtype="float32", always_2d=True)
        left = left - len(block) if len(block) == min(size, left) else 0
        part = stream.resample_chunk(_mixed_down(block), last=not left)
        mono[end : end + len(part)] = part
        end += len(part)
    return mono[:end]


def resampled(samples: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """(N,) at `rate` Hz → (M,) at `sample_rate` Hz."""
    return soxr.resample(samples, rate, sample_rate)


def count_frames(path: str, source: Source) -> int:
    """Frames of a file whose header lacks the length, counted by decoding it."""
    if not isinstance(source, str | bytes):
        source.seek(0)
        source = source.read(MAX_FILE_BYTES)
    decoded = short_file(path, None if isinstance(source, str) else source, 0, None)
    if decoded is None:
        raise too_long(path)
    return len(decoded[0])


def sound_file(source: Source) -> soundfile.SoundFile:
    """A recording opened by libsndfile."""
    if isinstance(source, str):
        return soundfile.SoundFile(source.removeprefix("file://"))
    return soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)
