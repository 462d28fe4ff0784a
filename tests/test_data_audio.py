"""Audio: read, cut, resampled, mixed down; demo speech is the same each time."""

import numpy as np
import pytest
import soundfile

from raytrain.data.audio import AudioError, read_audio


def test_audio_is_cut_resampled_and_mixed_down(tmp_path):
    tone = np.sin(np.arange(16000) / 16000 * 2 * np.pi * 200).astype(np.float32) * 0.5
    soundfile.write(tmp_path / "a.flac", np.stack((tone[::2], tone[::2]), 1), 8000)
    whole = read_audio(str(tmp_path / "a.flac"), sample_rate=16000)
    assert whole.shape == (16000,) and whole.dtype == np.float32
    np.testing.assert_allclose(whole[2000:14000], tone[2000:14000], atol=0.01)
    part = read_audio(str(tmp_path / "a.flac"), offset_ms=250, duration_ms=500, sample_rate=8000)
    assert len(part) == 4000


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
