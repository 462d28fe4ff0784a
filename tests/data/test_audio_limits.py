"""Reading any file gives audio or an `AudioError` with its name, quickly and in little memory."""

import os
import struct
import time
import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data import audio
from raytrain.data.audio import AudioError, AudioHeader, read_audio, read_header
from raytrain.data.corpora.durations import add_durations
from raytrain.data.materialize import make_flacs

RATE = 16000


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    return (np.sin(np.arange(int(seconds * rate)) * 0.1) * 0.3).astype(np.float32)


def wav_bytes(rate: int, channels: int, claimed: int, data: bytes) -> bytes:
    head = struct.pack("<IHHIIHH", 16, 1, channels, rate, (rate * channels * 2) & 0xFFFFFFFF, 2 * channels, 16)
    return b"RIFF" + struct.pack("<I", claimed) + b"WAVEfmt " + head + b"data" + struct.pack("<I", claimed - 36) + data


def without_length(flac: bytes) -> bytes:
    """A FLAC as written to a pipe: 0 frames in its header."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + b"\0\0\0\0" + flac[26:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "empty.wav").touch()
    (folder / "folder.wav").mkdir()
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    os.mkfifo(folder / "pipe.wav")
    (folder / "slow.wav").write_bytes(wav_bytes(1, 1, 2036, bytes(2000)))
    (folder / "fast.wav").write_bytes(wav_bytes(32_000_000, 1, 2036, bytes(2000)))
    (folder / "wide.wav").write_bytes(wav_bytes(RATE, 1000, 200_036, bytes(200_000)))
    (folder / "plain.raw").write_bytes(bytes(2000))
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    soundfile.write(folder / "infinite.wav", np.full(RATE, -np.inf, np.float32), RATE, subtype="FLOAT")
    return folder


BAD = (
    "empty.wav",
    "folder.wav",
    "loop.wav",
    "pipe.wav",
    "slow.wav",
    "fast.wav",
    "wide.wav",
    "plain.raw",
    "nan.wav",
    "infinite.wav",
    "none.wav",
    "a\0b.wav",
    "a\nb.wav",
    "\ud800.wav",
    "x" * 300,
    "..",
)


@pytest.mark.parametrize("name", [*BAD, "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/self/environ"])
@pytest.mark.parametrize("duration_ms", [1000, None, 10**21])
@pytest.mark.parametrize("offset_ms", [0, 250, 10**21])
def test_a_file_that_is_not_audio_is_an_error_with_its_name(folder, name, duration_ms, offset_ms):
    path = name if name[0] == "/" else f"{folder}/{name}"
    began = time.monotonic()
    with pytest.raises(AudioError) as caught:
        read_audio(path, sample_rate=RATE, offset_ms=offset_ms, duration_ms=duration_ms)
    assert time.monotonic() - began < 1
    message = str(caught.value)
    assert (path if path.isprintable() else ascii(path)) in message and message.isprintable()
    assert caught.value.remedy


def test_everything_that_opens_recordings_rejects_other_files(folder):
    import pyarrow as pa

    from raytrain.data.assignment import ROW_SCHEMA

    paths = [f"{folder}/{name}" for name in ("pipe.wav", "folder.wav", "slow.wav", "wide.wav", "loop.wav")]
    for path in paths:
        with pytest.raises(AudioError, match=path):
            read_header(path)
    rows = [{"audio_filepath": path, "text": "one"} for path in paths]
    assert [row[0] for row in add_durations(rows, paths)] == ["bad_audio"] * len(paths)
    values = {"audio_start": 0, "audio_size": 0, "offset_ms": 0, "duration_ms": 1000}
    columns = {field.name: pa.nulls(len(paths), field.type) for field in ROW_SCHEMA}
    columns |= {name: pa.array([value] * len(paths)) for name, value in values.items()}
    made = make_flacs(pa.table(columns | {"audio_path": paths}), RATE)
    assert all(isinstance(error, AudioError) and path in str(error) for error, path in zip(made, paths, strict=True))


@pytest.mark.parametrize("container", ["flac", "wav"])
def test_no_more_is_decoded_than_the_span(tmp_path, container):
    path = str(tmp_path / f"long.{container}")
    with soundfile.SoundFile(path, "w", 48000, 8, format=container.upper(), subtype="PCM_16") as file:
        for _ in range(5):
            file.write(np.zeros((48000 * 20, 8), np.int16))  # 154 MB as float
    for offset_ms, duration_ms, samples in ((0, 1000, RATE), (90_000, 1000, RATE), (99_500, 10**21, RATE // 2)):
        tracemalloc.start()
        actual = read_audio(path, sample_rate=RATE, offset_ms=offset_ms, duration_ms=duration_ms)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(actual) == samples and peak < 16e6
    assert read_header(path) == AudioHeader(4_800_000, 48000, 8)


def test_long_recordings_are_read_in_blocks_as_if_at_once(tmp_path, monkeypatch):
    path, sound = str(tmp_path / "a.wav"), np.stack([tone(3, 48000), -0.5 * tone(3, 48000)], 1)
    soundfile.write(path, sound, 48000)
    whole = read_audio(path, sample_rate=RATE)
    monkeypatch.setattr(audio.samples, "_BLOCK_SAMPLES", 10_000)
    blocks = read_audio(path, sample_rate=RATE)
    assert abs(len(blocks) - len(whole)) <= 1
    np.testing.assert_allclose(blocks[: len(whole)], whole[: len(blocks)], atol=1e-4)
    monkeypatch.setattr(audio.samples, "MAX_HOURS", 1 / 3600)
    with pytest.raises(AudioError, match="a.wav is too long"):
        read_audio(path, sample_rate=RATE)
    assert len(read_audio(path, sample_rate=RATE, offset_ms=1000, duration_ms=900)) == 0.9 * RATE


def test_a_flac_written_to_a_pipe_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(3), RATE)
    path.write_bytes(without_length(path.read_bytes()))
    assert read_header(str(path)) == AudioHeader(3 * RATE, RATE, 1)
    assert len(read_audio(str(path), sample_rate=RATE)) == 3 * RATE
    assert len(read_audio(str(path), sample_rate=RATE, duration_ms=1000)) == RATE
    assert len(read_audio(str(path), sample_rate=RATE, offset_ms=1000, duration_ms=500)) == RATE // 2


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("container", ["flac", "wav", "ogg", "mp3"])
def test_headers_say_what_reading_gives(tmp_path, container, channels, rate):
    path = tmp_path / f"a.{container}"
    soundfile.write(path, np.repeat(tone(2, rate)[:, None], channels, 1), rate)
    data = path.read_bytes()
    (tmp_path / "tar").write_bytes(b"head" + data + b"tail")
    actual = read_header(str(path))
    assert (actual.sample_rate, actual.channels) == (rate, channels)
    assert actual == read_header(str(path), data=data) == read_header(f"file://{path}")
    assert actual == read_header(str(tmp_path / "tar"), start=4, size=len(data))
    assert actual.frames == len(read_audio(str(path), sample_rate=rate))
    assert abs(actual.duration_ms - 2000) < 100


@pytest.fixture(scope="module")
def encoded():
    import io

    made = {}
    for container in ("flac", "wav", "ogg", "mp3"):
        file = io.BytesIO()
        soundfile.write(file, tone(0.5), RATE, format=container.upper())
        made[container] = file.getvalue()
    return made


@settings(max_examples=150, deadline=None)
@given(
    container=st.sampled_from(["flac", "wav", "ogg", "mp3"]),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    header_flips=st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), max_size=3),
    end=st.floats(0, 1),
    span=st.sampled_from([(0, None), (0, 200), (100, 200), (0, 10**21)]),
)
def test_damaged_bytes_are_audio_or_an_error(encoded, container, flips, header_flips, end, span):
    data = bytearray(encoded[container])
    for fraction, value in flips:
        data[int(fraction * (len(data) - 1))] = value
    for fraction, value in header_flips:
        data[fraction] = value
    damaged, (offset_ms, duration_ms) = bytes(data[: max(1, int(end * len(data)))]), span
    try:
        actual = read_audio("a.x", sample_rate=RATE, data=damaged, offset_ms=offset_ms, duration_ms=duration_ms)
        assert actual.dtype == np.float32 and len(actual) and np.isfinite(actual).all()
    except AudioError as error:
        assert "a.x" in str(error)
    try:
        assert read_header("a.x", data=damaged).frames >= 0
    except AudioError as error:
        assert "a.x" in str(error)


def test_a_decoders_message_is_the_same_in_every_run():
    """Errors are kept in artifacts, whose ids would change with an object's address."""
    messages = set()
    for _ in range(2):
        with pytest.raises(AudioError) as raised:
            read_header("a.parquet", data=bytes(100))
        messages.add(str(raised.value))
    assert len(messages) == 1 and " object at " not in messages.pop()
