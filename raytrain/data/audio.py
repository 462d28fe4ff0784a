"""Read audio: any libsndfile format, a span of it, mono, at the model's sample rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raytrain.errors import DataError


class AudioError(DataError):
    """A recording is missing, broken, or too short for its manifest row."""


def read_audio(path: str, *, offset_ms: int = 0, duration_ms: int | None = None, sample_rate: int) -> np.ndarray:
    """Samples of one utterance: (num_samples,) float32 in [-1, 1], mono, at `sample_rate` Hz.

    Raises `AudioError` where the file can't be opened, decoded, or has no samples in the span.
    """
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            if offset_ms:
                file.seek(offset_ms * rate // 1000)
            # Durations are rounded up to whole milliseconds; reading past the end gives what is there.
            frames = -1 if duration_ms is None else -(-duration_ms * rate // 1000)
            samples = file.read(frames, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        # libsndfile calls a missing file a system error.
        why = str(error) if Path(path).is_file() else "there is no such file"
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
