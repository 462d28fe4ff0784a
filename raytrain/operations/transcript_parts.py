"""Parts of a transcription: rows of manifests that are decoded and written together.

Rows are numbered in manifest order and grouped into parts of bounded size. A part's rows are batched by length, and
once all of them have texts the part is written to OUT.jsonl.parts/.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from raytrain.cluster.inference import make_batches, recognize
from raytrain.cluster.inference_worker import Batch, RecognitionJob, RecognizedText
from raytrain.cluster.pool import Pool
from raytrain.decoding.requests import ManifestRow
from raytrain.errors import ConfigError
from raytrain.storage.artifacts import content_id
from raytrain.storage.finished import FinishedParts
from raytrain.training.memory.decoding import BatchSizes

Progress = Callable[..., None]  # see `Console.progress`
_PART_SECONDS = 36_000.0
_RESULTS = ("pred_text", "confidence", "error")


@dataclass
class Summary:
    """A summary of the work. `audio_s`, `seconds` and `batches` cover the rows of this run, not those of parts finished
    earlier; `part_seconds` are worker seconds, which overlap."""

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
        """Plain values for JSON, with `rtfx` (seconds of audio per second) overall and by part."""
        rtfx = {name: self.audio_s / value for name, value in self.part_seconds.items() if value}
        return asdict(self) | {
            "audio_s": round(self.audio_s, 3),
            "seconds": round(self.seconds, 3),
            "part_seconds": _rounded(self.part_seconds),
            "rtfx": round(self.audio_s / self.seconds, 3) if self.audio_s else None,
            "part_rtfx": _rounded(rtfx),
        }


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


@dataclass
class Part:
    """Rows that are written together; `waiting` counts those without a text so far."""

    number: int
    rows: list[ManifestRow]
    first: int
    results: dict[int, RecognizedText] = field(default_factory=dict)
    waiting: int = 0

    def __post_init__(self) -> None:
        self.waiting = sum(row.request is not None for row in self.rows)

    def rows_id(self) -> str:
        """The id of the rows, from their content and the location of their audio."""
        values = [[row.fields, row.request and tuple(row.request), row.error] for row in self.rows]
        return content_id(orjson.dumps(values))

    def lines(self) -> tuple[list[bytes], int]:
        """The output lines, and how many of them have an error."""
        lines, failed = [], 0
        for number, row in enumerate(self.rows, self.first):
            result = self.results.get(number)
            values = {name: value for name, value in row.fields.items() if name not in _RESULTS}
            if result is None or "error" in result:
                values["error"] = row.error if result is None else result["error"]
                failed += 1
            else:
                confidence = result["confidence"]
                values |= {
                    "pred_text": result["text"],
                    "confidence": None if confidence is None else round(confidence, 4),
                }
            lines.append(orjson.dumps(values))
        return lines, failed


def cut_parts(rows: Iterable[ManifestRow], part_rows: int) -> Iterator[Part]:
    """Rows as numbered parts of at most `part_rows` rows and about ten hours of audio."""
    current: list[ManifestRow] = []
    first = number = 0
    seconds = 0.0
    for row in rows:
        current.append(row)
        seconds += row.request.duration_ms / 1000 if row.request else 0.0
        if len(current) >= part_rows or seconds >= _PART_SECONDS:
            yield Part(number, current, first)
            first, number, current, seconds = first + len(current), number + 1, [], 0.0
    if current:
        yield Part(number, current, first)


class PartTranscriber:
    """Transcribes rows and writes their parts to `store`; holds the parts in progress."""

    def __init__(
        self, store: FinishedParts, job: RecognitionJob, pool: Pool, sizes: BatchSizes, update: Progress
    ) -> None:
        self.store = store
        self._job, self._pool, self._sizes, self._update = job, pool, sizes, update
        self._part_of: dict[int, Part] = {}
        self._replaced = os.path.realpath(store.output) if store.output.exists() else None
        self._summary = Summary(workers=pool.workers, device="cuda" if pool.cuda else "cpu")

    def transcribe(self, rows: Iterable[ManifestRow], part_rows: int) -> Summary:
        """Transcribe the parts that are not done yet."""
        summary, start = self._summary, time.perf_counter()
        for done in recognize(self.batches(cut_parts(rows, part_rows)), self._job, self._pool):
            summary.audio_s += done.audio_s
            summary.part_seconds.update(done.seconds)
            self._take(done.texts)
        summary.seconds = time.perf_counter() - start
        return summary

    def batches(self, parts: Iterable[Part]) -> Iterator[Batch]:
        """Batches of the parts that are not done; a part without audio to decode is written immediately."""
        summary = self._summary
        for part in parts:
            self._check_inputs(part)
            summary.rows += len(part.rows)
            summary.parts += 1
            self._update(total=summary.rows)
            finished = self.store.find(part.number, part.rows_id())
            if finished is not None:
                summary.parts_from_before += 1
                summary.failed += finished.num_failed
                self._update(advance=finished.num_rows)
            elif not part.waiting:
                self._write(part)
            else:
                yield from self._batches(part)

    def _check_inputs(self, part: Part) -> None:
        """Raises `ConfigError` if the output would overwrite a row's audio."""
        for row in part.rows if self._replaced else ():
            if row.request and os.path.realpath(row.request.audio_path) == self._replaced:
                raise output_is_input(self.store.output)

    def _batches(self, part: Part) -> Iterator[Batch]:
        numbered = [(number, row.request) for number, row in enumerate(part.rows, part.first) if row.request]
        self._part_of |= dict.fromkeys((number for number, _ in numbered), part)
        for batch in make_batches(numbered, self._sizes, self._job, self._pool):
            self._summary.batches += 1
            yield batch

    def _take(self, texts: Sequence[RecognizedText]) -> None:
        for text in texts:
            part = self._part_of.pop(text["id"])
            part.results[text["id"]] = text
            part.waiting -= 1
            if not part.waiting:
                self._write(part)

    def _write(self, part: Part) -> None:
        lines, failed = part.lines()
        self._summary.failed += self.store.write(part.number, part.rows_id(), lines, failed).num_failed
        self._update(advance=len(lines))


def output_is_input(output: Path) -> ConfigError:
    """The error for an output that would overwrite its own input."""
    return ConfigError("the output is a file that the command reads", got=output, remedy="choose another --output")
