"""The worst utterances of a test with their alignments, and what is confused most often: what `errors.html` shows.

Everything here is bounded, whatever the size of the test: each language gets its share of the places, so that a
language with few utterances is seen beside one with many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from raytrain.evaluation.error_counts import bleu_metric
from raytrain.evaluation.scoring import (
    DELETIONS,
    INSERTIONS,
    LENGTH,
    SUBSTITUTIONS,
    Result,
    Texts,
    alignments,
    edit_counts,
    reference_of,
)

FEW_WORDS = 4  # below that, one error makes a rate that says little
_PLACES, _MOST_PLACES = 60, 120
_CONFUSIONS, _MOST_CONFUSIONS = 30, 60
_PLACES_PER_LANGUAGE = 10
_MOST_COLUMNS = 120
_MOST_CHARACTERS = {"word": 40, "path": 300, "text": 1500}


def worst(texts: Texts) -> dict[str, Any]:
    """Plain values for the page.

    `most_errors`, and `highest_rates` of those with at least `FEW_WORDS` words that are not among them: utterances with
    `columns` of (kind, word said, word transcribed), kind being `equal`, `substitute`, `delete` or `insert`, and how
    many columns did `not_shown`. `confusions`: for each kind of error, (language, said, transcribed, count), most
    frequent first. `translations`: utterances by chrF. Words are those that the normaliser left, where there is one.
    """
    references, hypotheses = texts.normalized or texts.raw
    counts = edit_counts(references, hypotheses)
    errors, lengths = counts[:, :LENGTH].sum(axis=1), counts[:, LENGTH]
    rates = errors / np.maximum(lengths, 1)
    languages = [item["lang"] for item in texts.heard]
    most = _places(languages, errors, rates)
    taken = np.zeros(len(errors), bool)
    taken[most] = True
    highest = _places(languages, np.where(taken | (lengths < FEW_WORDS), 0, rates), errors)

    def shown(chosen: Sequence[int]) -> list[dict[str, Any]]:
        return [_utterance(texts.heard[one], references[one], hypotheses[one], counts[one]) for one in chosen]

    return {
        "utterances": len(errors),
        "without_error": int((errors == 0).sum()),
        "few_words": FEW_WORDS,
        "most_errors": shown(most),
        "highest_rates": shown(highest),
        "confusions": _confusions(languages, references, hypotheses),
        "translations": _translations(texts.translated),
    }


def _share(places: int, num_languages: int) -> int:
    return max(_PLACES_PER_LANGUAGE, places // max(num_languages, 1))


def _places(languages: Sequence[str], badness: np.ndarray, second: np.ndarray) -> list[int]:
    """Numbers of the worst utterances, worst first: each language's share of those whose badness is above 0. Equally
    bad ones go by `second`, then by their order."""
    order = np.lexsort((-second, -badness))
    share, taken, places = _share(_PLACES, len(set(languages))), Counter(), []
    for number in (int(one) for one in order[: np.count_nonzero(badness > 0)]):
        if taken[languages[number]] < share:
            taken[languages[number]] += 1
            places.append(number)
            if len(places) == _MOST_PLACES:
                break
    return places


def _utterance(item: Result, reference: str, hypothesis: str, counts: np.ndarray) -> dict[str, Any]:
    columns = list(_columns(*next(alignments([reference], [hypothesis]))))
    errors, words = int(counts[:LENGTH].sum()), int(counts[LENGTH])
    return {
        **_recording(item),
        "errors": errors,
        "substitutions": int(counts[SUBSTITUTIONS]),
        "deletions": int(counts[DELETIONS]),
        "insertions": int(counts[INSERTIONS]),
        "words": words,
        "wer": errors / words if words else None,
        "columns": [(kind, _cut(said, "word"), _cut(got, "word")) for kind, said, got in columns[:_MOST_COLUMNS]],
        "not_shown": max(0, len(columns) - _MOST_COLUMNS),
    }


def _recording(item: Result) -> dict[str, Any]:
    path = str(item["audio_filepath"])
    most = _MOST_CHARACTERS["path"]
    shown = path if len(path) <= most else f"…{path[-most:]}"  # the end names the recording
    return {"lang": item["lang"], "duration_ms": item["duration_ms"], "audio": shown}


def _cut(text: str, kind: str) -> str:
    most = _MOST_CHARACTERS[kind]
    return text if len(text) <= most else f"{text[:most]}…"


def _columns(said: list[str], got: list[str], chunks: list[Any]) -> Iterator[tuple[str, str, str]]:
    """(kind, word said, word transcribed) along an alignment; a word that is not there is empty."""
    for chunk in chunks:
        old, new = said[chunk.ref_start_idx : chunk.ref_end_idx], got[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for pair in zip_longest(old, new, fillvalue=""):
            yield (chunk.type, *pair)


def _confusions(
    languages: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]
) -> dict[str, list[tuple[str, str, str, int]]]:
    counts: dict[str, Counter] = {"substitute": Counter(), "delete": Counter(), "insert": Counter()}
    for language, aligned in zip(languages, alignments(references, hypotheses), strict=True):
        for kind, said, got in _columns(*aligned):
            if kind != "equal":
                counts[kind][language, said, got] += 1
    return {kind: _most_frequent(found, len(set(languages))) for kind, found in counts.items()}


def _most_frequent(counts: Counter, num_languages: int) -> list[tuple[str, str, str, int]]:
    share, taken, rows = _share(_CONFUSIONS, num_languages), Counter(), []
    for (language, said, got), number in sorted(counts.items(), key=lambda one: (-one[1], one[0])):
        if taken[language] < share:
            taken[language] += 1
            rows.append((language, _cut(said, "word"), _cut(got, "word"), number))
            if len(rows) == _MOST_CONFUSIONS:
                break
    return rows


def _translations(items: Sequence[Result]) -> list[dict[str, Any]]:
    """The translations of lowest chrF with their BLEU as sentences."""
    from sacrebleu.metrics import CHRF

    if not items:
        return []
    chrf = CHRF()
    scores = np.array([chrf.sentence_score(item["hypothesis"], [reference_of(item)]).score for item in items])
    languages = [item["lang"] for item in items]
    bleu = {language: bleu_metric(language, sentences=True) for language in set(languages)}
    return [
        {
            **_recording(items[one]),
            "text": _cut(reference_of(items[one]), "text"),
            "hypothesis": _cut(items[one]["hypothesis"], "text"),
            "chrf": float(scores[one]),
            "bleu": bleu[languages[one]].sentence_score(items[one]["hypothesis"], [reference_of(items[one])]).score,
        }
        for one in _places(languages, 100 - scores, np.zeros(len(items)))
    ]
