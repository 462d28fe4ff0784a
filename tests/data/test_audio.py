"""Audio: read, trimmed, resampled, mixed down; demo speech is reproducible."""

import io

import fsspec
import numpy as np
import pytest
import soundfile
from fsspec.implementations.memory import MemoryFileSystem

from raytrain.data import audio
from raytrain.data.audio import AudioError, read_audio


class Flaky(MemoryFileSystem):
    """A store that fails `failures` times before it answers."""

    protocol = "flaky"
    failures = 0
    asked = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _open(self, path, *arguments, **options):
        Flaky.asked += 1
        if Flaky.asked <= Flaky.failures:
            raise OSError(5, "the store is busy")
        return super()._open(path, *arguments, **options)


def test_a_store_that_fails_is_asked_again_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(audio.files, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(1600), 16000, format="FLAC")
    fsspec.filesystem("flaky").pipe("box/a.flac", sound.getvalue())
    for failures, works in ((0, True), (3, True), (4, False)):
        Flaky.asked, Flaky.failures = 0, failures
        if works:
            assert len(read_audio("flaky://box/a.flac", sample_rate=16000)) == 1600
        else:
            with pytest.raises(AudioError, match="the store is busy"):
                read_audio("flaky://box/a.flac", sample_rate=16000)
        assert Flaky.asked == min(failures + 1, 4)
    Flaky.asked, Flaky.failures = 0, 0
    with pytest.raises(AudioError, match="no such file"):
        read_audio("flaky://box/none.flac", sample_rate=16000)
    assert Flaky.asked <= 1


def test_audio_is_cut_resampled_and_mixed_down(tmp_path):
    tone = np.sin(np.arange(16000) / 16000 * 2 * np.pi * 200).astype(np.float32) * 0.5
    soundfile.write(tmp_path / "a.flac", np.stack((tone[::2], tone[::2]), 1), 8000)
    whole = read_audio(str(tmp_path / "a.flac"), sample_rate=16000)
    assert whole.shape == (16000,) and whole.dtype == np.float32
    np.testing.assert_allclose(whole[2000:14000], tone[2000:14000], atol=0.01)
    part = read_audio(str(tmp_path / "a.flac"), offset_ms=250, duration_ms=500, sample_rate=8000)
    assert len(part) == 4000


SUBTYPES = [
    ("flac", "PCM_16", 0),
    ("flac", "PCM_24", 0),
    ("ogg", "VORBIS", 1e-6),
    ("ogg", "OPUS", 0),
    ("mp3", "MPEG_LAYER_III", 3e-4),
    ("wav", "PCM_16", 0),
]


@pytest.mark.parametrize(("container", "subtype", "tolerance"), SUBTYPES)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_is_read_as_libsndfile_reads_it(tmp_path, container, subtype, tolerance, channels):
    rng = np.random.default_rng(1)
    sound = np.convolve(rng.standard_normal(16000 * 3), np.hanning(24), "same")[:, None] * 0.02
    sound = np.repeat(sound, channels, axis=1) * np.linspace(1, 0.5, channels)
    path = str(tmp_path / f"a.{container}")
    soundfile.write(path, sound, 16000, format=container.upper(), subtype=subtype)
    for options in ({}, {"duration_ms": 1500}, {"duration_ms": 9000}, {"offset_ms": 700, "duration_ms": 900}):
        first = options.get("offset_ms", 0) * 16
        expected = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(1)[first:]
        expected = expected[: options["duration_ms"] * 16] if "duration_ms" in options else expected
        for data in (None, (tmp_path / f"a.{container}").read_bytes()):
            actual = read_audio(path, sample_rate=16000, data=data, **options)
            assert actual.shape == expected.shape
            # Decoding after a seek may start differently from decoding straight through.
            np.testing.assert_allclose(actual, expected, atol=max(tolerance, 2e-3 if first else 1e-7), rtol=0)


@pytest.mark.parametrize("container", ["flac", "ogg", "mp3"])
def test_a_file_that_ends_early_gives_no_less_than_libsndfile_reads_of_it(tmp_path, container):
    rng = np.random.default_rng(1)
    soundfile.write(tmp_path / f"a.{container}", rng.standard_normal(48000) * 0.1, 16000)
    whole = (tmp_path / f"a.{container}").read_bytes()
    for share in (0.9, 0.5, 0.02):
        path = tmp_path / f"b.{container}"
        path.write_bytes(whole[: int(len(whole) * share)])
        try:
            expected = len(soundfile.read(path)[0])
        except RuntimeError:
            expected = 0
        try:
            actual = len(read_audio(str(path), sample_rate=16000))
        except AudioError:
            actual = 0
        assert expected - 4608 <= actual < 48000, (share, actual, expected)  # less a frame or two of a codec


def test_broken_and_missing_audio_is_an_error_with_its_path(tmp_path):
    (tmp_path / "b.flac").write_bytes(b"not audio")
    for name in ("b.flac", "none.flac"):
        with pytest.raises(AudioError, match=name):
            read_audio(str(tmp_path / name), sample_rate=16000)


def test_demo_speech_made_twice_has_equal_bytes(corpus, tmp_path):
    from raytrain.demo.speech import make_corpus

    again = make_corpus(tmp_path, {"train": 96, "dev": 8, "test": 10}, seed=3, languages=("en", "de"))
    for split, path in again.items():
        assert path.read_bytes() == (corpus / f"{split}.jsonl").read_bytes()
    name = "audio/train-00000.flac"
    assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()
