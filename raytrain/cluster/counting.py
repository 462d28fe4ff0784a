"""Stage `statistics`: train the tokenizer where none is given, then count lengths and unknown pieces on Ray Data.

Corpora are cut into chunks (byte ranges, shards). A worker turns its chunks into one partial count, and the driver adds
the partials as they arrive, so nothing on it grows with the corpus but one number of lines for each chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from raytrain.cluster.placement import Placement
from raytrain.cluster.session import map_on_workers
from raytrain.config import Config, TokenizerSection
from raytrain.data.corpora.rejected import NUM_EXAMPLES, Example, RejectedRows
from raytrain.data.corpora.rows import Block
from raytrain.data.corpora.types import BadRow, Chunk, read_blocks
from raytrain.data.probe import (
    NO_LISTING,
    UNREADABLE,
    AudioListing,
    HeaderSample,
    ProbeCounts,
    least_share,
    plan_samples,
)
from raytrain.data.text.prompt import prompt_ids
from raytrain.data.text.sentences import SentenceSample
from raytrain.data.text.sequences import BlockEncoder
from raytrain.data.text.tokenizer import CanaryTokenizer, train_tokenizer
from raytrain.errors import ManifestError
from raytrain.lengths.histogram import LengthHistogram

_NUM_CHARACTERS, _NUM_SHOWN = 40, 10
_MERGE_AT = 1 << 18  # rows or cells that wait before they are merged

Group = tuple[str, str, str]  # corpus, source language, target language
TextGroup = tuple[str, str]  # corpus, language of the texts


class HistogramSum:
    """A running sum: small histograms wait and are merged together, as merging costs what the large one holds."""

    def __init__(self) -> None:
        self._waiting: list[LengthHistogram] = []
        self._cells = 0

    def add(self, histogram: LengthHistogram) -> None:
        """Count one more."""
        self._waiting.append(histogram)
        self._cells += len(histogram.cells)
        if self._cells > 2 * max(_MERGE_AT, len(self._waiting[0].cells)):
            self.total()

    def total(self) -> LengthHistogram:
        """The sum of all that were added."""
        if len(self._waiting) != 1:
            self._waiting = [LengthHistogram.sum(self._waiting)]
        self._cells = len(self._waiting[0].cells)
        return self._waiting[0]


@dataclass
class Counts:
    """What one worker, or all of them, counted. `add` merges another one into this.

    `rejected` counts by (corpus, reason), `examples` holds the first rows of each, `num_rows` counts by corpus, and
    `lines` says how many lines begin in each chunk. `text_tokens` are those of texts without prompts and ends,
    `unknown` those of them that stand for what the tokenizer can't write: `characters`. `probed` counts the rows by
    corpus whose headers were read, and `wrong` those by (corpus, reason) that these contradict; `wrong_examples` holds
    the first of them.
    """

    groups: dict[Group, HistogramSum] = field(default_factory=dict)
    prompt_tokens: int = 0
    rejected: Counter = field(default_factory=Counter)
    examples: dict[tuple[str, str], list[dict]] = field(default_factory=dict)
    num_rows: Counter = field(default_factory=Counter)
    lines: dict[int, int] = field(default_factory=dict)
    text_tokens: Counter[TextGroup] = field(default_factory=Counter)
    unknown: Counter[TextGroup] = field(default_factory=Counter)
    characters: dict[TextGroup, Counter[str]] = field(default_factory=dict)
    probed: Counter = field(default_factory=Counter)
    wrong: Counter = field(default_factory=Counter)
    wrong_examples: dict[tuple[str, str], list[dict]] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        """Merge; in any order, with the same result."""
        for group, histogram in other.groups.items():
            self.groups.setdefault(group, HistogramSum()).add(histogram.total())
        self.prompt_tokens += other.prompt_tokens
        self.rejected.update(other.rejected)
        self.probed.update(other.probed)
        self.wrong.update(other.wrong)
        for mine, theirs in ((self.examples, other.examples), (self.wrong_examples, other.wrong_examples)):
            for place, rows in theirs.items():
                both = [*mine.get(place, []), *rows]
                mine[place] = sorted(both, key=lambda row: (row["chunk"], row["line"]))[:NUM_EXAMPLES]
        self.num_rows.update(other.num_rows)
        self.lines.update(other.lines)
        self.text_tokens.update(other.text_tokens)
        self.unknown.update(other.unknown)
        for group, characters in other.characters.items():
            self.characters.setdefault(group, Counter()).update(characters)

    def count_rows(self, chunk: Chunk, block: Block) -> None:
        """Count a block's rows and lines, and note the unusable ones."""
        self.num_rows[chunk.corpus] += len(block) + len(block.bad)
        self.lines[chunk.index] = self.lines.get(chunk.index, 0) + block.num_lines
        for row in block.bad:
            self.reject(chunk, row)

    def reject(self, chunk: Chunk, row: BadRow) -> None:
        """Count one unusable row."""
        self.rejected[chunk.corpus, row.reason] += 1
        _note_example(self.examples, chunk, row)

    def add_probes(self, chunk: Chunk, probes: ProbeCounts) -> None:
        """Count what the headers of a chunk's sample said."""
        self.probed.update(probes.probed)
        self.wrong.update(probes.wrong)
        for row in sorted(probes.examples, key=lambda row: row.line):
            _note_example(self.wrong_examples, chunk, row)

    def count_texts(self, block: Block, tokens: np.ndarray, unknown: np.ndarray, encoder: BlockEncoder) -> None:
        """Count (N,) tokens of a block's texts and how many of them are unknown."""
        for language, rows in block.by_prompt([key.target_lang for key in block.prompts]):
            group = (block.chunk.corpus, language)
            self.text_tokens[group] += int(tokens[rows].sum())
            for row in np.flatnonzero(rows & (unknown > 0)).tolist():
                self.unknown[group] += int(unknown[row])
                characters = encoder.unwritable(block.texts[row], language)
                self.characters.setdefault(group, Counter()).update(characters)

    @property
    def histogram(self) -> LengthHistogram:
        """All groups together."""
        return LengthHistogram.sum([histogram.total() for histogram in self.groups.values()])


def _note_example(examples: dict[tuple[str, str], list[dict]], chunk: Chunk, row: BadRow) -> None:
    kept = examples.setdefault((chunk.corpus, row.reason), [])
    if len(kept) < NUM_EXAMPLES:
        kept.append({"chunk": chunk.index, "file": row.file, "line": row.line, "detail": row.detail})


def count_chunk(
    chunk: Chunk, encoder: BlockEncoder, listing: AudioListing = NO_LISTING, sample_size: int = 0
) -> Counts:
    """Count one chunk; runs on a worker. Line numbers count from the chunk's first line.

    Rows whose audio file `listing` misses are bad rows. The headers of `sample_size` rows are read.
    """
    counts, sample = Counts(), HeaderSample(chunk, sample_size)
    waiting: dict[Group, list[tuple[np.ndarray, np.ndarray]]] = {}
    num_waiting = 0

    def merge() -> None:
        for group, parts in waiting.items():
            durations, tokens = (np.concatenate(one) for one in zip(*parts, strict=True))
            counts.groups.setdefault(group, HistogramSum()).add(LengthHistogram.from_lengths(durations, tokens))
        waiting.clear()

    # Relative: only the driver learns how many lines stand before the chunk.
    for block in read_blocks(replace(chunk, first_line=1)):
        block = listing.check(encoder.check(block))
        sample.add(block)
        lengths, prompts, unknown = encoder.count_unknown(block)
        counts.count_texts(block, lengths - prompts - 1, unknown, encoder)
        counts.prompt_tokens += int(prompts.sum())
        counts.count_rows(chunk, block)
        groups = [(chunk.corpus, key.source_lang, key.target_lang) for key in block.prompts]
        for group, rows in block.by_prompt(groups):
            if rows.any():
                waiting.setdefault(group, []).append((block.duration_ms[rows], lengths[rows]))
        num_waiting += len(block)
        if num_waiting > _MERGE_AT:
            merge()
            num_waiting = 0
    merge()
    counts.add_probes(chunk, sample.read())
    return counts


def count_all(chunks: list[Chunk], tokenizer: CanaryTokenizer, config: Config) -> Iterator[tuple[int, Counts]]:
    """Partial counts from Ray Data: (number of chunks, what they hold)."""
    import ray

    prompt_format, by_words = config.model.prompt_format, config.tokenizer.by_words
    tokenizer_ref = ray.put(tokenizer)
    sample = config.data.audio_sample
    sample_sizes = plan_samples(chunks, sample)

    def count(chunks: list[Chunk]) -> tuple[int, Counts]:
        encoder = BlockEncoder(ray.get(tokenizer_ref), prompt_format, by_words=by_words)
        total, listing = Counts(), AudioListing(sample > 0)
        for chunk in chunks:
            total.add(count_chunk(chunk, encoder, listing, sample_sizes.get(chunk.index, 0)))
        return len(chunks), total

    yield from map_on_workers(chunks, count, 8, Placement.data(config.cluster))


def number_lines(counts: Counts, chunks: list[Chunk]) -> list[Chunk]:
    """The chunks with their `first_line`, and the examples of bad rows numbered from the start of their file."""
    numbered = []
    path, first = "", 1
    for chunk in chunks:
        if chunk.first_line:  # known before: files that are not cut, rows of Parquet
            path, first = chunk.path, chunk.first_line
        elif chunk.path != path:
            path, first = chunk.path, 1
        numbered.append(replace(chunk, first_line=first))
        first += counts.lines.get(chunk.index, 0)
    for rows in (*counts.examples.values(), *counts.wrong_examples.values()):
        for row in rows:
            row["line"] += numbered[row["chunk"]].first_line - 1
    return numbered


def sample_all(chunks: list[Chunk], config: Config) -> Iterator[tuple[int, SentenceSample, Counts]]:
    """Partial samples of sentences from Ray Data: (number of chunks, a sample, rows and unusable ones)."""
    most = config.tokenizer.max_sentences

    def sample(chunks: list[Chunk]) -> tuple[int, SentenceSample, Counts]:
        sentences, counts = SentenceSample(most), Counts()
        for chunk in chunks:
            for block in read_blocks(replace(chunk, first_line=1)):
                counts.count_rows(chunk, block)
                sentences.add_block(block)
        return len(chunks), sentences, counts

    yield from map_on_workers(chunks, sample, 8, Placement.data(config.cluster))


def make_tokenizer(
    config: Config, folder: Path, chunks: list[Chunk], on_chunks: Callable[[int], object] = lambda number: None
) -> CanaryTokenizer:
    """Load the configured tokenizer, or train one per language on a sample of the training texts; save it in `folder`.

    `on_chunks` is told of chunks as they are sampled. Raises `ManifestError` as `check_bad_rows` does.
    """
    section = config.tokenizer
    if section.path:
        path = Path(section.path).expanduser()
        if (path / "tokenizer.json").exists():
            tokenizer = CanaryTokenizer.load(path)
        else:
            from raytrain.training.conversion import load_model  # needs torch, which workers that count can do without

            tokenizer = CanaryTokenizer(load_model(path).tokenizers)
        language = tokenizer.languages[0]
        # A tokenizer of the other prompt format lacks tokens; better told now than by every row.
        prompt_ids(tokenizer, language, language, prompt_format=config.model.prompt_format)
        tokenizer.save(folder)
        return tokenizer
    sentences, counts = SentenceSample(section.max_sentences), Counts()
    for number, partial, rows in sample_all(chunks, config):
        sentences.add(partial)
        counts.add(rows)
        on_chunks(number)
    number_lines(counts, chunks)
    check_bad_rows(counts, config, sentences.num_rows.total())
    return train_tokenizer(
        sentences.texts(),
        section.vocab_size,
        folder,
        model_type=section.model_type,
        prompt_format=config.model.prompt_format,
    )


def check_bad_rows(counts: Counts, config: Config, usable: int) -> None:
    """Raise `ManifestError` that names the first bad lines where more than `data.max_bad_fraction` of all rows are bad
    or none is `usable`.

    Rows whose audio can't be read count as bad, since training would replace them: of a corpus' usable rows the least
    share that the sample, whose headers were read, makes sure of.
    """
    expected: Counter[tuple[str, str]] = Counter()
    unreadable = {group: number for group, number in counts.wrong.items() if group[1] == UNREADABLE}
    for (corpus, reason), number in unreadable.items():
        rejected = sum(rows for (name, _), rows in counts.rejected.items() if name == corpus)
        usable_rows = counts.num_rows[corpus] - rejected
        expected[corpus, reason] = round(least_share(number, counts.probed[corpus], usable_rows) * usable_rows)
    examples = {
        group: [Example(BadRow(row["file"], row["line"], group[1], row["detail"])) for row in rows]
        for group, rows in (counts.examples | counts.wrong_examples).items()
    }
    rejected = RejectedRows(counts.rejected + expected, examples, counts.num_rows.total())
    if expected:
        rejected.judged_by = f"the headers of {counts.probed.total()} recordings"
    rejected.check("data.train", config.data.corpora("train"), usable, config.data.max_bad_fraction)


def unknown_pieces(counts: Counts) -> list[dict[str, Any]]:
    """Corpora and languages with texts that the tokenizer can't write, the worst first: `tokens` of their texts, how
    many are `unknown`, their `fraction`, and the most frequent `characters` as [character, times]."""
    groups = []
    for group, unknown in counts.unknown.items():
        characters = sorted(counts.characters[group].items(), key=lambda entry: (-entry[1], entry[0]))
        tokens = counts.text_tokens[group]
        groups.append(
            {
                "corpus": group[0],
                "language": group[1],
                "tokens": tokens,
                "unknown": unknown,
                "fraction": unknown / tokens,
                "characters": [list(entry) for entry in characters[:_NUM_CHARACTERS]],
            }
        )
    return sorted(groups, key=lambda group: (-group["fraction"], group["corpus"], group["language"]))


def check_unknown(unknown: list[dict[str, Any]], section: TokenizerSection) -> None:
    """Raise `ManifestError` where more than `max_unknown_fraction` of the tokens of a corpus' texts in a language are
    unknown pieces. `unknown` is as `unknown_pieces` gives it.
    """
    limit = section.max_unknown_fraction
    bad = [group for group in unknown if group["fraction"] > limit]
    if not bad:
        return
    listing = "".join(f"\n  {unknown_line(group)}" for group in bad[:_NUM_SHOWN])
    further = f"\n  and {len(bad) - _NUM_SHOWN} more" if len(bad) > _NUM_SHOWN else ""
    if section.path:
        remedy = (
            "write the texts as those that the tokenizer was trained on (lower case, the same script), leave out rows "
            "in another language, or take a tokenizer that has these characters: one with byte_fallback, or one that "
            "is trained on these texts (unset tokenizer.path)"
        )
    else:
        remedy = "raise tokenizer.max_sentences, mend the texts"
    raise ManifestError(
        f"the tokenizer can't write the texts of corpus {bad[0]['corpus']} in {bad[0]['language']}",
        got=f"{bad[0]['fraction']:.2%} unknown pieces",
        allowed=f"tokenizer.max_unknown_fraction = {limit:.2%}",
        why="a model learns nothing of characters that the tokenizer has no piece for",
        remedy=f"{remedy}, or allow more:{listing}{further}",
    )


def unknown_line(group: dict[str, Any]) -> str:
    """What an entry of `unknown_pieces` says, for a person."""
    shown = " ".join(f"{character!r} ({times})" for character, times in group["characters"][:_NUM_SHOWN])
    share = f"{group['unknown']} of {group['tokens']} tokens ({group['fraction']:.2%})"
    return f"corpus {group['corpus']}, {group['language']}: {share}: {shown}"


def statistics_body(counts: Counts, config: Config) -> dict[str, Any]:
    """What `statistics.json` says, all from counts."""
    histograms = {group: histogram.total() for group, histogram in sorted(counts.groups.items())}
    whole = LengthHistogram.sum(list(histograms.values()))
    names = [corpus.name for corpus in config.data.train]
    by_corpus = {name: _sum_where(histograms, lambda group, name=name: group[0] == name) for name in names}
    sources = sorted({group[1] for group in histograms})
    rejected: dict[str, int] = Counter()
    for (_, reason), number in counts.rejected.items():
        rejected[reason] += number
    return {
        "rows": counts.num_rows.total(),
        "prompt_tokens_mean": counts.prompt_tokens / whole.total if whole.total else None,
        **_lengths(whole),
        "by_language": {
            name: _lengths(_sum_where(histograms, lambda group, name=name: group[1] == name)) for name in sources
        },
        "by_pair": {
            f"{source}-{target}": _totals(
                _sum_where(histograms, lambda group, pair=(source, target): group[1:] == pair)
            )
            for source, target in sorted({group[1:] for group in histograms})
        },
        "by_corpus": {
            name: {
                "rows": counts.num_rows[name],
                **_lengths(by_corpus[name]),
                "languages": sorted({group[1] for group in histograms if group[0] == name}),
                "rejected": {reason: n for (corpus, reason), n in sorted(counts.rejected.items()) if corpus == name},
            }
            for name in names
        },
        "unknown": unknown_pieces(counts),
        "rejected": dict(sorted(rejected.items())),
        "rejected_examples": _examples(counts.examples, counts.rejected),
        "audio": {
            name: {
                "probed": counts.probed[name],
                "wrong": {reason: n for (corpus, reason), n in sorted(counts.wrong.items()) if corpus == name},
            }
            for name in names
        },
        "audio_examples": _examples(counts.wrong_examples, counts.wrong),
    }


def _examples(rows: dict[tuple[str, str], list[dict]], numbers: Counter) -> list[dict[str, Any]]:
    return [
        {
            "corpus": corpus,
            "reason": reason,
            "rows": numbers[corpus, reason],
            "first": [{key: row[key] for key in ("file", "line", "detail")} for row in first],
        }
        for (corpus, reason), first in sorted(rows.items())
    ]


def _sum_where(histograms: dict[Group, LengthHistogram], chosen: Any) -> LengthHistogram:
    return LengthHistogram.sum([one for group, one in histograms.items() if chosen(group)])


def _totals(histogram: LengthHistogram) -> dict[str, Any]:
    tokens = int((histogram.tokens * histogram.counts).sum())
    return {"utterances": histogram.total, "hours": round(histogram.hours, 6), "tokens": tokens}


def _lengths(histogram: LengthHistogram) -> dict[str, Any]:
    shares = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
    return {
        **_totals(histogram),
        "duration_quantiles_ms": {f"p{round(q * 100):02d}": histogram.quantile(q) for q in shares},
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
