"""Augment recordings while loading: speed, reverberation, noise, gain.

A recording's changes depend on its draw in the schedule alone, so a resumed run, or a run with other workers, gets the
same audio. Speed changes length, and a slower recording could outgrow its bucket; the speed is drawn from those with
which it still fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated

import numpy as np

from raytrain.data.audio import AudioError, read_audio
from raytrain.errors import DataError
from raytrain.settings import Range, Setting, refuse, setting_problems
from raytrain.storage.patterns import expand

Probability = Annotated[float, Range(0, 1)]
Decibels = Annotated[float, Range(-200, 200)]


@dataclass(frozen=True)
class AugmentSettings:
    """How recordings are changed in training; nothing by default."""

    __pydantic_config__ = {"extra": "forbid"}

    speeds: Annotated[
        tuple[Annotated[float, Range(0.5, 2)], ...],
        Setting("Speeds to draw from, all equally likely, such as [0.9, 1.0, 1.1]."),
    ] = ()
    noise: Annotated[
        tuple[str, ...], Setting("Patterns of audio files with noise, local or remote, such as /noise/*.flac.")
    ] = ()
    noise_probability: Annotated[Probability, Setting("Probability that a recording gets noise.")] = 0.5
    noise_snr_db: Annotated[
        tuple[Decibels, Decibels], Setting("Lowest and highest ratio of speech to noise to draw from.", unit="dB")
    ] = (10.0, 30.0)
    impulse_responses: Annotated[
        tuple[str, ...], Setting("Patterns of audio files with impulse responses of rooms, for reverberation.")
    ] = ()
    reverb_probability: Annotated[Probability, Setting("Probability that a recording gets reverberation.")] = 0.3
    gain_db: Annotated[
        tuple[Decibels, Decibels] | None, Setting("Lowest and highest gain to draw from.", unit="dB")
    ] = None

    def __post_init__(self) -> None:
        refuse(setting_problems(self))
        problems = []
        for name in ("noise_snr_db", "gain_db"):
            values = getattr(self, name)
            if values is not None and values[0] > values[1]:
                problems.append(f"{name} must be [low, high], got {list(values)}")
        refuse(problems)

    @property
    def is_on(self) -> bool:
        """Whether any augmentation is on."""
        return bool(self.speeds or self.noise or self.impulse_responses or self.gain_db)


@dataclass
class Augmenter:
    """Applies the settings to recordings. Noise and impulse-response files are listed once, and the last `_KEPT` used
    are cached. Safe to share between threads. Raises `StorageReadError` if a pattern matches nothing."""

    settings: AugmentSettings
    sample_rate: int
    _noise: list[str] = field(init=False)
    _responses: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._noise = [path for pattern in self.settings.noise for path in expand(pattern)]
        self._responses = [path for pattern in self.settings.impulse_responses for path in expand(pattern)]
        self._read = lru_cache(maxsize=_KEPT)(self._read_file)

    def __call__(self, samples: np.ndarray, key: int, max_samples: int) -> np.ndarray:
        """(N,) float32 → (M,) float32 with M ≤ max(N, `max_samples`); `key` seeds the draws.

        Raises `DataError` if a noise or impulse-response file can't be read.
        """
        settings, rng = self.settings, np.random.default_rng(key)
        # All draws come first: whether one change happens must not affect the next.
        order, which, at = rng.random(3), rng.random(2), rng.random()
        snr_db, gain = rng.uniform(*settings.noise_snr_db), rng.random()
        if settings.speeds:
            fitting = [speed for speed in settings.speeds if len(samples) / speed <= max_samples]
            if fitting:
                samples = change_speed(samples, fitting[int(order[0] * len(fitting))], max_samples)
        if self._responses and order[1] < settings.reverb_probability:
            samples = reverberate(samples, self._read(self._responses[int(which[0] * len(self._responses))]))
        if self._noise and order[2] < settings.noise_probability:
            samples = add_noise(samples, self._read(self._noise[int(which[1] * len(self._noise))]), snr_db, at)
        if settings.gain_db is not None:
            low, high = settings.gain_db
            samples = samples * np.float32(10 ** ((low + gain * (high - low)) / 20))
        return np.clip(samples, -1, 1, dtype=np.float32)

    def _read_file(self, path: str) -> np.ndarray:
        try:
            return read_audio(path, sample_rate=self.sample_rate)
        except AudioError as error:  # it must not be mistaken for a fault of the utterance
            raise DataError(
                f"{path}, named by augment, can't be read",
                why=error.why,
                remedy="correct augment.noise or augment.impulse_responses",
            ) from error


_KEPT = 256


def change_speed(samples: np.ndarray, speed: float, max_samples: int) -> np.ndarray:
    """(N,) → (about N/speed,) at most `max_samples`: tempo and pitch together (Ko et al., Interspeech 2015)."""
    if speed == 1:
        return samples
    import soxr

    return soxr.resample(samples, 1000 * speed, 1000, quality="MQ").astype(np.float32)[:max_samples]


def reverberate(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """(N,) → (N,): convolved with a room's impulse response, its direct sound in place, as loud as before."""
    from scipy.signal import fftconvolve

    direct = int(np.abs(response).argmax())
    wet = fftconvolve(samples, response)[direct : direct + len(samples)].astype(np.float32)
    return wet * np.float32(_rms(samples) / max(_rms(wet), 1e-8))


def add_noise(samples: np.ndarray, noise: np.ndarray, snr_db: float, at: float) -> np.ndarray:
    """(N,) → (N,): `noise` starting at fraction `at` of its length, wrapping around, `snr_db` below the speech."""
    start = int(at * len(noise))
    piece = np.take(noise, np.arange(start, start + len(samples)), mode="wrap")
    scale = _rms(samples) / max(_rms(piece), 1e-8) * 10 ** (-snr_db / 20)
    return samples + piece * np.float32(scale)


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
