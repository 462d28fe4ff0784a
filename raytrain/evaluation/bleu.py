"""BLEU and chrF of translations with sacrebleu, and confidence intervals of their corpus scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from raytrain.evaluation.bootstrap import interval, resampled_sums
from raytrain.evaluation.normalize import WITHOUT_SPACES, base_language

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

# sacrebleu's default tokenizer takes a text without spaces for a single long word.
_TOKENIZERS = {**dict.fromkeys((*WITHOUT_SPACES, "ko"), "char"), "zh": "zh", "yue": "zh"}


class CorpusScore(NamedTuple):
    """A score from 0 to 100, and [low, high] of its 95 % interval."""

    value: float
    interval: list[float]


def bleu_metric(language: str, *, sentences: bool = False) -> BLEU:
    """BLEU with sacrebleu's tokenizer for texts of a language; for `sentences` that may lack long n-grams."""
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=_TOKENIZERS.get(base_language(language), "13a"), effective_order=sentences)


def chrf_metric() -> CHRF:
    """sacrebleu's chrF."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def corpus_score(metric: Metric, hypotheses: Sequence[str], references: Sequence[str]) -> CorpusScore:
    """A sacrebleu metric's corpus score with its 95 % interval; both equal the metric's own values for the texts.

    sacrebleu's own bootstrap returns a half-width instead of an interval, and holds a thousand copies of the statistics
    in memory, so this resamples the same sentence statistics itself.
    """
    statistics = np.array(metric._extract_corpus_statistics(hypotheses, [references]), np.int64)

    def of_sums(sums: np.ndarray) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    scores = [of_sums(sums) for sums in resampled_sums(statistics)]
    return CorpusScore(of_sums(statistics.sum(axis=0)), interval(np.array(scores)))
