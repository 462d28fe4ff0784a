"""The summary of lengths in `statistics.json`: totals, quantiles and speaking rates, by language and corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from raytrain.data.counts import Counts, Group
from raytrain.lengths.histogram import LengthHistogram
from raytrain.stages.unknown_pieces import UnknownPieces

_QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)


def statistics_body(counts: Counts, corpora: Sequence[str], unknown: Sequence[UnknownPieces]) -> dict[str, Any]:
    """The contents of `statistics.json`, except the histogram's id."""
    histograms = {group: histogram.total() for group, histogram in sorted(counts.groups.items())}
    total = LengthHistogram.sum(list(histograms.values()))
    return {
        "rows": counts.num_rows.total(),
        "prompt_tokens_mean": counts.prompt_tokens / total.total if total.total else None,
        **length_statistics(total),
        **_by_language(histograms),
        "by_corpus": {name: _corpus_statistics(counts, histograms, name) for name in corpora},
        "unknown": [asdict(group) for group in unknown],
        "rejected": dict(sorted(counts.rejected.by_reason().items())),
        "rejected_examples": [entry.to_dict() for entry in counts.rejected.summary()],
        "audio": {
            name: {"probed": counts.probed[name], "wrong": counts.contradicted.of_corpus(name)} for name in corpora
        },
        "audio_examples": [entry.to_dict() for entry in counts.contradicted.summary()],
    }


def _by_language(histograms: Mapping[Group, LengthHistogram]) -> dict[str, Any]:
    sources = sorted({source for _, source, _ in histograms})
    pairs = sorted({(source, target) for _, source, target in histograms})
    return {
        "by_language": {source: length_statistics(_sum_of(histograms, source=source)) for source in sources},
        "by_pair": {
            f"{source}-{target}": length_totals(_sum_of(histograms, source=source, target=target))
            for source, target in pairs
        },
    }


def _corpus_statistics(counts: Counts, histograms: Mapping[Group, LengthHistogram], name: str) -> dict[str, Any]:
    return {
        "rows": counts.num_rows[name],
        **length_statistics(_sum_of(histograms, corpus=name)),
        "languages": sorted({source for corpus, source, _ in histograms if corpus == name}),
        "rejected": counts.rejected.of_corpus(name),
    }


def _sum_of(
    histograms: Mapping[Group, LengthHistogram],
    corpus: str | None = None,
    source: str | None = None,
    target: str | None = None,
) -> LengthHistogram:
    """The sum of the groups with these values; None matches all."""
    wanted = (corpus, source, target)
    chosen = [
        histogram
        for group, histogram in histograms.items()
        if all(name is None or name == part for name, part in zip(wanted, group, strict=True))
    ]
    return LengthHistogram.sum(chosen)


def length_totals(histogram: LengthHistogram) -> dict[str, float]:
    """Utterances, hours and tokens."""
    tokens = int((histogram.tokens * histogram.counts).sum())
    return {"utterances": histogram.total, "hours": round(histogram.hours, 6), "tokens": tokens}


def length_statistics(histogram: LengthHistogram) -> dict[str, Any]:
    """Totals, quantiles of durations and tokens per second."""
    return {
        **length_totals(histogram),
        "duration_quantiles_ms": {f"p{round(q * 100):02d}": histogram.quantile(q) for q in _QUANTILES},
        "tokens_per_second": tps_by_duration(histogram),
    }


def tps_by_duration(histogram: LengthHistogram, bin_ms: int = 2000) -> list[dict[str, float]]:
    """Mean and standard deviation of tokens per second in duration bins of 2 s (figure 3 of the paper)."""
    rate = histogram.tokens * 1000.0 / np.maximum(histogram.cells, 1)
    bins = (histogram.cells - 1) // bin_ms
    rows = []
    for index in np.unique(bins):
        chosen = bins == index
        weights = histogram.counts[chosen]
        mean = float(np.average(rate[chosen], weights=weights))
        variance = float(np.average((rate[chosen] - mean) ** 2, weights=weights))
        rows.append(
            {
                "from_ms": int(index * bin_ms),
                "to_ms": int((index + 1) * bin_ms),
                "mean": mean,
                "std": variance**0.5,
                "utterances": int(weights.sum()),
            }
        )
    return rows
