"""The worst utterances of a test with their alignments, and the most frequent confusions: the content of `errors.html`.

The page has a bounded size for any size of test: each language gets its share, so that a language with few utterances
is not crowded out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from raytrain.evaluation.bleu import bleu_metric, chrf_metric
from raytrain.evaluation.error_counts import (
    DELETIONS,
    INSERTIONS,
    LENGTH,
    SUBSTITUTIONS,
    alignments,
    edit_counts,
)
from raytrain.evaluation.scoring import Texts, Utterance

if TYPE_CHECKING:
    from jiwer import AlignmentChunk
    from sacrebleu.metrics.bleu import BLEU

FEW_WORDS = 4  # with fewer, a single error dominates the rate
_SHOWN, _MOST_SHOWN = 60, 120
_CONFUSIONS, _MOST_CONFUSIONS = 30, 60
_LEAST_PER_LANGUAGE = 10
_MOST_COLUMNS = 120
_MOST_CHARACTERS = {"word": 40, "path": 300, "text": 1500}

Entry = TypeVar("Entry", bound=Hashable)
Column = tuple[str, str, str]  # kind of edit, word of the reference, word of the hypothesis
Confusion = tuple[str, str, str, int]  # language, word of the reference, word of the hypothesis, count


@dataclass(frozen=True)
class WorstTranscription:
    """An utterance with its errors. `columns` are its alignment, each of kind `equal`, `substitute`, `delete` or
    `insert`; `not_shown` counts the omitted columns."""

    lang: str
    duration_ms: int
    audio: str
    errors: int
    substitutions: int
    deletions: int
    insertions: int
    words: int
    wer: float | None
    columns: Sequence[Column]
    not_shown: int


@dataclass(frozen=True)
class WorstTranslation:
    """An utterance with its scores as a sentence, 0 to 100."""

    lang: str
    duration_ms: int
    audio: str
    text: str
    hypothesis: str
    chrf: float
    bleu: float


@dataclass(frozen=True)
class Worst:
    """The content of the page.

    `highest_rates` are of utterances with at least `few_words` words that are not among `most_errors`. `confusions` are
    by kind of error, most frequent first; `translations` by chrF. Words are normalized, if there is a normalizer.
    """

    utterances: int
    without_error: int
    few_words: int
    most_errors: Sequence[WorstTranscription]
    highest_rates: Sequence[WorstTranscription]
    confusions: Mapping[str, Sequence[Confusion]]
    translations: Sequence[WorstTranslation]


def worst(texts: Texts) -> Worst:
    """The worst of a test's texts."""
    references, hypotheses = texts.normalized or texts.raw
    counts = edit_counts(references, hypotheses)
    errors, lengths = counts[:, :LENGTH].sum(axis=1), counts[:, LENGTH]
    rates = errors / np.maximum(lengths, 1)
    languages = [utterance.language for utterance in texts.transcriptions]
    most = _worst_indices(languages, errors, rates)
    taken = np.zeros(len(errors), bool)
    taken[most] = True
    highest = _worst_indices(languages, np.where(taken | (lengths < FEW_WORDS), 0, rates), errors)

    def shown(indices: Sequence[int]) -> list[WorstTranscription]:
        return [_transcription(texts.transcriptions[i], references[i], hypotheses[i], counts[i]) for i in indices]

    return Worst(
        utterances=len(errors),
        without_error=int((errors == 0).sum()),
        few_words=FEW_WORDS,
        most_errors=shown(most),
        highest_rates=shown(highest),
        confusions=_confusions(languages, references, hypotheses),
        translations=_translations(texts.translations),
    )


def _fair_selection(
    entries: Iterable[Entry], language_of: Callable[[Entry], str], per_language: int, most: int
) -> list[Entry]:
    """The first entries in order, at most `per_language` of each language and `most` in all."""
    taken: Counter[str] = Counter()
    selection: list[Entry] = []
    for entry in entries:
        if taken[language_of(entry)] < per_language:
            taken[language_of(entry)] += 1
            selection.append(entry)
            if len(selection) == most:
                break
    return selection


def _share(number: int, num_languages: int) -> int:
    return max(_LEAST_PER_LANGUAGE, number // max(num_languages, 1))


def _worst_indices(languages: Sequence[str], badness: np.ndarray, second: np.ndarray) -> list[int]:
    """Indices of the worst utterances, worst first: each language's share of those whose badness is above 0. Ties are
    broken by `second`, then by order."""
    order = np.lexsort((-second, -badness))[: np.count_nonzero(badness > 0)]
    share = _share(_SHOWN, len(set(languages)))
    return _fair_selection(order.tolist(), lambda index: languages[index], share, _MOST_SHOWN)


def _transcription(utterance: Utterance, reference: str, hypothesis: str, counts: np.ndarray) -> WorstTranscription:
    columns = list(_columns(*next(alignments([reference], [hypothesis]))))
    errors, words = int(counts[:LENGTH].sum()), int(counts[LENGTH])
    return WorstTranscription(
        lang=utterance.language,
        duration_ms=utterance.duration_ms,
        audio=_cut_path(utterance.audio),
        errors=errors,
        substitutions=int(counts[SUBSTITUTIONS]),
        deletions=int(counts[DELETIONS]),
        insertions=int(counts[INSERTIONS]),
        words=words,
        wer=errors / words if words else None,
        columns=[(kind, _cut(old, "word"), _cut(new, "word")) for kind, old, new in columns[:_MOST_COLUMNS]],
        not_shown=max(0, len(columns) - _MOST_COLUMNS),
    )


def _cut_path(path: str) -> str:
    most = _MOST_CHARACTERS["path"]
    return path if len(path) <= most else f"…{path[-most:]}"  # the end identifies the recording


def _cut(text: str, kind: str) -> str:
    most = _MOST_CHARACTERS[kind]
    return text if len(text) <= most else f"{text[:most]}…"


def _columns(reference: list[str], hypothesis: list[str], chunks: list[AlignmentChunk]) -> Iterator[Column]:
    """The columns of an alignment; a missing word is empty."""
    for chunk in chunks:
        old = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        new = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for pair in zip_longest(old, new, fillvalue=""):
            yield (chunk.type, *pair)


def _confusions(
    languages: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]
) -> dict[str, list[Confusion]]:
    counts: dict[str, Counter[tuple[str, str, str]]] = {
        "substitute": Counter(),
        "delete": Counter(),
        "insert": Counter(),
    }
    for language, aligned in zip(languages, alignments(references, hypotheses), strict=True):
        for kind, old, new in _columns(*aligned):
            if kind != "equal":
                counts[kind][language, old, new] += 1
    return {kind: _most_frequent(counter, len(set(languages))) for kind, counter in counts.items()}


def _most_frequent(counts: Counter[tuple[str, str, str]], num_languages: int) -> list[Confusion]:
    order = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    share = _share(_CONFUSIONS, num_languages)
    return [
        (language, _cut(old, "word"), _cut(new, "word"), number)
        for (language, old, new), number in _fair_selection(order, _language, share, _MOST_CONFUSIONS)
    ]


def _language(confusion: tuple[tuple[str, str, str], int]) -> str:
    return confusion[0][0]


def _translations(utterances: Sequence[Utterance]) -> list[WorstTranslation]:
    """The translations with the lowest chrF, with sentence BLEU."""
    if not utterances:
        return []
    chrf = chrf_metric()
    scores = np.array(
        [chrf.sentence_score(utterance.hypothesis, [utterance.reference]).score for utterance in utterances]
    )
    languages = [utterance.language for utterance in utterances]
    bleu = {language: bleu_metric(language, sentences=True) for language in set(languages)}
    indices = _worst_indices(languages, 100 - scores, np.zeros(len(utterances)))
    return [_translation(utterances[i], float(scores[i]), bleu[languages[i]]) for i in indices]


def _translation(utterance: Utterance, chrf: float, bleu: BLEU) -> WorstTranslation:
    return WorstTranslation(
        lang=utterance.language,
        duration_ms=utterance.duration_ms,
        audio=_cut_path(utterance.audio),
        text=_cut(utterance.reference, "text"),
        hypothesis=_cut(utterance.hypothesis, "text"),
        chrf=chrf,
        bleu=bleu.sentence_score(utterance.hypothesis, [utterance.reference]).score,
    )
