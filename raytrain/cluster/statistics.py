"""Stage `statistics`: train the tokenizer where none is given, then count lengths on Ray Data.

Corpora are cut into chunks (byte ranges, shards). A worker turns its chunks into one partial count, and the driver adds
the partials as they arrive, so nothing on it grows with the corpus but one number of lines for each chunk.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from raytrain.cluster.placement import Placement
from raytrain.cluster.session import map_on_workers
from raytrain.config import Config
from raytrain.data.assignment import NUM_EXAMPLES
from raytrain.data.corpus import DEFAULT_CHUNK_BYTES, BadRow, Chunk, Utterance, plan_chunks, read_blocks, read_chunk
from raytrain.data.encoder import BlockEncoder
from raytrain.data.prompt import prompt_ids
from raytrain.data.tokenizer import CanaryTokenizer, train_tokenizer
from raytrain.errors import ManifestError
from raytrain.lengths.histogram import LengthHistogram

MAX_CHUNKS = 4096
_NOT_BAD = {"skipme"}  # rows that the manifest's author left out on purpose
_MERGE_AT = 1 << 18  # rows or cells that wait before they are merged

Group = tuple[str, str, str]  # corpus, source language, target language


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
    `lines` says how many lines begin in each chunk.
    """

    groups: dict[Group, HistogramSum] = field(default_factory=dict)
    prompt_tokens: int = 0
    rejected: Counter = field(default_factory=Counter)
    examples: dict[tuple[str, str], list[dict]] = field(default_factory=dict)
    num_rows: Counter = field(default_factory=Counter)
    lines: dict[int, int] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        """Merge; in any order, with the same result."""
        for group, histogram in other.groups.items():
            self.groups.setdefault(group, HistogramSum()).add(histogram.total())
        self.prompt_tokens += other.prompt_tokens
        self.rejected.update(other.rejected)
        for place, rows in other.examples.items():
            both = [*self.examples.get(place, []), *rows]
            self.examples[place] = sorted(both, key=lambda row: (row["chunk"], row["line"]))[:NUM_EXAMPLES]
        self.num_rows.update(other.num_rows)
        self.lines.update(other.lines)

    def reject(self, chunk: Chunk, row: BadRow) -> None:
        """Count one unusable row."""
        place = (chunk.corpus, row.reason)
        self.rejected[place] += 1
        examples = self.examples.setdefault(place, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append({"chunk": chunk.index, "file": row.file, "line": row.line, "detail": row.detail})

    @property
    def histogram(self) -> LengthHistogram:
        """All groups together."""
        return LengthHistogram.sum([histogram.total() for histogram in self.groups.values()])


def count_chunk(chunk: Chunk, encoder: BlockEncoder) -> Counts:
    """Count one chunk; runs on a worker. Line numbers count from the chunk's first line."""
    counts = Counts()
    waiting: dict[Group, list[tuple[np.ndarray, np.ndarray]]] = {}
    num_waiting = 0

    def merge() -> None:
        for group, parts in waiting.items():
            durations, tokens = (np.concatenate(one) for one in zip(*parts, strict=True))
            counts.groups.setdefault(group, HistogramSum()).add(LengthHistogram.from_lengths(durations, tokens))
        waiting.clear()

    # Relative: only the driver learns how many lines stand before the chunk.
    for block in read_blocks(replace(chunk, first_line=1)):
        block = encoder.check(block)
        lengths, prompts = encoder.count(block)
        counts.prompt_tokens += int(prompts.sum())
        counts.num_rows[chunk.corpus] += len(block) + len(block.bad)
        for row in block.bad:
            counts.reject(chunk, row)
        groups = [(chunk.corpus, key.source_lang, key.target_lang) for key in block.prompts]
        for group in dict.fromkeys(groups):
            rows = np.array([one == group for one in groups], bool)[block.prompt_of]
            if rows.any():
                waiting.setdefault(group, []).append((block.duration_ms[rows], lengths[rows]))
        counts.lines[chunk.index] = counts.lines.get(chunk.index, 0) + block.num_lines
        num_waiting += len(block)
        if num_waiting > _MERGE_AT:
            merge()
            num_waiting = 0
    merge()
    return counts


def count_all(chunks: list[Chunk], tokenizer: CanaryTokenizer, config: Config) -> Iterator[tuple[int, Counts]]:
    """Partial counts from Ray Data: (number of chunks, what they hold)."""
    import ray

    prompt_format, by_words = config.model.prompt_format, config.tokenizer.by_words
    tokenizer_ref = ray.put(tokenizer)

    def count(chunks: list[Chunk]) -> tuple[int, Counts]:
        encoder = BlockEncoder(ray.get(tokenizer_ref), prompt_format, by_words=by_words)
        total = Counts()
        for chunk in chunks:
            total.add(count_chunk(chunk, encoder))
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
    for rows in counts.examples.values():
        for row in rows:
            row["line"] += numbered[row["chunk"]].first_line - 1
    return numbered


def chunks_of(config: Config, split: str) -> list[Chunk]:
    """Chunks of one split's corpora. Raises `ManifestError` for a missing file."""
    corpora = config.data.corpora(split)
    size = config.data.chunk_bytes or DEFAULT_CHUNK_BYTES
    chunks = plan_chunks(corpora, size)
    if config.data.chunk_bytes is None and len(chunks) > MAX_CHUNKS:
        # Each chunk becomes a file in every bucket, and a note on the driver.
        chunks = plan_chunks(corpora, size * -(-len(chunks) // MAX_CHUNKS))
    return chunks


def make_tokenizer(config: Config, folder: Path) -> CanaryTokenizer:
    """Load the configured tokenizer, or train one per language on the training texts; save it in `folder`."""
    section = config.tokenizer
    if section.path:
        path = Path(section.path).expanduser()
        if (path / "tokenizer.json").exists():
            tokenizer = CanaryTokenizer.load(path)
        else:
            from raytrain.convert import load_model  # needs torch, which workers that count can do without

            tokenizer = CanaryTokenizer(load_model(path).tokenizers)
        language = tokenizer.languages[0]
        # A tokenizer of the other prompt format lacks tokens; better told now than by every row.
        prompt_ids(tokenizer, language, language, prompt_format=config.model.prompt_format)
        tokenizer.save(folder)
        return tokenizer
    texts: dict[str, list[str]] = {}
    rows = itertools.chain.from_iterable(map(read_chunk, chunks_of(config, "train")))
    good = (row for row in rows if isinstance(row, Utterance))
    for row in itertools.islice(good, section.max_sentences):
        texts.setdefault(row.target_lang, []).append(row.text)
    if not texts:
        raise ManifestError("the training manifests have no usable row", remedy="check data.train")
    return train_tokenizer(
        texts, section.vocab_size, folder, model_type=section.model_type, prompt_format=config.model.prompt_format
    )


def check_bad_rows(counts: Counts, limit: float) -> None:
    """Raise `ManifestError` that names the first bad lines where more than `limit` of all rows are bad."""
    bad = {place: number for place, number in counts.rejected.items() if place[1] not in _NOT_BAD}
    share = sum(bad.values()) / max(counts.num_rows.total(), 1)
    if share <= limit and counts.groups:
        return
    shown = [
        f"{item['file']}:{item['line']}: {place[1]}: {item['detail']}"
        for place in sorted(bad)
        for item in counts.examples.get(place, [])[:3]
    ]
    reasons = ", ".join(sorted({reason for _, reason in bad})) or "none usable"
    raise ManifestError(
        f"{sum(bad.values())} of {counts.num_rows.total()} manifest rows are bad ({reasons})",
        got=f"{share:.2%}",
        allowed=f"data.max_bad_fraction = {limit:.2%}",
        remedy="mend these rows or raise the limit:\n  " + "\n  ".join(shown),
    )


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
        "prompt_tokens_mean": counts.prompt_tokens / max(whole.total, 1),
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
        "rejected": dict(sorted(rejected.items())),
        "rejected_examples": [
            {"corpus": corpus, "reason": reason, "rows": counts.rejected[corpus, reason], "first": [
                {key: row[key] for key in ("file", "line", "detail")} for row in rows
            ]}
            for (corpus, reason), rows in sorted(counts.examples.items())
        ],
    }  # fmt: skip


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
