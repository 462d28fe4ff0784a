"""From planned steps to batches: audio is read and collated by threads ahead of the training step.

With an assignment every rank computes the same schedule and takes its own shares of each step, so ranks agree without
communication. A recording that can't be read is replaced by another readable row of the same bucket, which keeps the
batch's shape, and is noted in the quarantine file.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Protocol

import numpy as np
import torch

from raytrain.data.assignment import Assignment, Row
from raytrain.data.audio import AudioError, read_audio
from raytrain.data.augment import Augmenter
from raytrain.data.batch import LoadedStep, SpeechBatch
from raytrain.data.quarantine import Quarantine
from raytrain.data.threads import split_rows
from raytrain.data.work import StepWork
from raytrain.errors import DataError

_MAX_REPLACEMENTS = 32
# A row that was read: the row, its audio, and 1 where it replaces a broken one.
_ReadRow = tuple[Row, np.ndarray, int]


@dataclass(frozen=True)
class _ReadTask:
    """Rows that one thread read, and the wall and CPU time that they took."""

    rows: list[_ReadRow]
    seconds: float
    cpu_seconds: float


_Reading = Iterator[_ReadTask]  # the tasks of a step that threads are reading, in order


class StepReader:
    """Reads and collates steps with a pool of threads.

    `edges` are each bucket's (max_duration_ms, max_tokens); `assignment` provides replacements for broken rows.
    `close()` ends the threads.
    """

    def __init__(
        self,
        edges: Sequence[tuple[int, int]],
        *,
        sample_rate: int,
        pad_id: int,
        quarantine: Quarantine,
        assignment: Assignment | None = None,
        augmenter: Augmenter | None = None,
        num_threads: int = 2,
    ) -> None:
        self._edges, self._assignment, self._augmenter = edges, assignment, augmenter
        self._sample_rate, self._pad_id, self._quarantine = sample_rate, pad_id, quarantine
        self._num_threads, self._closed = num_threads, threading.Event()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="audio")

    def close(self) -> None:
        """Stop the threads; tasks that have not started are dropped."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def start(self, work: StepWork) -> _Reading:
        """Hand a step's rows to the threads, several to a task."""
        tasks = split_rows(len(work.rows), self._num_threads)
        return self._pool.map(partial(self._read_task, work), tasks)

    def finish(self, work: StepWork, reading: _Reading) -> LoadedStep:
        """Wait for a step's rows and collate them. Raises `DataError` if too many can't be read."""
        tasks = list(reading)
        rows, audios, replaced = zip(*chain.from_iterable(task.rows for task in tasks), strict=True)
        batch = SpeechBatch.collate(
            audios, [row.tokens for row in rows], [row.prompt_length for row in rows], pad_id=self._pad_id
        )
        samples: Counter[str] = Counter()
        for row, audio in zip(rows, audios, strict=True):
            samples[row.corpus] += len(audio)
        return LoadedStep(
            batch,
            work.plan,
            work.state,
            sum(replaced),
            work.is_last,
            dict(samples),
            work.rows,
            read_seconds=sum(task.seconds for task in tasks) / self._num_threads,
            cpu_seconds=sum(task.cpu_seconds for task in tasks) / self._num_threads,
        )

    def _read_task(self, work: StepWork, indices: range) -> _ReadTask:
        started, cpu_started, rows = time.perf_counter(), time.thread_time(), []
        for index in indices:
            if self._closed.is_set():
                raise CancelledError
            rows.append(self._read(work, index))
        return _ReadTask(rows, time.perf_counter() - started, time.thread_time() - cpu_started)

    def _read(self, work: StepWork, index: int) -> _ReadRow:
        why: str | None = None
        for attempt in range(_MAX_REPLACEMENTS):
            row = self._replacement(work, index, attempt) if attempt else work.rows[index]
            if row is None:
                break
            if row in self._quarantine:
                continue
            try:
                audio = load_row(row, self._sample_rate)
                return row, self._augmented(audio, work.plan.bucket, work.keys[index]), int(attempt > 0)
            except AudioError as error:
                self._quarantine.add(row, error)
                why = why or str(error)
        raise DataError(
            f"bucket {work.plan.bucket}: no readable recording can replace the broken ones",
            got=work.rows[index].audio_path,
            why=why,
            remedy="check data.root and that every worker sees the audio; quarantine.jsonl lists the files",
        )

    def _replacement(self, work: StepWork, index: int, attempt: int) -> Row | None:
        if work.numbers is None or self._assignment is None:
            return work.rows[(index + attempt) % len(work.rows)] if attempt < len(work.rows) else None
        count = self._assignment.rows_per_bucket[work.plan.bucket]
        if attempt >= count:
            return None
        return self._assignment.row(work.plan.bucket, (work.numbers[index] + attempt) % count)

    def _augmented(self, audio: np.ndarray, bucket: int, key: int) -> np.ndarray:
        if self._augmenter is None:
            return audio
        return self._augmenter(audio, key, self._edges[bucket][0] * self._sample_rate // 1000)


class BatchLoader:
    """Iterate over `LoadedStep`s of one worker, read ahead by threads.

    `close()` (or the `with` statement) ends the threads; errors of the producer are raised by the iterator.
    """

    def __init__(
        self, work: Iterable[StepWork], reader: StepReader, *, prefetch_batches: int = 4, pin_memory: bool = False
    ) -> None:
        self._work, self._reader, self._pin_memory = work, reader, pin_memory
        # A thread starts on GPU 0, where pinning would create a context; this one uses the worker's own GPU.
        self._device = torch.cuda.current_device() if pin_memory else None
        self._ready: queue.Queue[LoadedStep | Exception | None] = queue.Queue(prefetch_batches)
        self._stopped = threading.Event()
        self._producer = threading.Thread(target=self._produce, name="batches", daemon=True)
        self._producer.start()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads; batches in flight are dropped."""
        self._stopped.set()
        self._producer.join(timeout=30)
        self._reader.close()

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
            if self._device is not None:
                torch.cuda.set_device(self._device)
            # One batch decodes while the previous one is collated.
            ahead: deque[tuple[StepWork, _Reading]] = deque()
            for work in self._work:
                ahead.append((work, self._reader.start(work)))
                if len(ahead) > 1:
                    self._put(self._finish(*ahead.popleft()))
                if self._stopped.is_set():
                    return
            for work, reading in ahead:
                self._put(self._finish(work, reading))
            self._put(None)
        except Exception as error:  # the consumer raises it: nothing would catch it in a thread
            self._put(error)
        finally:
            if hasattr(self._work, "close"):  # a generator that holds files or threads
                self._work.close()

    def _finish(self, work: StepWork, reading: _Reading) -> LoadedStep:
        loaded = self._reader.finish(work, reading)
        # Copies to the GPU are asynchronous then.
        return replace(loaded, batch=loaded.batch.pin_memory()) if self._pin_memory else loaded

    def _put(self, item: LoadedStep | Exception | None) -> None:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue


class RecordedSpan(Protocol):
    """Where an utterance's audio lies; see `Row`."""

    @property
    def audio_path(self) -> str: ...
    @property
    def audio_start(self) -> int: ...
    @property
    def audio_size(self) -> int: ...
    @property
    def offset_ms(self) -> int: ...
    @property
    def duration_ms(self) -> int: ...


def load_row(row: RecordedSpan, sample_rate: int) -> np.ndarray:
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
    """Batches of given rows, longest first, for decoding; a broken recording is skipped after a call of `on_error`."""
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
            tokens = [row.tokens for row in kept]
            lengths = [row.prompt_length for row in kept]
            yield kept, SpeechBatch.collate(audios, tokens, lengths, pad_id=pad_id)
