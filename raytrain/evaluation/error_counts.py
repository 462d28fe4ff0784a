"""Word and character errors of texts by minimum edit distance: counts that add up over batches and ranks.

count_errors(["a b c"], ["a x"])        # ErrorCounts(substitutions=1, deletions=1, insertions=0, …)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jiwer import AlignmentChunk

SUBSTITUTIONS, DELETIONS, INSERTIONS, LENGTH = range(4)
_PAIRS_AT_A_TIME = 1000


@dataclass(frozen=True)
class ErrorCounts:
    """Word (or character) errors of utterances; `+` adds them."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_length: int = 0
    utterances: int = 0

    def __add__(self, more: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(*(a + b for a, b in zip(self.as_tuple(), more.as_tuple(), strict=True)))

    def as_tuple(self) -> tuple[int, int, int, int, int]:
        """The five counts in field order."""
        return (
            self.substitutions,
            self.deletions,
            self.insertions,
            self.reference_length,
            self.utterances,
        )

    @property
    def errors(self) -> int:
        """All errors."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float | None:
        """Errors over reference length, a fraction; None if no reference has words (characters)."""
        return self.errors / self.reference_length if self.reference_length else None


def count_errors(references: Sequence[str], hypotheses: Sequence[str], *, unit: str = "word") -> ErrorCounts:
    """The errors of all pairs; `unit` is `word` or `character`."""
    sums = edit_counts(references, hypotheses, unit=unit).sum(axis=0).tolist()
    substitutions, deletions, insertions, length = sums
    return ErrorCounts(substitutions, deletions, insertions, length, len(references))


def edit_counts(references: Sequence[str], hypotheses: Sequence[str], *, unit: str = "word") -> np.ndarray:
    """(N, 4) substitutions, deletions, insertions and reference length of each pair."""
    counts = np.zeros((len(references), 4), np.int64)
    column = {"substitute": SUBSTITUTIONS, "delete": DELETIONS, "insert": INSERTIONS}
    for row, (words, _, chunks) in zip(counts, alignments(references, hypotheses, unit=unit), strict=True):
        row[LENGTH] = len(words)
        for chunk in chunks:
            if chunk.type != "equal":
                size = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                row[column[chunk.type]] += size
    return counts


def alignments(
    references: Sequence[str], hypotheses: Sequence[str], *, unit: str = "word"
) -> Iterator[tuple[list[str], list[str], list[AlignmentChunk]]]:
    """For each pair, the reference's words, the hypothesis' words, and jiwer's chunks that align them by minimum edit
    distance; `unit` is `word` or `character`."""
    import jiwer

    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    for start in range(0, len(references), _PAIRS_AT_A_TIME):
        part = slice(start, start + _PAIRS_AT_A_TIME)
        output = process(list(references[part]), list(hypotheses[part]))
        yield from zip(output.references, output.hypotheses, output.alignments, strict=True)
