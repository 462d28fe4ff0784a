"""Transcribe recordings of any length with a trained model.

    transcriber = Transcriber(load_model(Path("canary.nemo")), language="en")
    for result in transcriber.run(["talk.wav"]):
        print(result.text)

A recording longer than `window_s` is split into overlapping windows; see `raytrain.decoding.longform`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from raytrain.data.audio import AudioError, read_audio
from raytrain.data.batch import SpeechBatch
from raytrain.data.text.prompt import prompt_ids
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.decoding.batching import sorted_batches
from raytrain.decoding.longform import TimedToken, checked_overlap, group_words, windows
from raytrain.decoding.recognizer import Recognition, Recognizer, confidence, joined
from raytrain.decoding.settings import DecodeSettings
from raytrain.errors import DataError
from raytrain.model.formats.portable import ModelParts


@dataclass(frozen=True)
class Word:
    """A word, when it was spoken (estimated from cross-attention, null without times), and its confidence: the
    model's probability of it, given the words before it."""

    text: str
    start_s: float | None
    end_s: float | None
    confidence: float


@dataclass(frozen=True)
class Transcript:
    """One recording's text. `confidence` is the geometric mean of its tokens' probabilities, null without text;
    `alternatives` are the other texts of the beam, best first (recordings of one window only); `cut_off` is true if a
    length cap ended the text; `error` is the reason for a missing text."""

    path: str
    text: str | None
    duration_s: float | None = None
    confidence: float | None = None
    words: list[Word] = field(default_factory=list)
    alternatives: list[str] = field(default_factory=list)
    cut_off: bool = False
    error: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, with numbers rounded to four decimals."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class _Recording:
    """A recording split into windows at `spans_s`."""

    path: str
    spans_s: list[tuple[float, float]]
    windows: list[np.ndarray]


class _Window(NamedTuple):
    """A window of a recording; `timed` asks for times of its tokens."""

    recording: int
    start_s: float
    samples: np.ndarray
    timed: bool


class Transcriber:
    """Holds a model on a device; `run` yields one `Transcript` per recording, in order.

    `times` aligns words (one more decoder pass per window); recordings of more than one window are always aligned.
    """

    def __init__(
        self,
        parts: ModelParts,
        *,
        language: str | None = None,
        target_language: str | None = None,
        pnc: bool = True,
        device: str = "auto",
        precision: str = "fp32",
        settings: DecodeSettings | None = None,
        batch_size: int = 8,
        window_s: float = 40.0,
        overlap_s: float | None = None,
        times: bool = False,
    ) -> None:
        self.tokenizer = CanaryTokenizer(parts.tokenizers)
        language = language or only_language(self.tokenizer)
        target, prompt_format = target_language or language, parts.config.prompt_format
        self.prompt = prompt_ids(self.tokenizer, language, target, pnc=pnc, prompt_format=prompt_format)
        self.sample_rate = parts.config.sample_rate
        overlap_s = checked_overlap(window_s, overlap_s)
        torch_device = device_named(device)
        self.recognizer = Recognizer(
            parts.build(), self.tokenizer, settings or DecodeSettings(), torch_device, precision
        )
        self.batch_size, self.times = batch_size, times
        self.window_s, self.overlap_s = window_s, overlap_s

    def run(self, paths: Sequence[str]) -> Iterator[Transcript]:
        """Transcripts in the order of `paths`. A recording that can't be read has `error` set, and no text."""
        for first in range(0, len(paths), self.batch_size):
            yield from self._group(paths[first : first + self.batch_size])

    def _group(self, paths: Sequence[str]) -> Iterator[Transcript]:
        recordings = [self._read(str(path)) for path in paths]
        windows = [
            _Window(number, start_s, samples, self.times or len(recording.windows) > 1)
            for number, recording in enumerate(recordings)
            if isinstance(recording, _Recording)
            for (start_s, _), samples in zip(recording.spans_s, recording.windows, strict=True)
        ]
        by_recording: list[list[Recognition]] = [[] for _ in recordings]
        for window, recognition in zip(windows, self._recognize(windows), strict=True):
            by_recording[window.recording].append(recognition)
        for recording, recognitions in zip(recordings, by_recording, strict=True):
            yield recording if isinstance(recording, Transcript) else self._transcript(recording, recognitions)

    def _read(self, path: str) -> _Recording | Transcript:
        """A recording's windows, or a transcript with the reason why it can't be read."""
        try:
            audio = read_audio(path, sample_rate=self.sample_rate)
        except AudioError as error:
            return Transcript(path, None, error=str(error))
        spans = windows(audio, self.sample_rate, window_s=self.window_s, overlap_s=self.overlap_s)
        spans_s = [(start / self.sample_rate, end / self.sample_rate) for start, end in spans]
        return _Recording(path, spans_s, [audio[start:end] for start, end in spans])

    def _recognize(self, windows: list[_Window]) -> list[Recognition]:
        """Recognitions in the order of the windows; windows of similar length share a batch, to limit padding."""
        sizes = [len(window.samples) for window in windows]
        results: dict[int, Recognition] = {}
        for indices in sorted_batches(sizes, [1] * len(sizes), largest=lambda _: self.batch_size):
            results.update(zip(indices, self._recognize_batch([windows[index] for index in indices]), strict=True))
        return [results[index] for index in range(len(windows))]

    def _recognize_batch(self, windows: list[_Window]) -> Iterator[Recognition]:
        size, prompts = len(self.prompt), [self.prompt] * len(windows)
        batch = SpeechBatch.collate(
            [window.samples for window in windows], prompts, [size] * len(windows), pad_id=self.tokenizer.pad_id
        )
        starts_s, timed = [window.start_s for window in windows], [window.timed for window in windows]
        for recognition in self.recognizer.recognize(batch, starts_s, timed):
            if isinstance(recognition, DataError):
                raise recognition
            yield recognition

    def _transcript(self, recording: _Recording, recognitions: list[Recognition]) -> Transcript:
        tokens = joined(recording.spans_s, recognitions)
        alternatives = recognitions[0].alternatives if len(recognitions) == 1 else []
        return Transcript(
            recording.path,
            self.recognizer.text(tokens),
            recording.spans_s[-1][1],
            confidence(tokens),
            list(self._words(tokens)),
            [self.tokenizer.decode(ids) for ids in alternatives],
            cut_off=not all(recognition.ended for recognition in recognitions),
        )

    def _words(self, tokens: list[TimedToken]) -> Iterator[Word]:
        for group in group_words(tokens):
            text = self.recognizer.text(group)
            if not text:  # a single space piece before its word is not a word itself
                continue
            start_s, end_s = group[0].start_s, group[-1].end_s
            probability = math.exp(sum(token.log_prob for token in group))
            if math.isnan(start_s):
                yield Word(text, None, None, probability)
            else:
                yield Word(text, start_s, end_s, probability)


def device_named(name: str) -> torch.device:
    """The torch device of `auto`, `cpu` or `cuda`. Raises `DataError` if there is no such device."""
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not has_cuda):
        raise DataError(
            "unavailable device",
            got=name,
            allowed="auto, cpu, and cuda if there is a GPU",
            remedy="pass --device auto",
        )
    return torch.device(name)


def only_language(tokenizer: CanaryTokenizer) -> str:
    """The language of a monolingual model. Raises `DataError` for a model of several languages."""
    if len(tokenizer.languages) == 1:
        return tokenizer.languages[0]
    raise DataError(
        "the model has several languages",
        allowed=", ".join(tokenizer.languages),
        remedy="name one with --language",
    )


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
