"""A check of the audio before anything is trained on it: whether files exist, and what a sample's headers say.

A manifest is only as good as its audio. Every row whose local file is missing is identified for the cost of listing its
folder. For a sample of rows the headers are read, which reveals recordings that can't be decoded and wrong durations,
as when a manifest is paired with the audio of another corpus.
"""

from __future__ import annotations

import math
import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from raytrain.data.audio import read_header
from raytrain.data.corpora.blocks import Block, locate_audio
from raytrain.data.corpora.rejected import RejectedExamples
from raytrain.data.corpora.types import TAR_FORMATS, BadRow, Chunk, Problem
from raytrain.data.locator import AudioLocator
from raytrain.errors import DataError
from raytrain.storage.locations import StorageReadError, is_uri

REASONS = ("missing_audio", "unreadable_audio", "short_audio")
MISSING, UNREADABLE, SHORT = REASONS
_NO_FILE = "there is no file "
TOLERANCE = 0.1  # fraction of a row's duration that its audio may lack
_LIST_FROM = 16  # with this many rows in a folder, listing costs less than checking each
_MAX_NAMES = 4_000_000
_MAX_CHUNKS = 64  # per corpus, whose rows are sampled
_MAX_REMOTE_TARS = 2  # whose headers require reading the whole tar


class AudioListing:
    """Which local audio files exist; each folder is listed once. Unless it `is_on`, all files count as existing."""

    def __init__(self, is_on: bool = True) -> None:
        self._is_on = is_on
        self._folders: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._num_names = 0

    def check(self, block: Block) -> Block:
        """The block without the rows whose file is missing; those are added to its bad rows. Audio in a tar, in Parquet
        or at a URI is not checked."""
        if not self._is_on or block.chunk.format in TAR_FORMATS or not len(block):
            return block
        files, members = locate_audio(block.chunk, block.paths)
        missing = self._missing(files, members)
        if not missing.any():
            return block
        bad = [
            BadRow(block.chunk.path, int(block.numbers[row]), MISSING, f"{_NO_FILE}{files[row]}")
            for row in np.flatnonzero(missing).tolist()
        ]
        return block.without(missing, bad)

    def _missing(self, files: Sequence[str], members: Sequence[str]) -> np.ndarray:
        split = [file.rpartition("/") for file in files]
        names = {
            folder: None if is_uri(f"{folder}/") else self._names(folder) if rows >= _LIST_FROM else ()
            for folder, rows in Counter(folder for folder, _, _ in split).items()
        }
        absent = [
            row
            for row, (folder, _, name) in enumerate(split)
            if (listed := names[folder]) is not None and name not in listed and not members[row]
        ]
        missing = np.zeros(len(split), bool)
        # Few remain: those in unlisted folders, those without a folder, and files created after the listing.
        missing[[row for row in absent if not os.path.isfile(files[row])]] = True
        return missing

    def _names(self, folder: str) -> frozenset[str]:
        if folder in self._folders:
            self._folders.move_to_end(folder)
            return self._folders[folder]
        try:
            with os.scandir(folder or "/") as entries:
                # The type of an entry is free; only following a link costs something.
                names = frozenset(entry.name for entry in entries if entry.is_file())
        except OSError:
            names = frozenset()
        self._folders[folder], self._num_names = names, self._num_names + len(names)
        while self._num_names > _MAX_NAMES and len(self._folders) > 1:
            self._num_names -= len(self._folders.popitem(last=False)[1])
        return names


NO_LISTING = AudioListing(is_on=False)


def came_back(rejected_examples: Sequence[RejectedExamples]) -> bool:
    """Whether a file exists now whose absence got a row rejected. `rejected_examples` are those of `statistics.json` or
    of an assignment's index; only the few files that they name are checked."""
    return any(
        os.path.isfile(row.detail.removeprefix(_NO_FILE))
        for example in rejected_examples
        if example.reason == MISSING
        for row in example.first
    )


class _Candidate(NamedTuple):
    """A candidate row for the sample; those with the smallest keys are chosen."""

    key: int
    line: int
    path: str
    offset_ms: int
    duration_ms: int


@dataclass
class ProbeCounts:
    """Results of reading headers: rows `probed` by corpus, the number contradicted by (corpus, reason) in `wrong`, and
    each contradicted row in `examples`."""

    probed: Counter[str] = field(default_factory=Counter)
    wrong: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: list[BadRow] = field(default_factory=list)


class HeaderSample:
    """A sample of `size` rows of one chunk; headers are read when all rows have been seen.

    The choice depends on line numbers alone, so the sample is the same in every run.
    """

    def __init__(self, chunk: Chunk, size: int) -> None:
        self._chunk, self._size = chunk, size
        self._candidates: list[_Candidate] = []

    def add(self, block: Block) -> None:
        """Take the block's rows into account."""
        if not self._size or not len(block):
            return
        keys = (block.numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(20)
        chosen = np.argsort(keys, kind="stable")[: self._size].tolist()
        self._candidates += [
            _Candidate(
                int(keys[row]),
                int(block.numbers[row]),
                block.paths[row],
                int(block.offset_ms[row]),
                int(block.duration_ms[row]),
            )
            for row in chosen
        ]
        self._candidates = sorted(self._candidates)[: self._size]

    def read(self) -> ProbeCounts:
        """Read the sample's headers."""
        counts = ProbeCounts()
        for candidate, problem in zip(self._candidates, self._problems(), strict=True):
            counts.probed[self._chunk.corpus] += 1
            if problem is not None:
                reason, detail = problem
                counts.wrong[self._chunk.corpus, reason] += 1
                counts.examples.append(BadRow(self._chunk.path, candidate.line, reason, detail))
        return counts

    def _problems(self) -> list[Problem | None]:
        try:
            located = AudioLocator(self._chunk).locate([candidate.path for candidate in self._candidates])
        except StorageReadError as error:
            return [(UNREADABLE, str(error))] * len(self._candidates)
        return [
            (UNREADABLE, absent) if absent else _problem(candidate, path, start, size)
            for candidate, path, start, size, absent in zip(self._candidates, *located, strict=True)
        ]


def _problem(candidate: _Candidate, path: str, start: int, size: int) -> Problem | None:
    try:
        header = read_header(path, start=start, size=size)
    except DataError as error:
        return UNREADABLE, str(error)
    left_ms = header.duration_ms - candidate.offset_ms
    if left_ms >= (1 - TOLERANCE) * candidate.duration_ms:
        return None
    after = f" after {candidate.offset_ms / 1000:g} s" if candidate.offset_ms else ""
    claimed = f"{candidate.duration_ms / 1000:g} s"
    return SHORT, f"{path} has {max(0, left_ms) / 1000:g} s{after}, the row says {claimed}"


def least_share(wrong: int, probed: int, rows: int) -> float:
    """The lowest plausible share of wrong rows if `wrong` of `probed` are wrong: the share itself if all `rows` were
    probed, else the lower end of Wilson's interval (1927) at two standard deviations."""
    if probed >= rows:
        return wrong / probed
    share, deviations = wrong / probed, 2.0
    spread = deviations * math.sqrt(share * (1 - share) / probed + (deviations / (2 * probed)) ** 2)
    return max(0.0, (share + deviations**2 / (2 * probed) - spread) / (1 + deviations**2 / probed))


def plan_samples(chunks: Sequence[Chunk], size: int) -> dict[int, int]:
    """Rows to sample of each chunk, by its index, so that every corpus contributes `size` rows if it has that many."""
    by_corpus: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        by_corpus.setdefault(chunk.corpus, []).append(chunk)
    sizes: dict[int, int] = {}
    for members in by_corpus.values():
        remote_tars = members[0].format in TAR_FORMATS and is_uri(members[0].audio)
        most = min(len(members), _MAX_REMOTE_TARS if remote_tars else _MAX_CHUNKS, size)
        for number in range(most):
            sizes[members[number * len(members) // most].index] = -(-size // most)
    return sizes
