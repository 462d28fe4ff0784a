"""Confidence intervals of corpus scores by the bootstrap: resample all utterances with replacement and score the
sample, a thousand times; the interval holds the middle 95 % of these scores.

Bisani & Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation" (ICASSP 2004) do it for word
error rates, Koehn, "Statistical significance tests for machine translation evaluation" (EMNLP 2004) for BLEU. Both
scores are functions of sums over utterances, so texts are compared once and only counts are resampled. Utterances are
treated as independent; if several share a speaker, the true interval is wider.

    sums = resampled_sums(np.stack([errors, lengths], 1))        # (1000, 2)
    interval(sums[:, 0] / sums[:, 1])                            # [0.112, 0.131]
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000
_SEED = 20_040_517  # fixed, so that equal texts get equal intervals
# A binomial variate costs about as much as drawing this many utterances one by one.
_DRAWS_PER_BINOMIAL = 12
_DRAWS_AT_A_TIME = 2_000_000


def resampled_sums(counts: np.ndarray, *, resamples: int = RESAMPLES, seed: int = _SEED) -> np.ndarray:
    """(resamples, K) float64: sums over N utterances drawn with replacement from the rows of `counts` (N, K), N ≥ 1."""
    rng = np.random.default_rng(seed)
    # Utterances with equal counts are interchangeable in a sum, and their number of draws is multinomial: the
    # same distribution, in a time that does not grow with N where counts are small. Rare rows are drawn one by one.
    rows, times = np.unique(counts, axis=0, return_counts=True)
    common = times > _DRAWS_PER_BINOMIAL
    shares = np.append(times[common], times[~common].sum()) / len(counts)
    drawn = rng.multinomial(len(counts), shares, size=resamples)
    sums = drawn[:, :-1].astype(np.float64) @ rows[common].astype(np.float64)
    rare = np.repeat(rows[~common], times[~common], axis=0).astype(np.float64)
    at_a_time = _DRAWS_AT_A_TIME // max(len(rare), 1) + 1
    for start in range(0, resamples if len(rare) else 0, at_a_time):
        part = slice(start, start + at_a_time)
        weights = np.empty((len(sums[part]), len(rare)))
        for row, number in zip(weights, drawn[part, -1], strict=True):
            row[:] = np.bincount(rng.integers(len(rare), size=number, dtype=np.int32), minlength=len(rare))
        sums[part] += weights @ rare
    return sums


def interval(values: np.ndarray) -> list[float]:
    """[low, high] that contains the middle 95 % of `values`."""
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def rate_interval(errors: np.ndarray, lengths: np.ndarray) -> list[float]:
    """95 % interval of Σ errors / Σ lengths over utterances, each (N,), with Σ lengths ≥ 1. A resample with length 0
    has no rate, and is skipped."""
    sums = resampled_sums(np.stack([errors, lengths], axis=1))
    sums = sums[sums[:, 1] > 0]
    return interval(sums[:, 0] / sums[:, 1])
