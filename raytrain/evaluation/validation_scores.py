"""Scores of validation during training: word error rate of transcriptions, BLEU of translations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from raytrain.evaluation.bleu import bleu_metric
from raytrain.evaluation.error_counts import count_errors


class Decoded(NamedTuple):
    """A decoded utterance. `language` is the text's; `translated` if the speech has another. Both texts are normalized
    by `CanaryTokenizer.normalize`."""

    language: str
    corpus: str
    translated: bool
    reference: str
    hypothesis: str


Score = Callable[[Sequence[Decoded]], float | None]


def score_decoded(items: Sequence[Decoded]) -> dict[str, float]:
    """The scores that validation reports.

    `wer` of transcriptions (a fraction) and `bleu` of translations (0 to 100, the mean over target languages), each if
    there are any; also as `wer_LANGUAGE`, `wer_CORPUS`, `bleu_LANGUAGE` and `bleu_CORPUS` if there are several. `error`
    ranks checkpoints: WER and 1 − BLEU / 100, weighted by their references. Items without a reference get no score, and
    without any score there is no `error`.
    """
    transcriptions = [item for item in items if not item.translated]
    translations = [item for item in items if item.translated]
    scores = {
        **_by_group("wer", transcriptions, _wer, _wer),
        **_by_group("bleu", translations, bleu, _mean_bleu),
    }
    errors = [(scores["wer"], _num_compared(transcriptions))] if "wer" in scores else []
    errors += [(1 - scores["bleu"] / 100, _num_compared(translations))] if "bleu" in scores else []
    if not errors:
        return {}
    return {**scores, "error": sum(error * number for error, number in errors) / sum(number for _, number in errors)}


def bleu(items: Sequence[Decoded]) -> float | None:
    """Corpus BLEU of translations into a single language, 0 to 100; None if all references are empty."""
    if not any(item.reference for item in items):
        return None
    metric = bleu_metric(items[0].language)
    hypotheses, references = [item.hypothesis for item in items], [item.reference for item in items]
    return metric.corpus_score(hypotheses, [references]).score


def _by_group(name: str, items: Sequence[Decoded], of_language: Score, of_all: Score) -> dict[str, float]:
    """The score of all items and, if there are several, of each language and of each corpus."""
    if not items:
        return {}
    scores = {name: of_all(items)}
    for labels, score in (
        ([item.language for item in items], of_language),
        ([item.corpus for item in items], of_all),
    ):
        groups: dict[str, list[Decoded]] = {label: [] for label in sorted(set(labels))}
        for label, item in zip(labels, items, strict=True):
            groups[label].append(item)
        if len(groups) > 1:
            scores |= {f"{name}_{label}": score(group) for label, group in groups.items()}
    return {label: value for label, value in scores.items() if value is not None}


def _wer(items: Sequence[Decoded]) -> float | None:
    return count_errors([item.reference for item in items], [item.hypothesis for item in items]).rate


def _mean_bleu(items: Sequence[Decoded]) -> float | None:
    languages = sorted({item.language for item in items})
    by_language = [bleu([item for item in items if item.language == language]) for language in languages]
    scores = [score for score in by_language if score is not None]
    return sum(scores) / len(scores) if scores else None


def _num_compared(items: Sequence[Decoded]) -> int:
    return sum(bool(item.reference) for item in items)
