"""Copies of rows' audio as FLAC."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import soundfile

from raytrain.data.audio import PARQUET_ROW, AudioError, read_audio
from raytrain.data.audio.embedded import read_audio_bytes


def make_flacs(rows: pa.Table, sample_rate: int) -> list[bytes | AudioError]:
    """The rows' audio (`assignment.ROW_SCHEMA`) as mono 16-bit FLAC at `sample_rate`, or why it can't be read."""
    names = ("audio_path", "audio_start", "audio_size", "offset_ms", "duration_ms")
    columns = [rows[name].to_pylist() for name in names]
    embedded = _embedded(columns[0], columns[1], columns[2])
    made: list[bytes | AudioError] = []
    for path, start, size, offset_ms, duration_ms in zip(*columns, strict=True):
        try:
            samples = read_audio(
                path,
                start=start,
                size=size,
                data=embedded.get((path, start)),
                offset_ms=offset_ms,
                duration_ms=duration_ms,
                sample_rate=sample_rate,
            )
        except AudioError as error:
            made.append(error)
        else:
            made.append(encode_flac(samples, sample_rate))
    return made


def _embedded(paths: list[str], starts: list[int], sizes: list[int]) -> dict[tuple[str, int], bytes]:
    """The audio bytes of all rows in Parquet files, each file read once."""
    rows_of: dict[str, list[int]] = {}
    for path, start, size in zip(paths, starts, sizes, strict=True):
        if size == PARQUET_ROW:
            rows_of.setdefault(path, []).append(start)
    return {(path, row): data for path, rows in rows_of.items() for row, data in read_audio_bytes(path, rows).items()}


def encode_flac(samples: np.ndarray, sample_rate: int) -> bytes:
    """(num_samples,) float32 in [-1, 1] as 16-bit FLAC; exact for audio that was 16-bit."""
    # libsndfile's own conversion scales by 32767, which would change loud samples by one.
    whole = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)
    file = io.BytesIO()
    soundfile.write(file, whole, sample_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()
