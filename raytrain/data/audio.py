"""Read audio: any libsndfile format, a span of it, mono, at the model's sample rate.

Whatever opens a recording does it here, since a recording may be anything: a pipe that never answers, a few kilobytes
that unfold to gigabytes, a header that lies. Only regular files are opened, headers are read before samples, no more is
decoded than the span that is asked for, and whatever a decoder raises is an `AudioError` with the file's name.

Short FLAC, Vorbis and MP3 files go through miniaudio, whose decoders are 1.2 to 1.5 times as fast; what these do not
take is libsndfile's.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raytrain.errors import DataError
from raytrain.storage.filesystem import StorageReadError, is_uri, open_file, read_range

RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0)
PARQUET_ROW = -1  # as `size`: the audio is row `start` of a Parquet file
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1_000, 768_000
MAX_CHANNELS = 256
MAX_HOURS = 8  # of one span: 1.8 GB at 16 kHz
MAX_FILE_BYTES = 4 << 30  # of what is read whole: a member of a tar, a file of an object store
_HEAD_BYTES = 64  # tell a format
_FIRST_BYTES = 1 << 16  # five seconds of FLAC
_BYTES_PER_SECOND = 200_000  # a file with more than this is not worth decoding whole for what is wanted of it
_FRAMES_BEYOND = 2  # nor is one with more than so many times the wanted frames
_BLOCK_SAMPLES = 1 << 22  # of all channels, decoded at a time
_UNKNOWN = 1 << 62  # frames or more: libsndfile's word for a file that does not say how many
_OBJECT = re.compile(r"<[\w.]+ object at 0x\w+>")  # in messages of libsndfile, other ones in every run
_MOST_STREAMED = 1 << 28  # samples that are held at the file's own rate


class AudioError(DataError):
    """A recording is missing, broken, or too short for its manifest row."""


@dataclass(frozen=True)
class AudioHeader:
    """What a recording says of itself: `frames` samples of each of its `channels`, at `sample_rate` Hz."""

    frames: int
    sample_rate: int
    channels: int

    @property
    def duration_ms(self) -> int:
        """Whole milliseconds, rounded up as those of rows are."""
        return -(-self.frames * 1000 // self.sample_rate)


def read_header(path: str, *, start: int = 0, size: int = 0, data: bytes | None = None) -> AudioHeader:
    """The header of a recording that `read_audio` would read from the same place. No more is read than that takes.

    Raises `AudioError` where the recording can't be opened, is none, or has a rate or channels beyond the limits.
    """
    try:
        if data is None and size:
            if size > _FIRST_BYTES and (header := _flac_header(_read_bytes(path, start, _HEAD_BYTES))):
                return _checked(path, header)
            data = _read_bytes(path, start, size)
        if data is not None:
            return _header(path, data[:_HEAD_BYTES], data)
        if is_uri(path):
            with open_file(path) as file:
                buffered = io.BufferedReader(file, _FIRST_BYTES)
                return _header(path, buffered.peek(_HEAD_BYTES)[:_HEAD_BYTES], buffered)
        return _header(path, _local_bytes(path, 0, _HEAD_BYTES), path)
    except Exception as error:  # whatever a file does to its decoder is that file's fault
        raise _audio_error(path, error) from error


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
    Where its bytes are at hand already, they are `data`. Without `duration_ms` the span goes to the recording's end.
    Raises `AudioError` where the file can't be opened or decoded, and where the span has no samples or is longer than
    `MAX_HOURS`.
    """
    try:
        if data is None and (size or is_uri(path)):
            data = _read_bytes(path, start, size)
        found = _short_file(path, data, offset_ms, duration_ms)
        mono, rate = _span(path, data, offset_ms, duration_ms, sample_rate) if found is None else found
        if not len(mono):
            raise _no_audio(path, f"offset {offset_ms} ms")
        if rate != sample_rate:
            import soxr

            samples = len(mono)
            mono = soxr.resample(mono, rate, sample_rate)
            if not len(mono):
                raise _no_audio(path, f"{samples} sample(s)")
        if not (np.isfinite(mono.min()) and np.isfinite(mono.max())):
            raise AudioError(f"audio {_shown(path)} has samples that are not finite", remedy="make the file anew")
        return np.ascontiguousarray(mono, dtype=np.float32)
    except Exception as error:  # whatever a file does to its decoder is that file's fault
        raise _audio_error(path, error) from error


def _audio_error(path: str, error: Exception) -> AudioError:
    if isinstance(error, AudioError):
        return error
    if isinstance(error, StorageReadError):
        why: str | None = error.why or error.what
    elif isinstance(error, FileNotFoundError):
        why = "there is no such file"
    else:
        why = getattr(error, "strerror", None) or _OBJECT.sub("its bytes", str(error)) or repr(error)
    remedy = "check that the file is there and whole, or leave its row out"
    return AudioError(f"can't read audio {_shown(path)}", why=why, remedy=remedy)


def _no_audio(path: str, got: str) -> AudioError:
    return AudioError(f"no audio in {_shown(path)}", got=got, remedy="correct its manifest row, or leave it out")


def _too_long(path: str) -> AudioError:
    return AudioError(
        f"audio {_shown(path)} is too long to be read at once",
        allowed=f"{MAX_HOURS} hours of one span",
        remedy="cut the recording, or name spans of it by offset and duration",
    )


def _shown(path: str) -> str:
    """A path in one readable line."""
    return path if path.isprintable() else ascii(path)


# --- bytes


def _open(path: str) -> tuple[int, int]:
    """Descriptor and size of a regular file that is not empty. A pipe's other end is not waited for."""
    handle = os.open(path.removeprefix("file://"), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    found = os.fstat(handle)
    if stat.S_ISREG(found.st_mode) and found.st_size:  # files of /proc have no size
        return handle, found.st_size
    os.close(handle)
    if stat.S_ISREG(found.st_mode):
        raise OSError("the file is empty")
    raise OSError("it is a folder" if stat.S_ISDIR(found.st_mode) else "it is a pipe, a socket or a device")


def _local_bytes(path: str, start: int, size: int) -> bytes:
    """At most `size` bytes of a local file from `start` on."""
    handle, _ = _open(path)
    try:
        return os.pread(handle, size, start)
    finally:
        os.close(handle)


def _encoded(path: str, most_bytes: float) -> bytes:
    """A local file's bytes, none where there are more than `most_bytes` or miniaudio does not know the format. Short
    files are many: each is opened once and read at one go."""
    handle, length = _open(path)
    try:
        head = os.read(handle, _FIRST_BYTES)
        if _kind(head) is None:
            return b""
        if length > most_bytes:
            return b""
        while len(head) < length and (more := os.read(handle, length - len(head))):
            head += more
        return head
    finally:
        os.close(handle)


def _read_bytes(path: str, start: int, size: int) -> bytes:
    """A store that fails is asked again after 0.5, 1, 2 and 4 s; what is not there, at once no more."""
    if size > MAX_FILE_BYTES:
        raise OSError(f"it has {size} bytes, and {MAX_FILE_BYTES} is the most that is read of a file at once")
    if size > 0 and not is_uri(path):
        data = _local_bytes(path, start, size)
        if len(data) < size:
            raise OSError(f"{path} is cut short: {len(data)} bytes from {start} on, not {size}")
        return data
    for pause in (*RETRY_SECONDS, None):
        try:
            if size == PARQUET_ROW:
                from raytrain.data.corpora.parquet import read_audio_bytes

                return read_audio_bytes(path, [start])[start]
            return read_range(path, start, size, most=MAX_FILE_BYTES)
        except StorageReadError as error:
            if pause is None or not is_uri(path) or isinstance(error.__cause__, FileNotFoundError):
                raise
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


# --- headers


def _kind(head: bytes) -> str | None:
    """The format of a file that miniaudio decodes, told from its first bytes."""
    if head.startswith(b"fLaC"):
        return "flac"
    if head.startswith(b"OggS") and head[28:35] == b"\x01vorbis":
        return "vorbis"
    if head.startswith(b"ID3") or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):  # layer III
        return "mp3"
    return None


def _flac_header(head: bytes) -> AudioHeader | None:
    """From a FLAC file's first 26 bytes; None where they don't say how long it is (one that was written to a pipe)."""
    if len(head) < 26 or not head.startswith(b"fLaC") or head[4] & 0x7F:
        return None
    packed = int.from_bytes(head[18:26], "big")  # 20 bits rate, 3 channels, 5 bits of a sample, 36 frames
    frames = packed & 0xFFFFFFFFF
    return AudioHeader(frames, packed >> 44, (packed >> 41 & 7) + 1) if frames else None


def _mp3_header(data: bytes) -> AudioHeader | None:
    """Rate and channels of an MP3 file from its first frame, the number of frames being 0; None where there is junk."""
    tag = 0
    if data.startswith(b"ID3") and len(data) >= 10:  # 7 bits in each byte of its size
        tag = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    frame = data[tag : tag + 4]
    if len(frame) < 4 or frame[0] != 0xFF or frame[1] & 0xE6 != 0xE2 or frame[2] & 0x0C == 0x0C:
        return None
    rate = (44_100, 48_000, 32_000)[frame[2] >> 2 & 3] >> {3: 0, 2: 1, 0: 2}.get(frame[1] >> 3 & 3, 0)
    return AudioHeader(0, rate, 1 if frame[3] >> 6 == 3 else 2)


def _header(path: str, head: bytes, source: Any) -> AudioHeader:
    """The header of `source`: a local path, bytes, or an open file, which begins with `head`."""
    header = _flac_header(head)
    if header is None:
        with _sound_file(source) as file:
            header = AudioHeader(file.frames, file.samplerate, file.channels)
    _checked(path, header)
    if header.frames >= _UNKNOWN:
        header = replace(header, frames=_count_frames(path, source))
    return header


def _count_frames(path: str, source: Any) -> int:
    """Frames of a file that does not say how many it has, by decoding it."""
    if not isinstance(source, str | bytes):
        source.seek(0)
        source = source.read(MAX_FILE_BYTES)
    found = _short_file(path, None if isinstance(source, str) else source, 0, None)
    if found is None:
        raise _too_long(path)
    return len(found[0])


def _checked(path: str, header: AudioHeader) -> AudioHeader:
    if not MIN_SAMPLE_RATE <= header.sample_rate <= MAX_SAMPLE_RATE:
        raise AudioError(
            f"audio {_shown(path)} has a sample rate that is none of speech",
            got=f"{header.sample_rate} Hz",
            allowed=f"{MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz",
            remedy="make the file anew, or leave its row out",
        )
    if not 1 <= header.channels <= MAX_CHANNELS:
        raise AudioError(
            f"audio {_shown(path)} has too many channels",
            got=header.channels,
            allowed=f"1 to {MAX_CHANNELS}",
            remedy="mix it down, or leave its row out",
        )
    return header


# --- samples


def _frames(duration_ms: int, rate: int) -> int:
    """Durations are rounded up to whole milliseconds."""
    return -(-duration_ms * rate // 1000)


def _mixed_down(samples: np.ndarray) -> np.ndarray:
    """(frames, channels) to (frames,)."""
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)


def _short_file(
    path: str, data: bytes | None, offset_ms: int, duration_ms: int | None
) -> tuple[np.ndarray, int] | None:
    """(frames,) float32 and the sample rate of a file's first `duration_ms`; None where libsndfile has to see to it:
    another format, a span from further on, a file that holds much more than is wanted, or one that is broken."""
    if offset_ms:
        return None
    most_bytes = math.inf if duration_ms is None else max(1, duration_ms / 1000) * _BYTES_PER_SECOND
    if data is None:
        data = _encoded(path, most_bytes)
    head = data[:_HEAD_BYTES]
    kind = _kind(head) if len(data) <= most_bytes else None
    if kind is None:
        return None
    import miniaudio

    try:
        header = _flac_header(head) if kind == "flac" else None
        if header is None:
            return _streamed(path, data, kind, duration_ms)
        _checked(path, header)
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
    """`_short_file` where no header bounds what there is to decode: piece by piece, and no more than is wanted."""
    import miniaudio

    if kind == "mp3":
        header, expected = _mp3_header(data), 0
    else:
        info = miniaudio.vorbis_get_info(data) if kind == "vorbis" else miniaudio.flac_get_info(data)
        header, expected = AudioHeader(info.num_frames, info.sample_rate, info.nchannels), info.num_frames
    if header is None:
        return None
    rate, channels = _checked(path, header).sample_rate, header.channels
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


def _span(
    path: str, data: bytes | None, offset_ms: int, duration_ms: int | None, sample_rate: int
) -> tuple[np.ndarray, int]:
    """(frames,) float32 of a span and their sample rate, by libsndfile: the file's own rate, or `sample_rate` where the
    span is long, since it is then mixed down and resampled block by block."""
    if data is None and offset_ms:  # without, `_short_file` was first
        os.close(_open(path)[0])  # libsndfile would wait for a pipe
    with _sound_file(path if data is None else data) as file:
        header = _checked(path, AudioHeader(file.frames, file.samplerate, file.channels))
        rate, first = header.sample_rate, offset_ms * header.sample_rate // 1000
        if first >= header.frames:
            raise _no_audio(path, f"offset {offset_ms} ms of {header.duration_ms} ms")
        if first:
            file.seek(first)
        # Reading past the end gives what is there.
        left = header.frames - first if duration_ms is None else min(_frames(duration_ms, rate), header.frames - first)
        size = max(1, _BLOCK_SAMPLES // header.channels)
        if left <= size:
            return _mixed_down(file.read(left, dtype="float32", always_2d=True)), rate
        if left > MAX_HOURS * 3600 * rate:
            raise _too_long(path)
        import soxr

        stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
        # Memory is taken as it is filled, so a header that lies costs nothing.
        mono, end = np.empty(_frames(left * 1000, sample_rate) // rate + sample_rate, np.float32), 0
        while left > 0:
            block = file.read(min(size, left), dtype="float32", always_2d=True)
            left = left - len(block) if len(block) == min(size, left) else 0
            part = stream.resample_chunk(_mixed_down(block), last=not left)
            mono[end : end + len(part)] = part
            end += len(part)
        return mono[:end], sample_rate


def _sound_file(source: Any) -> Any:
    import soundfile

    if isinstance(source, str):
        return soundfile.SoundFile(source.removeprefix("file://"))
    return soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)
