"""Locations of the audio of a chunk's rows: files, ranges of tars, rows of Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from raytrain.data.audio import PARQUET_ROW
from raytrain.data.corpora.blocks import locate_audio
from raytrain.data.corpora.tar_index import TarIndex
from raytrain.data.corpora.types import Chunk


class AudioLocations(NamedTuple):
    """Path, first byte and size of each recording as in `assignment.Row`, and its problem, None if there is none."""

    paths: list[str]
    starts: list[int]
    sizes: list[int]
    problems: list[str | None]


class Locator(Protocol):
    """Locates recordings by the names that rows of a chunk give them."""

    def locate(self, paths: Sequence[str]) -> AudioLocations:
        """The recordings' locations."""
        ...


class AudioLocator:
    """Locates the bytes of one chunk's recordings; a tar's headers are read when first needed, and `sampled` as
    `TarIndex` says."""

    def __init__(self, chunk: Chunk, *, sampled: bool = False) -> None:
        self._chunk, self._sampled = chunk, sampled
        self._tars: dict[str, TarIndex] = {}

    def locate(self, paths: Sequence[str]) -> AudioLocations:
        """The recordings' locations. Raises `StorageReadError` for a tar that can't be read."""
        files, members = locate_audio(self._chunk, paths)
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
            span = self._tars[file].find(member)
            if span is None:
                problems[index] = f"{file} has no member {member}"
            else:
                starts[index], sizes[index] = span
        return AudioLocations(files, starts, sizes, problems)

    @property
    def sample_ids(self) -> dict[str, str]:
        """The `sample_id` of each tar that was read."""
        return {path: index.sample_id for path, index in self._tars.items()}


class WholeFileLocator:
    """Locates only the files, for tars whose headers should not be read yet."""

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk

    def locate(self, paths: Sequence[str]) -> AudioLocations:
        """The recordings' files, tars as a whole."""
        files, _ = locate_audio(self._chunk, paths)
        return AudioLocations(files, [0] * len(files), [0] * len(files), [None] * len(files))
