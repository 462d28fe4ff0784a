"""Inference workers: a task reads a batch's recordings and cuts them into pieces; an actor that holds the model turns
the pieces into one text per recording."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Required, TypedDict

import numpy as np

from raytrain.data.audio import AudioError
from raytrain.data.batch import SpeechBatch
from raytrain.data.batch_table import pack_batch, unpack_batch
from raytrain.data.loader import load_row
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.decoding.longform import most_windows, windows
from raytrain.decoding.requests import Request
from raytrain.decoding.settings import DecodeSettings
from raytrain.errors import DataError
from raytrain.model.canary import Canary
from raytrain.model.device import worker_device
from raytrain.storage.locations import is_uri

if TYPE_CHECKING:
    import pyarrow as pa

    from raytrain.decoding.recognizer import Recognition

_REMOTE_READERS = 16


@dataclass(frozen=True)
class RecognitionJob:
    """What all workers need to know. `load` returns the model and its tokenizer, and must be importable on workers.

    Recordings longer than `window_s` are cut into windows that overlap by `overlap_s`; if it is None nothing is cut.
    `precision` applies to linear layers (`raytrain.decoding.precision`).
    """

    load: Callable[[], tuple[Canary, CanaryTokenizer]]
    settings: DecodeSettings
    sample_rate: int
    pad_id: int
    window_s: float | None = None
    overlap_s: float = 0.0
    precision: str = "fp32"

    def piece(self, duration_ms: int) -> tuple[int, int]:
        """(length in ms, number) of the pieces of a recording of `duration_ms`, as upper bounds."""
        if self.window_s is None:
            return duration_ms, 1
        window, overlap = round(self.window_s * 1000), round(self.overlap_s * 1000)
        return min(duration_ms, window), most_windows(duration_ms, window, overlap)


class Batch(NamedTuple):
    """The ids of utterances to decode together, and how many of their pieces may be on the device at a time."""

    ids: tuple[int, ...]
    requests: tuple[Request, ...]
    limit: int


class RecognizedText(TypedDict, total=False):
    """An utterance's id, and either its text with the model's confidence or the error."""

    id: Required[int]
    text: str
    confidence: float | None
    error: str


class RecognizedBatch(NamedTuple):
    """A batch's texts, its seconds of audio, the seconds that workers spent on each phase, and the ids of the process
    that read the audio (`reader`) and the process that holds the model (`model`)."""

    texts: list[RecognizedText]
    audio_s: float
    seconds: dict[str, float]
    processes: dict[str, int]


class Piece(NamedTuple):
    """A part of a recording, in samples; `utterance` is the recording's index in its batch."""

    utterance: int
    start: int
    end: int


@dataclass(frozen=True)
class ReadNote:
    """A task's notes on a batch that it read: an error or None per id, the pieces in the order of the batch's rows, and
    the seconds it took."""

    ids: tuple[int, ...]
    limit: int
    errors: list[str | None]
    pieces: list[Piece]
    seconds: float
    process: int


# --- in a task of Ray Data


def read_batch(batch: Batch, job: RecognitionJob) -> pa.Table:
    """A batch's recordings, cut into pieces and collated, as a table of one row for `RecognizerActor`."""
    start = time.perf_counter()
    audios = _read_all(batch.requests, job)
    pieces = [
        (Piece(index, *span), audio[slice(*span)])
        for index, audio in enumerate(audios)
        if not isinstance(audio, AudioError)
        for span in _spans(audio, job)
    ]
    pieces.sort(key=lambda piece: -len(piece[1]))
    note = ReadNote(
        ids=batch.ids,
        limit=batch.limit,
        errors=[str(audio) if isinstance(audio, AudioError) else None for audio in audios],
        pieces=[piece for piece, _ in pieces],
        seconds=time.perf_counter() - start,
        process=os.getpid(),
    )
    return pack_batch(_collated(pieces, batch.requests, job.pad_id), pickle.dumps(note))


def _read_all(requests: Sequence[Request], job: RecognitionJob) -> list[np.ndarray | AudioError]:
    num_threads = _REMOTE_READERS if any(is_uri(request.audio_path) for request in requests) else 1
    with ThreadPoolExecutor(num_threads) as threads:
        return list(threads.map(lambda request: _read(request, job), requests))


def _read(request: Request, job: RecognitionJob) -> np.ndarray | AudioError:
    try:
        return load_row(request, job.sample_rate)
    except AudioError as error:
        return error
    except Exception as error:  # a file that breaks its codec must not fail the rest of the batch
        return AudioError(
            f"can't read audio {request.audio_path}",
            why=repr(error),
            remedy="play or convert this file with ffmpeg; remove its row if it is broken",
        )


def _spans(audio: np.ndarray, job: RecognitionJob) -> list[tuple[int, int]]:
    if job.window_s is None:
        return [(0, len(audio))]
    return windows(audio, job.sample_rate, window_s=job.window_s, overlap_s=job.overlap_s)


def _collated(pieces: Sequence[tuple[Piece, np.ndarray]], requests: Sequence[Request], pad_id: int) -> SpeechBatch:
    if not pieces:  # a table needs all its columns
        return SpeechBatch.collate([np.zeros(1, np.float32)], [[pad_id]], [1], pad_id=pad_id)
    prompts = [list(requests[piece.utterance].prompt) for piece, _ in pieces]
    return SpeechBatch.collate([audio for _, audio in pieces], prompts, list(map(len, prompts)), pad_id=pad_id)


# --- in an actor of Ray Data


class RecognizerActor:
    """Holds one model and turns tables from `read_batch` into texts."""

    def __init__(self, job: RecognitionJob, cuda: bool, threads: int) -> None:
        import torch

        from raytrain.decoding.recognizer import Recognizer

        device = worker_device(cuda).torch
        if device.type == "cpu":
            torch.set_num_threads(threads)
        self._sample_rate = job.sample_rate
        self._recognizer = Recognizer(*job.load(), job.settings, device, job.precision)

    def __call__(self, table: pa.Table) -> dict[str, list[bytes]]:
        """`table` has one batch; returns one `RecognizedBatch`."""
        batch, note = unpack_batch(table)
        result = self._recognize(batch, pickle.loads(note))  # made by our own tasks a moment ago
        return {"result": [pickle.dumps(result)]}

    def _recognize(self, batch: SpeechBatch, note: ReadNote) -> RecognizedBatch:
        num_samples = [0] * len(note.ids)
        for piece in note.pieces:
            num_samples[piece.utterance] = max(num_samples[piece.utterance], piece.end)
        texts = self._texts(batch, note) if note.pieces else {}
        for index, error in enumerate(note.errors):
            if error is not None:
                texts[index] = {"id": note.ids[index], "error": error}
        return RecognizedBatch(
            texts=[texts[index] for index in range(len(note.ids))],
            audio_s=sum(num_samples) / self._sample_rate,
            seconds={"decode audio": note.seconds, **self._recognizer.take_seconds()},
            processes={"reader": note.process, "model": os.getpid()},
        )

    def _texts(self, batch: SpeechBatch, note: ReadNote) -> dict[int, RecognizedText]:
        """The text of each readable recording, by its index in the batch."""
        pieces, rate = note.pieces, self._sample_rate
        numbers: dict[int, list[int]] = {}
        for number, piece in enumerate(pieces):
            numbers.setdefault(piece.utterance, []).append(number)
        timed = [len(numbers[piece.utterance]) > 1 for piece in pieces]
        results = self._recognizer.recognize(batch, [piece.start / rate for piece in pieces], timed, note.limit)
        texts = {}
        for utterance, ordered in numbers.items():
            ordered.sort(key=lambda number: pieces[number].start)
            spans_s = [(pieces[number].start / rate, pieces[number].end / rate) for number in ordered]
            texts[utterance] = self._text(note.ids[utterance], spans_s, [results[number] for number in ordered])
        return texts

    def _text(
        self, identity: int, spans_s: list[tuple[float, float]], results: list[Recognition | DataError]
    ) -> RecognizedText:
        """The text of a recording, joined from its pieces at `spans_s`, or their first error."""
        from raytrain.decoding.recognizer import confidence, joined

        parts = []
        for result in results:
            if isinstance(result, DataError):
                return {"id": identity, "error": str(result)}
            parts.append(result)
        tokens = joined(spans_s, parts)
        return {"id": identity, "text": self._recognizer.text(tokens), "confidence": confidence(tokens)}
