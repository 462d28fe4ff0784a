"""Read audio: any libsndfile format, a span of it, mono, at the model's sample rate.

Whole FLAC, Vorbis and MP3 files go through miniaudio, whose decoders are 1.2 to 1.5 times as fast; what these do not
take is libsndfile's.
"""

from __future__ import annotations

import io
import math
import os
import time
from pathlib import Path

import numpy as np

from raytrain.data.storage import StorageReadError, is_uri, read_range
from raytrain.errors import DataError

RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0)
PARQUET_ROW = -1  # as `size`: the audio is row `start` of a Parquet file
_HEAD_BYTES = 64  # tell a format
_FIRST_BYTES = 1 << 16  # five seconds of FLAC
_BYTES_PER_SECOND = 200_000  # a file with more than this is not worth decoding whole for what is wanted of it


class AudioError(DataError):
    """A recording is missing, broken, or too short for its manifest row."""


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

    `path` is a file or URI; with `size` the recording is that many bytes of it from `start` on (a member of a tar).
    Where its bytes are at hand already, they are `data`.
    Raises `AudioError` where the file can't be opened, decoded, or has no samples in the span.
    """
    import soundfile

    try:
        if data is None and (size or is_uri(path)):
            data = _read_bytes(path, start, size)
        source = path if data is None else io.BytesIO(data)
        found = None if offset_ms else _whole_file(path if data is None else data, duration_ms)
        if found is not None:
            samples, rate = found
        else:
            with soundfile.SoundFile(source) as file:
                rate = file.samplerate
                if offset_ms:
                    file.seek(offset_ms * rate // 1000)
                # Reading past the end gives what is there.
                samples = file.read(_frames(duration_ms, rate), dtype="float32", always_2d=True)
    except StorageReadError as error:
        raise AudioError(f"can't read audio {path}", why=error.why or error.what) from error
    except (OSError, RuntimeError) as error:
        # libsndfile calls a missing file a system error.
        why = str(error) if source is not path or Path(path).is_file() else "there is no such file"
        raise AudioError(f"can't read audio {path}", why=why) from error
    if not len(samples):
        raise AudioError(f"no audio in {path}", got=f"offset {offset_ms} ms", remedy="correct its manifest row")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise AudioError(f"audio {path} has samples that are not finite")
    if rate != sample_rate:
        import soxr

        mono = soxr.resample(mono, rate, sample_rate)
        if not len(mono):
            raise AudioError(f"no audio in {path}", got=f"{len(samples)} sample(s)", remedy="leave it out")
    return np.ascontiguousarray(mono, dtype=np.float32)


def _frames(duration_ms: int | None, rate: int) -> int:
    """Durations are rounded up to whole milliseconds; -1 is all that there is."""
    return -1 if duration_ms is None else -(-duration_ms * rate // 1000)


def _whole_file(source: str | bytes, duration_ms: int | None) -> tuple[np.ndarray, int] | None:
    """(frames, channels) float32 and the sample rate, of a file's first `duration_ms`; None where libsndfile has to see
    to it: another format, a much longer file, or one that is broken."""
    import miniaudio

    most_bytes = math.inf if duration_ms is None else max(1, duration_ms / 1000) * _BYTES_PER_SECOND
    data = source if isinstance(source, bytes) else _encoded(source, most_bytes)
    kind = _kind(data[:_HEAD_BYTES]) if len(data) <= most_bytes else None
    if kind is None:
        return None
    try:
        if kind == "mp3":
            sound, expected = miniaudio.mp3_read_f32(data), 0
        elif kind == "flac":
            sound, expected = miniaudio.flac_read_f32(data), miniaudio.flac_get_info(data).num_frames
        else:
            known = miniaudio.vorbis_get_info(data)
            sound = miniaudio.decode(data, miniaudio.SampleFormat.FLOAT32, known.nchannels, known.sample_rate)
            expected = known.num_frames
    except miniaudio.MiniaudioError:
        return None
    samples = np.frombuffer(sound.samples, dtype=np.float32).reshape(-1, sound.nchannels)
    if not len(samples) or len(samples) < expected:
        return None
    frames = _frames(duration_ms, sound.sample_rate)
    return (samples if frames < 0 else samples[:frames]), sound.sample_rate


def _encoded(path: str, most_bytes: float) -> bytes:
    """A file's bytes, none where there are more than `most_bytes` or miniaudio does not know the format. Short files
    are many: each is opened once and read at one go."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            return b""
        head = file.read(_FIRST_BYTES)
        if _kind(head[:_HEAD_BYTES]) is None:
            return b""
        return head if len(head) == size else head + file.readall()


def _kind(head: bytes) -> str | None:
    """Told from a file's first bytes."""
    if head.startswith(b"fLaC"):
        return "flac"
    if head.startswith(b"OggS") and head[28:35] == b"\x01vorbis":
        return "vorbis"
    if head.startswith(b"ID3") or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):  # layer III
        return "mp3"
    return None


def _read_bytes(path: str, start: int, size: int) -> bytes:
    """A store that fails is asked again after 0.5, 1, 2 and 4 s; what is not there, at once no more."""
    for pause in (*RETRY_SECONDS, None):
        try:
            if size == PARQUET_ROW:
                from raytrain.data.parquet import read_audio_bytes

                return read_audio_bytes(path, [start])[start]
            return read_range(path, start, size)
        except StorageReadError as error:
            if pause is None or not is_uri(path) or isinstance(error.__cause__, FileNotFoundError):
                raise
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
