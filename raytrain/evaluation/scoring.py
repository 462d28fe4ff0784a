"""The scores of decoded test rows in `scores.json`: error rates and BLEU with 95 % confidence intervals, by language
and by duration.

A result is a line of `hypotheses.jsonl`: `text` as the manifest has it, `reference` after the tokenizer's normalizer
(`text` if there is none), which is compared with `hypothesis` (None if the recording can't be read), `lang`,
`translated`, `duration_ms`, `audio_filepath`. Transcriptions have error rates, translations BLEU and chrF.

    texts = texts_of(results, normalizer="whisper")
    scores = score(texts)
    scores.total.rates["wer"]           # Rate(value=0.121, interval=[0.112, 0.131])
    scores.to_dict()["wer"]             # 0.121
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raytrain.evaluation.bleu import CorpusScore, bleu_metric, chrf_metric, corpus_score
from raytrain.evaluation.bootstrap import rate_interval
from raytrain.evaluation.error_counts import LENGTH, edit_counts
from raytrain.evaluation.normalize import normalizer as normalizer_of

Result = Mapping[str, Any]
# Fixed, so that runs with different bucket plans can be compared.
DURATION_EDGES_MS = (5_000, 10_000, 20_000, 30_000, 40_000)


@dataclass(frozen=True)
class Utterance:
    """A readable result: `text` as the manifest has it, and `reference`, which `hypothesis` is compared with."""

    language: str
    duration_ms: int
    audio: str
    text: str
    reference: str
    hypothesis: str

    @classmethod
    def of(cls, result: Result) -> Utterance:
        """The utterance of a line of `hypotheses.jsonl`."""
        text = result["text"]
        return cls(
            language=result["lang"],
            duration_ms=result["duration_ms"],
            audio=str(result["audio_filepath"]),
            text=text,
            reference=result.get("reference", text),
            hypothesis=result["hypothesis"],
        )


@dataclass(frozen=True)
class Texts:
    """Readable utterances, split by how they are scored; `normalized` has the normalized references and hypotheses of
    `transcriptions`, and is None without a normalizer."""

    transcriptions: Sequence[Utterance]
    translations: Sequence[Utterance]
    unreadable: int
    normalizer: str
    normalized: tuple[list[str], list[str]] | None

    @property
    def raw(self) -> tuple[list[str], list[str]]:
        """References and hypotheses of `transcriptions`, with only the tokenizer's normalizer applied."""
        return pairs_of(self.transcriptions)


def pairs_of(utterances: Sequence[Utterance]) -> tuple[list[str], list[str]]:
    """References and hypotheses."""
    return [utterance.reference for utterance in utterances], [utterance.hypothesis for utterance in utterances]


def texts_of(results: Sequence[Result], normalizer: str = "none") -> Texts:
    """Results for `score` and for the page of errors; each text is normalized once."""
    readable = [result for result in results if result["hypothesis"] is not None]
    transcriptions = [Utterance.of(result) for result in readable if not result["translated"]]
    translations = [Utterance.of(result) for result in readable if result["translated"]]
    normalized = None
    if normalizer != "none":
        languages = {utterance.language for utterance in transcriptions}
        clean = {language: normalizer_of(normalizer, language) for language in languages}
        normalized = (
            [clean[utterance.language](utterance.reference) for utterance in transcriptions],
            [clean[utterance.language](utterance.hypothesis) for utterance in transcriptions],
        )
    return Texts(transcriptions, translations, len(results) - len(readable), normalizer, normalized)


@dataclass(frozen=True)
class Rate:
    """Errors over reference length with [low, high] of its 95 % interval, None if no reference has a word."""

    value: float | None
    interval: list[float] | None


@dataclass(frozen=True)
class GroupScores:
    """Error rates of transcriptions by name (`wer`, `cer`, and `wer_normalized` with a normalizer), and counts."""

    rates: Mapping[str, Rate]
    utterances: int
    hours: float
    words: int
    errors: int

    def to_dict(self) -> dict[str, object]:
        """The form in `scores.json`: each rate, with its interval under `_ci`."""
        rates: dict[str, object] = {}
        for name, rate in self.rates.items():
            rates |= {name: rate.value, f"{name}_ci": rate.interval}
        counts = {"utterances": self.utterances, "hours": self.hours, "words": self.words, "errors": self.errors}
        return {**rates, **counts}


@dataclass(frozen=True)
class DurationScores:
    """Scores of the utterances longer than `from_ms`, and at most `to_ms` long, unless that is None."""

    from_ms: int
    to_ms: int | None
    scores: GroupScores

    def to_dict(self) -> dict[str, object]:
        """The form in `scores.json`."""
        return {"from_ms": self.from_ms, "to_ms": self.to_ms, **self.scores.to_dict()}


@dataclass(frozen=True)
class TranslationScores:
    """BLEU and chrF of the translations into a language, None if all references are empty."""

    utterances: int
    bleu: CorpusScore | None = None
    chrf: CorpusScore | None = None


@dataclass(frozen=True)
class Scores:
    """All scores of a test: transcriptions in `total` and by group, translations by target language.

    `by_duration` has each span of `DURATION_EDGES_MS` with utterances, upper edge included. `references_changed` counts
    the readable results whose reference is not the manifest's text.
    """

    total: GroupScores
    normalizer: str
    unreadable: int
    references_changed: int
    substitutions: int
    deletions: int
    insertions: int
    by_language: Mapping[str, GroupScores]
    by_duration: Sequence[DurationScores]
    translations: Mapping[str, TranslationScores]

    def to_dict(self) -> dict[str, Any]:
        """The body of `scores.json`."""
        metrics = {
            "bleu": {language: scores.bleu for language, scores in self.translations.items() if scores.bleu},
            "chrf": {language: scores.chrf for language, scores in self.translations.items() if scores.chrf},
        }
        translations: dict[str, object] = {
            "translations": {language: scores.utterances for language, scores in self.translations.items()}
        }
        for name, by_language in metrics.items():
            translations[name] = {language: score.value for language, score in by_language.items()}
            translations[f"{name}_ci"] = {language: score.interval for language, score in by_language.items()}
        return {
            **self.total.to_dict(),
            "normalizer": self.normalizer,
            "unreadable": self.unreadable,
            "references_changed": self.references_changed,
            "substitutions": self.substitutions,
            "deletions": self.deletions,
            "insertions": self.insertions,
            "by_language": {language: scores.to_dict() for language, scores in self.by_language.items()},
            "by_duration": [scores.to_dict() for scores in self.by_duration],
            **translations,
        }


def score(texts: Texts) -> Scores:
    """The scores of a test's texts."""
    counts = {"wer": edit_counts(*texts.raw), "cer": edit_counts(*texts.raw, unit="character")}
    if texts.normalized is not None:
        counts["wer_normalized"] = edit_counts(*texts.normalized)
    duration_ms = np.array([utterance.duration_ms for utterance in texts.transcriptions], np.int64)
    languages = np.array([utterance.language for utterance in texts.transcriptions], object)
    substitutions, deletions, insertions, _ = counts["wer"].sum(axis=0).tolist()
    return Scores(
        total=_group(counts, duration_ms, np.full(len(duration_ms), True)),
        normalizer=texts.normalizer,
        unreadable=texts.unreadable,
        references_changed=sum(
            utterance.reference != utterance.text for utterance in (*texts.transcriptions, *texts.translations)
        ),
        substitutions=substitutions,
        deletions=deletions,
        insertions=insertions,
        by_language={
            language: _group(counts, duration_ms, languages == language) for language in sorted(set(languages))
        },
        by_duration=_by_duration(counts, duration_ms),
        translations=_translations(texts.translations),
    )


def _group(counts: Mapping[str, np.ndarray], duration_ms: np.ndarray, chosen: np.ndarray) -> GroupScores:
    """Scores of the `chosen` utterances, a mask (N,)."""
    rates = {}
    for name, table in counts.items():
        errors, lengths = table[chosen, :LENGTH].sum(axis=1), table[chosen, LENGTH]
        rates[name] = Rate(None, None)
        if lengths.any():
            rates[name] = Rate(float(errors.sum() / lengths.sum()), rate_interval(errors, lengths))
    words = counts["wer"][chosen]
    return GroupScores(
        rates=rates,
        utterances=int(chosen.sum()),
        hours=round(int(duration_ms[chosen].sum()) / 3_600_000, 6),
        words=int(words[:, LENGTH].sum()),
        errors=int(words[:, :LENGTH].sum()),
    )


def _by_duration(counts: Mapping[str, np.ndarray], duration_ms: np.ndarray) -> list[DurationScores]:
    span = np.searchsorted(DURATION_EDGES_MS, duration_ms, side="left")
    low, high = (0, *DURATION_EDGES_MS), (*DURATION_EDGES_MS, None)
    return [
        DurationScores(low[number], high[number], _group(counts, duration_ms, span == number))
        for number in sorted(set(span.tolist()))
    ]


def _translations(utterances: Sequence[Utterance]) -> dict[str, TranslationScores]:
    by_language: dict[str, TranslationScores] = {}
    for language in sorted({utterance.language for utterance in utterances}):
        references, hypotheses = pairs_of([utterance for utterance in utterances if utterance.language == language])
        by_language[language] = TranslationScores(len(references))
        if any(references):
            by_language[language] = TranslationScores(
                len(references),
                bleu=corpus_score(bleu_metric(language), hypotheses, references),
                chrf=corpus_score(chrf_metric(), hypotheses, references),
            )
    return by_language
