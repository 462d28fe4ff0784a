"""What `scores.json` says of decoded test rows: error rates and BLEU with 95 % confidence intervals, by language and
by duration.

A result is a line of `hypotheses.jsonl`: `text` as the manifest has it, `reference` as the tokenizer's normaliser
leaves it (`text` where there is none), which is what is compared with `hypothesis` (None where the recording can't be
read), `lang`, `translated`, `duration_ms`, `audio_filepath`. Transcriptions have error rates, translations BLEU and
chrF.

    texts = texts_of(results, normalizer="whisper")
    score(texts)["wer"], score(texts)["wer_ci"]        # 0.121, [0.112, 0.131]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raytrain.evaluation.bootstrap import interval, rate_interval, resampled_sums
from raytrain.evaluation.error_counts import bleu_metric
from raytrain.evaluation.normalize import normalizer as normalizer_of

Result = Mapping[str, Any]
# Fixed, so that runs with other bucket plans compare.
DURATION_EDGES_MS = (5_000, 10_000, 20_000, 30_000, 40_000)
SUBSTITUTIONS, DELETIONS, INSERTIONS, LENGTH = range(4)
_PAIRS_AT_A_TIME = 1000


@dataclass(frozen=True)
class Texts:
    """Readable results, apart by how they are scored; `normalized` has the reference and the hypothesis of each of
    `heard` as the normaliser leaves them, and is None without one."""

    heard: Sequence[Result]
    translated: Sequence[Result]
    unreadable: int
    normalizer: str
    normalized: tuple[list[str], list[str]] | None

    @property
    def raw(self) -> tuple[list[str], list[str]]:
        """References and hypotheses of `heard`, without a normaliser besides the tokenizer's."""
        return [reference_of(item) for item in self.heard], [item["hypothesis"] for item in self.heard]


def reference_of(result: Result) -> str:
    """What the hypothesis is compared with."""
    return result.get("reference", result["text"])


def texts_of(results: Sequence[Result], normalizer: str = "none") -> Texts:
    """Results for `score` and for the page of errors; each text is normalised once."""
    readable = [item for item in results if item["hypothesis"] is not None]
    heard = [item for item in readable if not item["translated"]]
    normalized = None
    if normalizer != "none":
        clean = {language: normalizer_of(normalizer, language) for language in {item["lang"] for item in heard}}
        normalized = (
            [clean[item["lang"]](reference_of(item)) for item in heard],
            [clean[item["lang"]](item["hypothesis"]) for item in heard],
        )
    translated = [item for item in readable if item["translated"]]
    return Texts(heard, translated, len(results) - len(readable), normalizer, normalized)


def alignments(
    references: Sequence[str], hypotheses: Sequence[str], *, unit: str = "word"
) -> Iterator[tuple[list[str], list[str], list[Any]]]:
    """For each pair the words of the reference, those of the hypothesis, and jiwer's chunks that align them by minimum
    edit distance; `unit` is `word` or `character`."""
    import jiwer

    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    for start in range(0, len(references), _PAIRS_AT_A_TIME):
        part = slice(start, start + _PAIRS_AT_A_TIME)
        found = process(list(references[part]), list(hypotheses[part]))
        yield from zip(found.references, found.hypotheses, found.alignments, strict=True)


def edit_counts(references: Sequence[str], hypotheses: Sequence[str], *, unit: str = "word") -> np.ndarray:
    """(N, 4) substitutions, deletions, insertions and reference length of each pair."""
    counts = np.zeros((len(references), 4), np.int64)
    column = {"substitute": SUBSTITUTIONS, "delete": DELETIONS, "insert": INSERTIONS}
    for row, (said, _, chunks) in zip(counts, alignments(references, hypotheses, unit=unit), strict=True):
        row[LENGTH] = len(said)
        for chunk in chunks:
            if chunk.type != "equal":
                size = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                row[column[chunk.type]] += size
    return counts


def score(texts: Texts) -> dict[str, Any]:
    """`scores.json`.

    `wer` and `cer` of transcriptions as fractions with `wer_ci` and `cer_ci`, [low, high] at 95 % (all None where no
    reference has a word), `wer_normalized` and its interval with a normaliser, and counts; the same in `by_language`,
    and in `by_duration` for each span of `DURATION_EDGES_MS` that has utterances, upper edge included. `bleu` and
    `chrf` of translations (0 to 100) by target language, with intervals. `references_changed` counts the readable
    results whose reference is not the manifest's text.
    """
    counts = {"wer": edit_counts(*texts.raw), "cer": edit_counts(*texts.raw, unit="character")}
    if texts.normalized is not None:
        counts["wer_normalized"] = edit_counts(*texts.normalized)
    duration_ms = np.array([item["duration_ms"] for item in texts.heard], np.int64)
    languages = np.array([item["lang"] for item in texts.heard], object)
    substitutions, deletions, insertions, _ = (int(value) for value in counts["wer"].sum(axis=0))
    return {
        **_group(counts, duration_ms, np.ones(len(duration_ms), bool)),
        "normalizer": texts.normalizer,
        "unreadable": texts.unreadable,
        "references_changed": sum(reference_of(item) != item["text"] for item in (*texts.heard, *texts.translated)),
        "substitutions": substitutions,
        "deletions": deletions,
        "insertions": insertions,
        "by_language": {
            language: _group(counts, duration_ms, languages == language) for language in sorted(set(languages))
        },
        "by_duration": _by_duration(counts, duration_ms),
        **_translations(texts.translated),
    }


def _group(counts: Mapping[str, np.ndarray], duration_ms: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    """Rates with intervals and sizes of the `chosen` utterances, a mask (N,)."""
    group: dict[str, Any] = {}
    for name, table in counts.items():
        errors, lengths = table[chosen, :LENGTH].sum(axis=1), table[chosen, LENGTH]
        group[name] = float(errors.sum() / lengths.sum()) if lengths.any() else None
        group[f"{name}_ci"] = rate_interval(errors, lengths) if lengths.any() else None
    words = counts["wer"][chosen]
    return {
        **group,
        "utterances": int(chosen.sum()),
        "hours": round(int(duration_ms[chosen].sum()) / 3_600_000, 6),
        "words": int(words[:, LENGTH].sum()),
        "errors": int(words[:, :LENGTH].sum()),
    }


def _by_duration(counts: Mapping[str, np.ndarray], duration_ms: np.ndarray) -> list[dict[str, Any]]:
    span = np.searchsorted(DURATION_EDGES_MS, duration_ms, side="left")
    edges = (0, *DURATION_EDGES_MS, None)
    return [
        {"from_ms": edges[number], "to_ms": edges[number + 1], **_group(counts, duration_ms, span == number)}
        for number in sorted({int(one) for one in span})
    ]


def _translations(items: Sequence[Result]) -> dict[str, Any]:
    from sacrebleu.metrics import CHRF

    found: dict[str, Any] = {"translations": {}, "bleu": {}, "bleu_ci": {}, "chrf": {}, "chrf_ci": {}}
    for language in sorted({item["lang"] for item in items}):
        some = [item for item in items if item["lang"] == language]
        pair = [item["hypothesis"] for item in some], [reference_of(item) for item in some]
        found["translations"][language] = len(some)
        if not any(pair[1]):  # nothing to compare with
            continue
        for name, metric in (("bleu", bleu_metric(language)), ("chrf", CHRF())):
            found[name][language], found[f"{name}_ci"][language] = corpus_score(metric, *pair)
    return found


def corpus_score(metric: Any, hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, list[float]]:
    """A sacrebleu metric's corpus score with its 95 % interval; both are equal to what the metric makes of the texts.

    sacrebleu's own bootstrap gives half a width in place of an interval, and holds a thousand copies of the statistics
    in memory. So this takes the sentence statistics that it takes.
    """
    statistics = np.array(metric._extract_corpus_statistics(hypotheses, [references]), np.int64)

    def of_sums(sums: np.ndarray) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    scores = [of_sums(sums) for sums in resampled_sums(statistics)]
    return of_sums(statistics.sum(axis=0)), interval(np.array(scores))
