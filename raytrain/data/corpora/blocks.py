"""Blocks: usable rows of a chunk by columns, a few thousand at a time, and the bad rows among them."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from raytrain.data.corpora.types import TAR_FORMATS, BadRow, Chunk, Utterance
from raytrain.data.text.slots import PromptKey
from raytrain.storage.locations import is_uri, parent

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Block:
    """Usable rows of a chunk by columns, and the unusable ones among them.

    `numbers`: (N,) lines in the file; `paths`: N audio names as the rows give them; `texts`: N unmodified texts;
    `duration_ms`, `offset_ms`: (N,) int64; row i has the prompt `prompts[prompt_of[i]]`. `num_lines` counts all lines,
    blank ones too.
    """

    chunk: Chunk
    numbers: np.ndarray
    paths: list[str]
    texts: list[str]
    duration_ms: np.ndarray
    offset_ms: np.ndarray
    prompts: list[PromptKey]
    prompt_of: np.ndarray
    bad: list[BadRow] = field(default_factory=list)
    num_lines: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, kept: np.ndarray) -> Block:
        """The rows where the (N,) mask is true; `bad` is unchanged."""
        if kept.all():
            return self
        index = np.flatnonzero(kept)
        return Block(
            self.chunk,
            self.numbers[index],
            [self.paths[i] for i in index],
            [self.texts[i] for i in index],
            self.duration_ms[index],
            self.offset_ms[index],
            self.prompts,
            self.prompt_of[index],
            self.bad,
            self.num_lines,
        )

    def without(self, rows: np.ndarray, bad: Sequence[BadRow]) -> Block:
        """The block without the rows where the (N,) mask is true, which are `bad`."""
        kept = self.select(~rows)
        kept.bad = sorted([*self.bad, *bad], key=lambda row: row.line)
        return kept

    def by_prompt(self, keys: Sequence[Key]) -> Iterator[tuple[Key, np.ndarray]]:
        """Each of the `keys`, where keys[i] is prompt i's, and the (N,) mask of the rows with it."""
        for key in dict.fromkeys(keys):
            yield key, np.array([mine == key for mine in keys], bool)[self.prompt_of]

    def utterances(self) -> Iterator[Utterance]:
        """The rows one by one."""
        recordings = zip(*locate_audio(self.chunk, self.paths), strict=True)
        times = zip(self.duration_ms.tolist(), self.offset_ms.tolist(), strict=True)
        rows = zip(recordings, times, self.texts, self.prompt_of.tolist(), strict=True)
        for (path, member), (duration, offset), text, number in rows:
            source, target, pnc, slots = self.prompts[number]
            yield Utterance(path, offset, duration, " ".join(text.split()), source, target, pnc, slots, member)


def locate_audio(chunk: Chunk, paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """(absolute path or URI, member) of each audio; see `Utterance`."""
    if chunk.format in TAR_FORMATS:
        return [chunk.audio] * len(paths), list(paths)
    folder = (chunk.audio or parent(chunk.path)).rstrip("/") + "/"
    files = [path if path[0] == "/" or is_uri(path) else _below(folder, path) for path in paths]
    if chunk.format != "parquet":
        return files, [""] * len(paths)
    # A number is a row of embedded audio.
    members = [path if path.isdecimal() else "" for path in paths]
    return [chunk.path if member else file for file, member in zip(files, members, strict=True)], members


def _below(folder: str, path: str) -> str:
    if path[0] == "~":
        path = os.path.expanduser(path)
        if path[0] == "/":
            return path
    return folder + path
