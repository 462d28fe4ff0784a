"""From the schedule to batches: rows by number, audio decoded by threads ahead of the training step.

Every rank computes the same schedule and takes its own share of each step, so ranks agree without talking.
A recording that can't be read is replaced by the next readable row of the same bucket, which keeps the
batch's shape, and is noted in the quarantine file.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raytrain.data.assignment import Assignment, Row
from raytrain.data.audio import AudioError, read_audio
from raytrain.data.augment import Augmenter
from raytrain.data.batch import LoadedStep, SpeechBatch
from raytrain.errors import DataError
from raytrain.lengths.permutation import key_of
from raytrain.lengths.schedule import BatchSchedule, ScheduleState, StepPlan

_MAX_REPLACEMENTS = 32


class Quarantine:
    """Names of broken recordings, each written once as a JSON line; safe to share between threads."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: set[tuple[str, int, int]] = set()

    def add(self, row: Row, error: AudioError) -> None:
        """Note one broken recording."""
        import orjson

        key = (row.audio_path, row.audio_start, row.offset_ms)
        with self._lock:
            if key in self._seen:
                return
            self._seen.add(key)
            if self._path is not None:
                line = {"audio_path": row.audio_path, "offset_ms": row.offset_ms, "error": str(error)}
                with open(self._path, "ab") as file:
                    file.write(orjson.dumps(line) + b"\n")

    def __contains__(self, row: Row) -> bool:
        return (row.audio_path, row.audio_start, row.offset_ms) in self._seen


class _Reading(NamedTuple):
    """A batch whose rows are being decoded."""

    plan: StepPlan
    state: ScheduleState
    is_last: bool
    rows: Iterator[tuple[Row, np.ndarray, int]]


class BatchLoader:
    """Iterate over `LoadedStep`s of one rank from `state` on, decoding ahead in threads.

    `close()` (or the `with` statement) ends the threads; errors of the producer are raised by the iterator.
    """

    def __init__(
        self,
        assignment: Assignment,
        schedule: BatchSchedule,
        state: ScheduleState,
        *,
        rank: int,
        world_size: int,
        sample_rate: int,
        pad_id: int,
        quarantine: Quarantine,
        num_threads: int = 2,
        prefetch_batches: int = 4,
        pin_memory: bool = False,
        augmenter: Augmenter | None = None,
    ) -> None:
        self._assignment, self._schedule, self._state = assignment, schedule, state
        self._rank, self._world_size = rank, world_size
        self._sample_rate, self._pad_id, self._quarantine = sample_rate, pad_id, quarantine
        self._pin_memory, self._augmenter = pin_memory, augmenter
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="audio")
        self._ready: queue.Queue = queue.Queue(prefetch_batches)
        self._stopped = threading.Event()
        self._producer = threading.Thread(target=self._produce, name="batches", daemon=True)
        self._producer.start()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; batches in flight are dropped."""
        self._stopped.set()
        self._producer.join(timeout=30)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> Iterator[LoadedStep]:
        while True:
            item = self._ready.get()
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item

    def _produce(self) -> None:
        try:
            # One batch decodes while the one before is put together.
            ahead: deque[_Reading] = deque()
            for reading in self._readings():
                ahead.append(reading)
                if len(ahead) > 1:
                    self._put(self._collate(ahead.popleft()))
                if self._stopped.is_set():
                    return
            for reading in ahead:
                self._put(self._collate(reading))
            self._put(None)
        except Exception as error:  # the consumer raises it; a thread has nobody to tell
            self._put(error)

    def _readings(self) -> Iterator[_Reading]:
        state, is_last = self._state, self._schedule.is_last(self._state, self._world_size)
        while not is_last:
            plan, state = self._schedule.step(state, self._world_size)
            is_last = self._schedule.is_last(state, self._world_size)
            numbers = self._schedule.rows(plan, self._rank).tolist()
            drawn = self._assignment.rows(plan.bucket, numbers)
            first = plan.start + sum(plan.sizes[: self._rank])
            positions = range(first, first + len(numbers))
            read = self._pool.map(partial(self._read, plan.bucket), numbers, drawn, positions)
            yield _Reading(plan, state, is_last, read)

    def _put(self, item: object) -> None:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _collate(self, reading: _Reading) -> LoadedStep:
        rows, audios, replaced = zip(*reading.rows, strict=True)
        batch = SpeechBatch.collate(
            list(audios),
            [list(row.tokens) for row in rows],
            [row.prompt_length for row in rows],
            pad_id=self._pad_id,
        )
        if self._pin_memory:  # copies to the GPU then do not wait
            batch = batch.pin_memory()
        samples: Counter[str] = Counter()
        for row, audio in zip(rows, audios, strict=True):
            samples[row.corpus] += len(audio)
        return LoadedStep(batch, reading.plan, reading.state, sum(replaced), reading.is_last, dict(samples))

    def _read(self, bucket: int, number: int, row: Row, position: int) -> tuple[Row, np.ndarray, int]:
        rows_in_bucket = self._assignment.rows_per_bucket[bucket]
        for attempt in range(min(_MAX_REPLACEMENTS, rows_in_bucket)):
            if attempt:
                row = self._assignment.row(bucket, (number + attempt) % rows_in_bucket)
            if row in self._quarantine:
                continue
            try:
                audio = load_row(row, self._sample_rate)
                return row, self._augmented(audio, bucket, position), int(attempt > 0)
            except AudioError as error:
                self._quarantine.add(row, error)
        raise DataError(
            f"bucket {bucket}: {_MAX_REPLACEMENTS} recordings in a row can't be read",
            got=row.audio_path,
            remedy="check data.root and that every worker sees the audio; quarantine.jsonl lists the files",
        )

    def _augmented(self, audio: np.ndarray, bucket: int, position: int) -> np.ndarray:
        if self._augmenter is None:
            return audio
        longest = self._assignment.edges[bucket][0] * self._sample_rate // 1000
        return self._augmenter(audio, key_of(self._schedule.seed, bucket, position, 2), longest)


def load_row(row: Row, sample_rate: int) -> np.ndarray:
    """Audio of one row, (num_samples,) float32, cut to the row's duration so that it never outgrows its bucket."""
    audio = read_audio(
        row.audio_path,
        start=row.audio_start,
        size=row.audio_size,
        offset_ms=row.offset_ms,
        duration_ms=row.duration_ms,
        sample_rate=sample_rate,
    )
    return audio[: row.duration_ms * sample_rate // 1000]


def read_rows(
    rows: list[Row],
    sample_rate: int,
    pad_id: int,
    batch_size: int,
    on_error: Callable[[Row, AudioError], None],
) -> Iterator[tuple[list[Row], SpeechBatch]]:
    """Batches of given rows, longest first, for decoding; a broken recording is left out after `on_error`."""
    ordered = sorted(rows, key=lambda row: -row.duration_ms)
    for start in range(0, len(ordered), batch_size):
        kept, audios = [], []
        for row in ordered[start : start + batch_size]:
            try:
                audios.append(load_row(row, sample_rate))
            except AudioError as error:
                on_error(row, error)
                continue
            kept.append(row)
        if kept:
            tokens = [list(row.tokens) for row in kept]
            lengths = [row.prompt_length for row in kept]
            yield kept, SpeechBatch.collate(audios, tokens, lengths, pad_id=pad_id)
