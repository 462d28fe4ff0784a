"""Headers of recordings: a file's rate, channels and length, and its format by its first bytes."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain.data.audio.errors import AudioError, shown

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1_000, 768_000
MAX_CHANNELS = 256
HEAD_BYTES = 64  # enough to recognize a format


@dataclass(frozen=True)
class AudioHeader:
    """What a recording's header says: `frames` samples of each of its `channels`, at `sample_rate` Hz."""

    frames: int
    sample_rate: int
    channels: int

    @property
    def duration_ms(self) -> int:
        """Whole milliseconds, rounded up like those of rows."""
        return -(-self.frames * 1000 // self.sample_rate)


def format_of(head: bytes) -> str | None:
    """The format of a file that miniaudio decodes, by its first bytes."""
    if head.startswith(b"fLaC"):
        return "flac"
    if head.startswith(b"OggS") and head[28:35] == b"\x01vorbis":
        return "vorbis"
    if head.startswith(b"ID3") or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):  # layer III
        return "mp3"
    return None


def flac_header(head: bytes) -> AudioHeader | None:
    """From a FLAC file's first 26 bytes; None if they don't give the length, as after writing to a pipe."""
    if len(head) < 26 or not head.startswith(b"fLaC") or head[4] & 0x7F:
        return None
    packed = int.from_bytes(head[18:26], "big")  # 20 bits rate, 3 channels, 5 bits of a sample, 36 frames
    frames = packed & 0xFFFFFFFFF
    return AudioHeader(frames, packed >> 44, (packed >> 41 & 7) + 1) if frames else None


def mp3_header(data: bytes) -> AudioHeader | None:
    """Rate and channels of an MP3 file from its first frame, with 0 as the number of frames; None if there is junk."""
    tag = 0
    if data.startswith(b"ID3") and len(data) >= 10:  # its size has 7 bits per byte
        tag = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    frame = data[tag : tag + 4]
    if len(frame) < 4 or frame[0] != 0xFF or frame[1] & 0xE6 != 0xE2 or frame[2] & 0x0C == 0x0C:
        return None
    rate = (44_100, 48_000, 32_000)[frame[2] >> 2 & 3] >> {3: 0, 2: 1, 0: 2}.get(frame[1] >> 3 & 3, 0)
    return AudioHeader(0, rate, 1 if frame[3] >> 6 == 3 else 2)


def checked(path: str, header: AudioHeader) -> AudioHeader:
    """The header. Raises `AudioError` if its rate or channels are outside the limits."""
    if not MIN_SAMPLE_RATE <= header.sample_rate <= MAX_SAMPLE_RATE:
        raise AudioError(
            f"audio {shown(path)} has an unusable sample rate",
            got=f"{header.sample_rate} Hz",
            allowed=f"{MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz",
            remedy="write the file again, or leave its row out",
        )
    if not 1 <= header.channels <= MAX_CHANNELS:
        raise AudioError(
            f"audio {shown(path)} has too many channels",
            got=header.channels,
            allowed=f"1 to {MAX_CHANNELS}",
            remedy="mix it down, or leave its row out",
        )
    return header
