"""Where the audio of rows lies, and copies of it as FLAC."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from raytrain.data.audio import PARQUET_ROW, AudioError, read_audio
from raytrain.data.corpora.rows import audio_places
from raytrain.data.corpora.tarred import TarIndex
from raytrain.data.corpora.types import Chunk


class AudioFinder:
    """Finds the bytes of one chunk's recordings; a tar's headers are read when first asked for, and `sampled` as
    `TarIndex` says."""

    def __init__(self, chunk: Chunk, *, sampled: bool = False) -> None:
        self._chunk, self._sampled = chunk, sampled
        self._tars: dict[str, TarIndex] = {}

    def places(self, paths: Sequence[str]) -> tuple[list[str], list[int], list[int], list[str | None]]:
        """Path, first byte and size of each audio as `assignment.Row` has them, and what is wrong, None if nothing.

        Raises `StorageReadError` for a tar that can't be read.
        """
        files, members = audio_places(self._chunk, paths)
        starts, sizes = [0] * len(files), [0] * len(files)
        problems: list[str | None] = [None] * len(files)
        for index, (file, member) in enumerate(zip(files, members, strict=True)):
            if not member:
                continue
            if self._chunk.format == "parquet":
                starts[index], sizes[index] = int(member), PARQUET_ROW
                continue
            if file not in self._tars:
                self._tars[file] = TarIndex(file, sampled=self._sampled)
            found = self._tars[file].find(member)
            if found is None:
                problems[index] = f"{file} has no member {member}"
            else:
                starts[index], sizes[index] = found
        return files, starts, sizes, problems

    @property
    def sample_ids(self) -> dict[str, str]:
        """The `sample_id` of each tar that was looked at."""
        return {path: index.sample_id for path, index in self._tars.items()}


def make_flacs(rows: pa.Table, sample_rate: int) -> list[bytes | AudioError]:
    """The rows' audio (`assignment.ROW_SCHEMA`) as mono 16-bit FLAC at `sample_rate`, or why there is none."""
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
    """The bytes of all rows that lie in Parquet, each file read once."""
    from raytrain.data.corpora.parquet import read_audio_bytes

    rows_of: dict[str, list[int]] = {}
    for path, start, size in zip(paths, starts, sizes, strict=True):
        if size == PARQUET_ROW:
            rows_of.setdefault(path, []).append(start)
    return {(path, row): data for path, rows in rows_of.items() for row, data in read_audio_bytes(path, rows).items()}


def encode_flac(samples: np.ndarray, sample_rate: int) -> bytes:
    """(num_samples,) float32 in [-1, 1] as 16-bit FLAC; exact for what came from 16 bits."""
    import soundfile

    # libsndfile's own conversion scales by 32767, which would change loud samples by one.
    whole = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)
    file = io.BytesIO()
    soundfile.write(file, whole, sample_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()
