"""Stage `statistics`: train the tokenizer where none is given, then count lengths on Ray Data.

Each manifest is cut into byte ranges. A range becomes one partial histogram on a worker, and the driver adds
the partials as they arrive, so nothing on it grows with the corpus.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from raytrain.config import Config
from raytrain.convert import load_model
from raytrain.data.manifest import BadRow, ManifestChunk, Utterance, read_chunk, split_manifests
from raytrain.data.prompt import encode_utterance, prompt_ids, read_utterances
from raytrain.data.tokenizer import CanaryTokenizer, train_tokenizer
from raytrain.errors import ManifestError
from raytrain.lengths.histogram import LengthHistogram

NUM_EXAMPLES = 5
_NOT_BAD = {"skipme"}  # rows that the manifest's author left out on purpose


@dataclass
class Counts:
    """What one worker, or all of them, counted. `add` merges another one into this."""

    histogram: LengthHistogram = field(default_factory=LengthHistogram.empty)
    by_language: dict[str, list[int]] = field(default_factory=dict)
    prompt_tokens: int = 0
    rejected: Counter = field(default_factory=Counter)
    examples: dict[str, list[dict]] = field(default_factory=dict)
    num_rows: int = 0

    def add(self, other: Counts) -> None:
        """Merge; examples stay the first ones in chunk order if added in that order."""
        self.histogram = self.histogram + other.histogram
        for language, numbers in other.by_language.items():
            mine = self.by_language.setdefault(language, [0, 0, 0])
            self.by_language[language] = [a + b for a, b in zip(mine, numbers, strict=True)]
        self.prompt_tokens += other.prompt_tokens
        self.rejected.update(other.rejected)
        for reason, rows in other.examples.items():
            kept = self.examples.setdefault(reason, [])
            kept.extend(rows[: NUM_EXAMPLES - len(kept)])
        self.num_rows += other.num_rows


def count_chunk(
    chunk: ManifestChunk, tokenizer: CanaryTokenizer, prompt_format: str, default_language: str | None
) -> Counts:
    """Count one byte range of a manifest; runs on a worker."""
    counts = Counts()
    durations: list[int] = []
    tokens: list[int] = []
    for row in read_utterances(chunk, tokenizer, prompt_format, default_language):
        counts.num_rows += 1
        if isinstance(row, BadRow):
            counts.rejected[row.reason] += 1
            examples = counts.examples.setdefault(row.reason, [])
            if len(examples) < NUM_EXAMPLES:
                examples.append({"file": row.file, "line": row.line, "detail": row.detail})
            continue
        encoded = encode_utterance(tokenizer, row, prompt_format)
        durations.append(row.duration_ms)
        tokens.append(len(encoded.ids))
        counts.prompt_tokens += encoded.prompt_length
        numbers = counts.by_language.setdefault(row.source_lang, [0, 0, 0])
        numbers[0] += 1
        numbers[1] += row.duration_ms
        numbers[2] += len(encoded.ids)
    counts.histogram = LengthHistogram.from_lengths(np.array(durations, np.int64), np.array(tokens, np.int64))
    return counts


def count_all(chunks: list[ManifestChunk], tokenizer: CanaryTokenizer, config: Config) -> Iterator[Counts]:
    """Partial counts of all chunks from Ray Data, in chunk order."""
    import ray

    language, prompt_format = config.data.default_language, config.model.prompt_format
    tokenizer_ref = ray.put(tokenizer)

    def count(row: dict[str, Any]) -> dict[str, Any]:
        import pickle

        chunk = ManifestChunk(**orjson.loads(row["chunk"]))
        partial = count_chunk(chunk, ray.get(tokenizer_ref), prompt_format, language)
        return {"counts": pickle.dumps(partial)}

    import pickle

    items = [{"chunk": orjson.dumps(asdict(chunk))} for chunk in chunks]
    blocks = min(len(items), 4 * max(1, int(ray.cluster_resources().get("CPU", 1))))
    for row in ray.data.from_items(items, override_num_blocks=blocks).map(count).iter_rows():
        yield pickle.loads(row["counts"])  # made by our own workers a moment ago


def chunks_of(config: Config, split: str) -> list[ManifestChunk]:
    """Byte ranges of one split's manifests. Raises `ManifestError` for a missing file."""
    return split_manifests(config.data.manifests(split), config.data.chunk_bytes)


def make_tokenizer(config: Config, folder: Path) -> CanaryTokenizer:
    """Load the configured tokenizer, or train one per language on the training texts; save it in `folder`."""
    section = config.tokenizer
    if section.path:
        path = Path(section.path).expanduser()
        if (path / "tokenizer.json").exists():
            tokenizer = CanaryTokenizer.load(path)
        else:
            tokenizer = CanaryTokenizer(load_model(path).tokenizers)
        language = tokenizer.languages[0]
        # A tokenizer of the other prompt format lacks tokens; better told now than by every row.
        prompt_ids(tokenizer, language, language, prompt_format=config.model.prompt_format)
        tokenizer.save(folder)
        return tokenizer
    texts: dict[str, list[str]] = {}
    rows = itertools.chain.from_iterable(
        read_chunk(chunk, None, config.data.default_language) for chunk in chunks_of(config, "train")
    )
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
    bad = {reason: number for reason, number in counts.rejected.items() if reason not in _NOT_BAD}
    share = sum(bad.values()) / max(counts.num_rows, 1)
    if share <= limit and counts.histogram.total:
        return
    shown = [
        f"{item['file']}:{item['line']}: {reason}: {item['detail']}"
        for reason in sorted(bad)
        for item in counts.examples.get(reason, [])[:3]
    ]
    raise ManifestError(
        f"{sum(bad.values())} of {counts.num_rows} manifest rows are bad ({', '.join(sorted(bad)) or 'none usable'})",
        got=f"{share:.2%}",
        allowed=f"data.max_bad_fraction = {limit:.2%}",
        remedy="mend these rows or raise the limit:\n  " + "\n  ".join(shown),
    )


def statistics_body(counts: Counts) -> dict[str, Any]:
    """What `statistics.json` says, all from counts."""
    histogram = counts.histogram
    quantiles = {f"p{round(q * 100):02d}": int(histogram.quantile(q)) for q in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)}
    total_ms = sum(numbers[1] for numbers in counts.by_language.values())
    return {
        "utterances": int(histogram.total),
        "rows": counts.num_rows,
        "hours": round(total_ms / 3.6e6, 6),
        "tokens": sum(numbers[2] for numbers in counts.by_language.values()),
        "prompt_tokens_mean": counts.prompt_tokens / max(int(histogram.total), 1),
        "by_language": {
            language: {"utterances": n, "hours": round(ms / 3.6e6, 6), "tokens": tokens}
            for language, (n, ms, tokens) in sorted(counts.by_language.items())
        },
        "rejected": dict(sorted(counts.rejected.items())),
        "rejected_examples": dict(sorted(counts.examples.items())),
        "tokens_per_second": tps_by_duration(histogram),
        "duration_quantiles_ms": quantiles,
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
