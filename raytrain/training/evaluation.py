"""Word error rates from texts: counts that add up over batches, ranks and languages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ErrorCounts:
    """Word (or character) errors of some utterances; `+` adds them."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_length: int = 0
    utterances: int = 0

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(*(a + b for a, b in zip(self.as_tuple(), other.as_tuple(), strict=True)))

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
    def rate(self) -> float:
        """Errors over reference length, a fraction; 0 where there is no reference."""
        return self.errors / self.reference_length if self.reference_length else 0.0


def count_errors(references: Iterable[str], hypotheses: Iterable[str], *, unit: str = "word") -> ErrorCounts:
    """Minimum edit distance of each pair, counted with jiwer; `unit` is `word` or `character`."""
    import jiwer

    total = ErrorCounts()
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        found = process(reference, hypothesis)
        length = found.hits + found.substitutions + found.deletions
        total += ErrorCounts(found.substitutions, found.deletions, found.insertions, length, 1)
    return total
