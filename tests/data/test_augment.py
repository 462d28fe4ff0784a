"""Augmentation: drawn changes are applied, lengths stay within buckets, and only the draw matters."""

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data.augment import Augmenter, AugmentSettings, add_noise, change_speed, reverberate
from raytrain.errors import DataError
from raytrain.storage.locations import StorageReadError

RATE = 16000


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    return (0.1 * np.sin(2 * np.pi * hertz * np.arange(int(RATE * seconds)) / RATE)).astype(np.float32)


def pitch(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * RATE / len(samples)


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_speed_changes_length_and_pitch(speed):
    changed = change_speed(tone(400, 2.0), speed, 10**6)
    assert len(changed) == pytest.approx(2 * RATE / speed, abs=2)
    assert pitch(changed) == pytest.approx(400 * speed, rel=0.01)


def test_noise_has_the_drawn_loudness_and_wraps():
    speech, noise = tone(300), np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    for snr in (0.0, 20.0):
        added = add_noise(speech, noise, snr, 0.7) - speech
        ratio = 10 * np.log10(np.mean(speech**2) / np.mean(added**2))
        assert ratio == pytest.approx(snr, abs=0.1)
        np.testing.assert_allclose(added[:1500] * noise[0], noise[3500:] * added[1500], atol=1e-4)


def test_reverberation_keeps_place_and_loudness():
    speech = np.zeros(8000, np.float32)
    speech[1000] = 0.5
    response = np.zeros(900, np.float32)
    response[100], response[500] = 1.0, 0.5
    wet = reverberate(speech, response)
    assert len(wet) == 8000 and wet.argmax() == 1000
    assert wet[1400] / wet[1000] == pytest.approx(0.5, abs=1e-3)
    assert np.mean(wet**2) == pytest.approx(np.mean(speech**2), rel=1e-3)


@settings(max_examples=100, deadline=None)
@given(st.integers(200, 3000), st.integers(0, 2**63), st.floats(1.0, 1.3))
def test_a_row_never_outgrows_its_bucket(length, key, room):
    augment = Augmenter(AugmentSettings(speeds=(0.9, 1.0, 1.1), gain_db=(-6.0, 6.0)), RATE)
    samples, limit = tone(300)[:length], int(length * room)
    changed = augment(samples, key, limit)
    assert 0 < len(changed) <= limit and changed.dtype == np.float32 and np.abs(changed).max() <= 1
    np.testing.assert_array_equal(changed, augment(samples, key, limit))


def test_speeds_are_drawn_alike_where_all_fit():
    augment = Augmenter(AugmentSettings(speeds=(0.9, 1.0, 1.1)), RATE)
    lengths = [len(augment(tone(300, 0.1), key, 10**6)) for key in range(600)]
    counts = np.unique(lengths, return_counts=True)[1]
    assert len(counts) == 3 and counts.min() > 150


def test_files_are_used_with_their_probability(tmp_path):
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", np.random.default_rng(1).standard_normal(2000) * 0.1, RATE)
    for probability, low, high in ((0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)):
        augment = Augmenter(AugmentSettings(noise=(f"{tmp_path}/*.wav",), noise_probability=probability), RATE)
        samples = tone(300, 0.1)
        changed = sum(not np.array_equal(augment(samples, key, 10**6), samples) for key in range(200))
        assert low <= changed <= high


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"speeds must be from 0.5 to 2, got \[3.0\]"):
        AugmentSettings(speeds=(3.0,))
    with pytest.raises(ValueError, match="gain_db must be .low, high."):
        AugmentSettings(gain_db=(3.0, -3.0))
    with pytest.raises(StorageReadError, match="none-"):
        Augmenter(AugmentSettings(noise=(f"{tmp_path}/none-*.wav",)), RATE)
    augment = Augmenter(AugmentSettings(noise=(f"{tmp_path}/none.wav",), noise_probability=1.0), RATE)
    with pytest.raises(DataError, match="none.wav, named by augment, can't be read.*no such file"):
        augment(tone(300), 1, 10**6)
    assert not AugmentSettings().is_on
