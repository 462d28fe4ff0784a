"""The counts of a corpus: lengths, rows, rejected rows, unknown pieces, and contradictions in a sample of headers.

A worker turns a chunk into `Counts`; partial counts merge in any order, and their sum does not grow with the corpus
except for one line count per chunk.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from raytrain.data.corpora.blocks import Block
from raytrain.data.corpora.reading import read_blocks
from raytrain.data.corpora.rejected import RejectedRows
from raytrain.data.corpora.types import Chunk
from raytrain.data.probe import NO_LISTING, AudioListing, HeaderSample, ProbeCounts
from raytrain.data.sequences import BlockEncoder
from raytrain.lengths.histogram import LengthHistogram

_MERGE_AT = 1 << 18  # rows or cells that are buffered before a merge

Group = tuple[str, str, str]  # corpus, source language, target language
TextGroup = tuple[str, str]  # corpus, language of the texts


class HistogramSum:
    """A running sum: small histograms are buffered and merged together, since a merge costs as much as the large one
    holds."""

    def __init__(self) -> None:
        self._waiting: list[LengthHistogram] = []
        self._cells = 0

    def add(self, histogram: LengthHistogram) -> None:
        """Count another histogram."""
        self._waiting.append(histogram)
        self._cells += len(histogram.cells)
        if self._cells > 2 * max(_MERGE_AT, len(self._waiting[0].cells)):
            self.total()

    def total(self) -> LengthHistogram:
        """The sum of all that were added."""
        if len(self._waiting) != 1:
            self._waiting = [LengthHistogram.sum(self._waiting)]
        self._cells = len(self._waiting[0].cells)
        return self._waiting[0]


@dataclass
class Counts:
    """The counts of one worker, or of all. `add` merges a partial count into this.

    `num_rows` counts by corpus, and `lines` is the number of lines that begin in each chunk. `text_tokens` counts the
    tokens of texts without prompts and ends, `unknown` those that replace `characters` which the tokenizer can't
    encode. `probed` counts by corpus the rows whose headers were read, and `contradicted` has the rows that they
    contradict.
    """

    groups: dict[Group, HistogramSum] = field(default_factory=dict)
    prompt_tokens: int = 0
    rejected: RejectedRows = field(default_factory=RejectedRows)
    num_rows: Counter[str] = field(default_factory=Counter)
    lines: dict[int, int] = field(default_factory=dict)
    text_tokens: Counter[TextGroup] = field(default_factory=Counter)
    unknown: Counter[TextGroup] = field(default_factory=Counter)
    characters: dict[TextGroup, Counter[str]] = field(default_factory=dict)
    probed: Counter[str] = field(default_factory=Counter)
    contradicted: RejectedRows = field(default_factory=RejectedRows)

    def add(self, partial: Counts) -> None:
        """Merge; in any order, with the same result."""
        for group, histogram in partial.groups.items():
            self.groups.setdefault(group, HistogramSum()).add(histogram.total())
        self.prompt_tokens += partial.prompt_tokens
        self.rejected.merge(partial.rejected)
        self.contradicted.merge(partial.contradicted)
        self.probed.update(partial.probed)
        self.num_rows.update(partial.num_rows)
        self.lines.update(partial.lines)
        self.text_tokens.update(partial.text_tokens)
        self.unknown.update(partial.unknown)
        for texts, characters in partial.characters.items():
            self.characters.setdefault(texts, Counter()).update(characters)

    def count_rows(self, chunk: Chunk, block: Block) -> None:
        """Count a block's rows and lines, and note the unusable ones."""
        self.num_rows[chunk.corpus] += len(block) + len(block.bad)
        self.lines[chunk.index] = self.lines.get(chunk.index, 0) + block.num_lines
        for row in block.bad:
            self.rejected.add(chunk.corpus, row, chunk.index)

    def add_probes(self, chunk: Chunk, probes: ProbeCounts) -> None:
        """Count the result of reading a chunk's sample of headers."""
        self.probed.update(probes.probed)
        for row in sorted(probes.examples, key=lambda row: row.line):
            self.contradicted.add(chunk.corpus, row, chunk.index)

    def count_texts(self, block: Block, tokens: np.ndarray, unknown: np.ndarray, encoder: BlockEncoder) -> None:
        """Count the (N,) tokens of a block's texts and how many of them are unknown."""
        for language, rows in block.by_prompt([key.target_lang for key in block.prompts]):
            group = (block.chunk.corpus, language)
            self.text_tokens[group] += int(tokens[rows].sum())
            for row in np.flatnonzero(rows & (unknown > 0)).tolist():
                self.unknown[group] += int(unknown[row])
                characters = encoder.unwritable(block.texts[row], language)
                self.characters.setdefault(group, Counter()).update(characters)

    @property
    def histogram(self) -> LengthHistogram:
        """All groups together."""
        return LengthHistogram.sum([histogram.total() for histogram in self.groups.values()])

    @property
    def num_usable(self) -> int:
        """Rows whose lengths were counted."""
        return sum(histogram.total().total for histogram in self.groups.values())


class _WaitingLengths:
    """Lengths of a chunk's rows by group, which become histograms many at a time."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._parts: dict[Group, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._num_rows = 0

    def add(self, block: Block, lengths: np.ndarray) -> None:
        """Count the (N,) lengths in tokens of a block's rows, at the latest with `merge`."""
        groups = [(block.chunk.corpus, key.source_lang, key.target_lang) for key in block.prompts]
        for group, rows in block.by_prompt(groups):
            if rows.any():
                self._parts.setdefault(group, []).append((block.duration_ms[rows], lengths[rows]))
        self._num_rows += len(block)
        if self._num_rows > _MERGE_AT:
            self.merge()

    def merge(self) -> None:
        """Count the buffered lengths."""
        for group, parts in self._parts.items():
            durations, tokens = (np.concatenate(columns) for columns in zip(*parts, strict=True))
            histogram = LengthHistogram.from_lengths(durations, tokens)
            self._counts.groups.setdefault(group, HistogramSum()).add(histogram)
        self._parts.clear()
        self._num_rows = 0


def count_chunk(
    chunk: Chunk, encoder: BlockEncoder, listing: AudioListing = NO_LISTING, sample_size: int = 0
) -> Counts:
    """Count one chunk; runs on a worker. Line numbers count from the chunk's first line.

    Rows whose audio file `listing` misses are bad rows. The headers of `sample_size` rows are read.
    """
    counts, sample = Counts(), HeaderSample(chunk, sample_size)
    waiting = _WaitingLengths(counts)
    # Relative: only the driver knows how many lines come before the chunk.
    for raw in read_blocks(replace(chunk, first_line=1)):
        block = listing.check(encoder.check(raw))
        sample.add(block)
        lengths, prompts, unknown = encoder.count_unknown(block)
        counts.count_texts(block, lengths - prompts - 1, unknown, encoder)
        counts.prompt_tokens += int(prompts.sum())
        counts.count_rows(chunk, block)
        waiting.add(block, lengths)
    waiting.merge()
    counts.add_probes(chunk, sample.read())
    return counts


def number_lines(counts: Counts, chunks: list[Chunk]) -> list[Chunk]:
    """The chunks with their `first_line`, and the examples of bad rows numbered from the start of their file."""
    numbered = []
    path, first = "", 1
    for chunk in chunks:
        if chunk.first_line:  # known since planning: whole files, rows of Parquet
            path, first = chunk.path, chunk.first_line
        elif chunk.path != path:
            path, first = chunk.path, 1
        numbered.append(replace(chunk, first_line=first))
        first += counts.lines.get(chunk.index, 0)
    first_lines = [chunk.first_line for chunk in numbered]
    for rows in (counts.rejected, counts.contradicted):
        rows.number_lines(first_lines)
    return numbered
