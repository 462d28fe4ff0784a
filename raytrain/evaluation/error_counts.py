"""Scores of texts: word error rates, whose counts add up over batches and ranks, and BLEU for translations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from raytrain.evaluation.normalize import WITHOUT_SPACES, base_language


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
    def rate(self) -> float | None:
        """Errors over reference length, a fraction; None where no reference has words (characters)."""
        return self.errors / self.reference_length if self.reference_length else None


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


def are_enough_readable(unreadable: int, rows: int, limit: float) -> bool:
    """Whether a score of the readable ones is that of all `rows`: there are any, and no more than the share `limit` of
    all is `unreadable`."""
    return unreadable < rows and unreadable <= limit * rows


class Decoded(NamedTuple):
    """One utterance with what was decoded. `language` is that of the text; `translated` where speech has another.
    Both texts are as `CanaryTokenizer.normalize` leaves them."""

    language: str
    corpus: str
    translated: bool
    reference: str
    hypothesis: str


# Texts without spaces are a single long word to sacrebleu's usual tokenizer.
_BLEU_TOKENIZERS = {**dict.fromkeys((*WITHOUT_SPACES, "ko"), "char"), "zh": "zh", "yue": "zh"}


def bleu_metric(language: str, *, sentences: bool = False) -> Any:
    """sacrebleu's BLEU with its tokenizer for texts of a language; for `sentences` that may lack long n-grams."""
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=_BLEU_TOKENIZERS.get(base_language(language), "13a"), effective_order=sentences)


def bleu(items: Sequence[Decoded]) -> float | None:
    """Corpus BLEU of translations into one language, 0 to 100; None where no reference has a text."""
    if not any(one.reference for one in items):
        return None
    metric = bleu_metric(items[0].language)
    return metric.corpus_score([one.hypothesis for one in items], [[one.reference for one in items]]).score


def score_decoded(items: Sequence[Decoded]) -> dict[str, float]:
    """What validation reports.

    `wer` of transcriptions (a fraction) and `bleu` of translations (0 to 100, the mean over target languages), each
    where there are any; the same as `wer_LANGUAGE`, `wer_CORPUS`, `bleu_LANGUAGE` and `bleu_CORPUS` where there are
    several. `error` is what checkpoints are compared by: WER and 1 − BLEU / 100, weighted by their references.
    What has no reference to be compared with has no score, and without any score there is no `error`.
    """
    heard = [one for one in items if not one.translated]
    translated = [one for one in items if one.translated]
    found: dict[str, float] = {}
    found |= _by_group("wer", heard, _wer, _wer)
    found |= _by_group("bleu", translated, bleu, _mean_bleu)
    errors = [(found["wer"], _num_compared(heard))] if "wer" in found else []
    errors += [(1 - found["bleu"] / 100, _num_compared(translated))] if "bleu" in found else []
    if not errors:
        return {}
    return {**found, "error": sum(error * number for error, number in errors) / sum(number for _, number in errors)}


def _by_group(
    name: str,
    items: Sequence[Decoded],
    score: Callable[[Sequence[Decoded]], float | None],
    total: Callable[[Sequence[Decoded]], float | None],
) -> dict[str, float]:
    if not items:
        return {}
    found = {name: total(items)}
    for field, one_score in (("language", score), ("corpus", total)):
        groups = sorted({getattr(one, field) for one in items})
        if len(groups) > 1:
            found |= {
                f"{name}_{group}": one_score([one for one in items if getattr(one, field) == group]) for group in groups
            }
    return {group: value for group, value in found.items() if value is not None}


def _wer(items: Sequence[Decoded]) -> float | None:
    return count_errors([one.reference for one in items], [one.hypothesis for one in items]).rate


def _mean_bleu(items: Sequence[Decoded]) -> float | None:
    languages = sorted({one.language for one in items})
    found = [bleu([one for one in items if one.language == language]) for language in languages]
    scores = [score for score in found if score is not None]
    return sum(scores) / len(scores) if scores else None


def _num_compared(items: Sequence[Decoded]) -> int:
    return sum(bool(one.reference) for one in items)
