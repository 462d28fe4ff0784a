"""`raytrain transcribe --manifest`: rows of manifests to one JSONL file, part by part.

Rows are numbered in the order of the manifests and make up parts of bounded size. A part's rows become batches of like
lengths, and when all of them have their texts the part is written to OUT.jsonl.parts/. After the last one the parts
become OUT.jsonl. The same command after a kill finds the parts that are done; see `raytrain.storage.finished`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from raytrain.cluster.inference import MAX_BATCH, Job, Pool, batch_sizes, find_pool, make_batches, recognise
from raytrain.cluster.session import ray_session
from raytrain.config import ClusterSection
from raytrain.console import Console
from raytrain.data.corpora.reading import plan_chunks
from raytrain.data.corpora.types import Chunk, Corpus
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.decoding.longform import check_window, default_overlap
from raytrain.decoding.requests import ManifestRow, Prompts, read_requests
from raytrain.decoding.search import DecodeSettings
from raytrain.errors import ConfigError, ManifestError
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.storage.artifacts import check_absent, content_id
from raytrain.storage.finished import FinishedParts
from raytrain.training.conversion import load_model, model_stamp
from raytrain.training.memory.decoding import BatchSizes

_PART_SECONDS = 36_000.0
_WHOLE_FILES = 1 << 62  # as bytes of a chunk
_SHORT_MS = 1000
_RESULTS = ("pred_text", "confidence", "error")


@dataclass(frozen=True)
class Order:
    """What to transcribe, with what, to where.

    `language` (not needed where the model knows one), `target_language` and `pnc` stand in where rows say nothing. A
    part ends at `part_rows` rows or ten hours of audio, whichever comes first.
    """

    corpora: tuple[Corpus, ...]
    output: Path
    checkpoint: Path
    settings: DecodeSettings = DecodeSettings()
    precision: str = "fp32"
    language: str | None = None
    target_language: str | None = None
    pnc: bool = True
    window_s: float = 40.0
    overlap_s: float | None = None
    device: str = "auto"
    workers: int | None = None
    device_memory: int | None = None
    max_batch: int = MAX_BATCH
    part_rows: int = 2000
    overwrite: bool = False
    cluster: ClusterSection = field(default_factory=ClusterSection)


@dataclass
class Summary:
    """What was done. `audio_s`, `seconds` and `batches` are about the rows of this run, not those of finished parts
    from before; `part_seconds` are seconds of workers, which overlap."""

    rows: int = 0
    failed: int = 0
    parts: int = 0
    parts_from_before: int = 0
    batches: int = 0
    audio_s: float = 0.0
    seconds: float = 0.0
    workers: int = 0
    device: str = "cpu"
    part_seconds: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with `rtfx` (seconds of audio for each second) of all and of each part."""
        found = asdict(self)
        found["part_seconds"] = dict(self.part_seconds)
        found["rtfx"] = self.audio_s / self.seconds if self.audio_s else None
        found["part_rtfx"] = {name: self.audio_s / value for name, value in self.part_seconds.items() if value}
        return {name: _rounded(value) for name, value in found.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def load_parts(path: str) -> tuple[Canary, CanaryTokenizer]:
    """A model by path, for a worker."""
    parts = load_model(Path(path))
    return parts.build(), CanaryTokenizer(parts.tokenizers)


def transcribe_manifests(order: Order, console: Console) -> Summary:
    """Write `order.output`. Raises `RaytrainError` for what no row is at fault for; a row's faults are in its line."""
    overlap_s = default_overlap(order.window_s) if order.overlap_s is None else order.overlap_s
    check_window(order.window_s, overlap_s)
    chunks = plan_chunks(order.corpora, _WHOLE_FILES)
    _check_output(order, chunks)
    config, tokenizer = _model(order)
    language = order.language or (tokenizer.languages[0] if len(tokenizer.languages) == 1 else None)
    languages = {"language": language, "target_language": order.target_language}
    chunks = [replace(chunk, **languages) for chunk in chunks]
    prompts = Prompts(tokenizer, config.prompt_format, config.max_positions, order.pnc)
    path = order.checkpoint.expanduser().absolute()
    job = Job(
        partial(load_parts, str(path)),
        order.settings,
        config.sample_rate,
        tokenizer.pad_id,
        order.window_s,
        overlap_s,
        order.precision,
    )
    key = content_id([model_stamp(path), asdict(order.settings), order.window_s, overlap_s, order.precision])
    with ray_session(order.cluster), console.progress("transcribing", None) as update:
        pool = find_pool(order.workers, order.device, order.device_memory, order.cluster)
        sizes = batch_sizes(config, order.settings, pool, order.max_batch)
        if order.device_memory is not None:
            _check_memory(sizes)
        store = FinishedParts(order.output, key, order.overwrite)
        run = _Run(store, job, pool, sizes, update)
        summary = run.go(read_requests(chunks, prompts), order.part_rows)
    if not summary.rows:
        with contextlib.suppress(OSError):  # not empty: parts of other rows, which are not ours to drop
            store.folder.rmdir()
        raise ManifestError(
            "the manifests have no rows",
            got=", ".join(chunk.path for chunk in chunks[:3]),
            remedy="check that the command names the right files and that they are not empty",
        )
    store.join(summary.parts)
    return summary


def _model(order: Order) -> tuple[ModelConfig, CanaryTokenizer]:
    """The model's settings and tokenizer; workers read its weights themselves."""
    parts = load_model(order.checkpoint)
    vocab = parts.config.padded_vocab_size
    if order.settings.beam_size > vocab:
        raise ConfigError(
            "the beam is larger than the vocabulary",
            got=order.settings.beam_size,
            allowed=vocab,
            remedy="lower --beam-size",
        )
    return parts.config, CanaryTokenizer(parts.tokenizers)


def _check_output(order: Order, chunks: Sequence[Chunk]) -> None:
    """Raises `ConfigError` where the output is what the command reads, `StorageError` where it is there and must not
    be overwritten."""
    inputs = {name.removeprefix("file://") for chunk in chunks for name in (chunk.path, chunk.audio) if name}
    for name in sorted(inputs | {str(order.checkpoint.expanduser())}):
        with contextlib.suppress(OSError):  # one of both is not there
            if os.path.samefile(name, order.output):
                raise _read_too(order.output)
    model, output = (os.path.realpath(path.expanduser()) for path in (order.checkpoint, order.output))
    if output.startswith(f"{model}{os.sep}") and order.output.exists() and order.output.suffix != ".jsonl":
        raise _read_too(order.output)
    check_absent(order.output, order.overwrite)


def _read_too(output: Path) -> ConfigError:
    return ConfigError("the output is a file that the command reads", got=output, remedy="name another --output")


def _check_memory(sizes: BatchSizes) -> None:
    found = sizes.prediction(_SHORT_MS)
    if found.batch_size is None:
        raise ConfigError(
            "the model and one second of audio do not fit the memory that was named",
            got=f"{sizes.budget_bytes / 2**20:.0f} MiB",
            allowed=f"at least {found.peak_bytes / 2**20:.0f} MiB",
            remedy="raise --device-memory",
        )


# --- parts


@dataclass
class _Part:
    """Rows that are written together; `waiting` counts those whose text is still to come."""

    number: int
    rows: list[ManifestRow]
    first: int
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    waiting: int = 0

    def __post_init__(self) -> None:
        self.waiting = sum(row.request is not None for row in self.rows)

    def rows_id(self) -> str:
        """Names the rows by their content and by where their audio was found."""
        values = [[row.fields, row.request and tuple(row.request), row.error] for row in self.rows]
        return content_id(orjson.dumps(values))

    def lines(self) -> tuple[list[bytes], int]:
        """The output's lines, and how many of them have an error."""
        lines, failed = [], 0
        for number, row in enumerate(self.rows, self.first):
            found = self.results.get(number, {"error": row.error})
            values = {name: value for name, value in row.fields.items() if name not in _RESULTS}
            if "error" in found:
                values["error"] = found["error"]
                failed += 1
            else:
                sure = found["confidence"]
                values |= {"pred_text": found["text"], "confidence": None if sure is None else round(sure, 4)}
            lines.append(orjson.dumps(values))
        return lines, failed


def cut_parts(rows: Iterable[ManifestRow], part_rows: int) -> Iterator[_Part]:
    """Rows as numbered parts of at most `part_rows` rows and about ten hours of audio."""
    current: list[ManifestRow] = []
    first = number = 0
    seconds = 0.0
    for row in rows:
        current.append(row)
        seconds += row.request.duration_ms / 1000 if row.request else 0.0
        if len(current) >= part_rows or seconds >= _PART_SECONDS:
            yield _Part(number, current, first)
            first, number, current, seconds = first + len(current), number + 1, [], 0.0
    if current:
        yield _Part(number, current, first)


class _Run:
    """Rows in, parts out; holds the parts that are under way."""

    def __init__(self, store: FinishedParts, job: Job, pool: Pool, sizes: BatchSizes, update: Any) -> None:
        self._store, self._job, self._pool, self._sizes, self._update = store, job, pool, sizes, update
        self._part_of: dict[int, _Part] = {}
        self._replaced = os.path.realpath(store.output) if store.output.exists() else None
        self._summary = Summary(workers=pool.workers, device="cuda" if pool.cuda else "cpu")

    def go(self, rows: Iterable[ManifestRow], part_rows: int) -> Summary:
        """Do what is not done yet."""
        summary, start = self._summary, time.perf_counter()
        for done in recognise(self._batches(cut_parts(rows, part_rows)), self._job, self._pool):
            summary.audio_s += done.audio_s
            summary.part_seconds.update(done.seconds)
            self._take(done.texts)
        summary.seconds = time.perf_counter() - start
        return summary

    def _batches(self, parts: Iterable[_Part]) -> Iterator[Any]:
        summary = self._summary
        for part in parts:
            for row in part.rows if self._replaced else ():
                if row.request and os.path.realpath(row.request.audio_path) == self._replaced:
                    raise _read_too(self._store.output)
            summary.rows += len(part.rows)
            summary.parts += 1
            self._update(total=summary.rows)
            known = self._store.find(part.number, part.rows_id())
            if known is not None:
                summary.parts_from_before += 1
                summary.failed += known.num_failed
                self._update(advance=known.num_rows)
                continue
            if not part.waiting:
                self._write(part)
                continue
            numbered = [(number, row.request) for number, row in enumerate(part.rows, part.first) if row.request]
            self._part_of |= dict.fromkeys((number for number, _ in numbered), part)
            for batch in make_batches(numbered, self._sizes, self._job, self._pool):
                summary.batches += 1
                yield batch

    def _take(self, texts: Sequence[dict[str, Any]]) -> None:
        for found in texts:
            part = self._part_of.pop(found["id"])
            part.results[found["id"]] = found
            part.waiting -= 1
            if not part.waiting:
                self._write(part)

    def _write(self, part: _Part) -> None:
        lines, failed = part.lines()
        self._summary.failed += self._store.write(part.number, part.rows_id(), lines, failed).num_failed
        self._update(advance=len(lines))
