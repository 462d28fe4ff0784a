"""Transcribe recordings of any length with a trained model.

    transcriber = Transcriber(load_model(Path("canary.nemo")), language="en")
    for result in transcriber.run(["talk.wav"]):
        print(result.text)

A recording longer than `window_s` is cut into windows that overlap; see `raytrain.decoding.longform`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from raytrain.data.audio import AudioError, read_audio
from raytrain.data.batch import SpeechBatch
from raytrain.data.text.prompt import prompt_ids
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.decoding.longform import TimedToken, check_window, default_overlap, windows
from raytrain.decoding.recognizer import Heard, Recogniser, confidence, joined
from raytrain.decoding.search import DecodeSettings
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
    """One recording's text. `confidence` is the geometric mean of its tokens' probabilities, null without
    text; `alternatives` are the other texts of the beam, best first (recordings of one window only); `cut_off` tells
    that a length cap ended the text; `error` says why there is none."""

    path: str
    text: str | None
    duration_s: float | None = None
    confidence: float | None = None
    words: list[Word] = field(default_factory=list)
    alternatives: list[str] = field(default_factory=list)
    cut_off: bool = False
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, times to the hundredth of a second."""
        return _rounded(asdict(self))


class _Window(NamedTuple):
    recording: int
    start_s: float
    samples: np.ndarray


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
        self.prompt = prompt_ids(
            self.tokenizer,
            language,
            target_language or language,
            pnc=pnc,
            prompt_format=parts.config.prompt_format,
        )
        self.sample_rate = parts.config.sample_rate
        overlap_s = default_overlap(window_s) if overlap_s is None else overlap_s
        check_window(window_s, overlap_s)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            raise DataError(
                "there is no such device",
                got=device,
                allowed="auto, cpu, and cuda where there is one",
                remedy="pass --device auto",
            )
        self.recogniser = Recogniser(
            parts.build(), self.tokenizer, settings or DecodeSettings(), torch.device(device), precision
        )
        self.batch_size, self.times = batch_size, times
        self.window_s, self.overlap_s = window_s, overlap_s

    def run(self, paths: Sequence[str]) -> Iterator[Transcript]:
        """Transcripts in the order of `paths`. A recording that can't be read has `error` set, and no text."""
        for first in range(0, len(paths), self.batch_size):
            yield from self._group(paths[first : first + self.batch_size])

    def _group(self, paths: Sequence[str]) -> Iterator[Transcript]:
        pieces: list[_Window] = []
        results: list[Transcript | None] = [None] * len(paths)
        spans: dict[int, list[tuple[float, float]]] = {}
        for number, path in enumerate(paths):
            try:
                audio = read_audio(str(path), sample_rate=self.sample_rate)
            except AudioError as error:
                results[number] = Transcript(str(path), None, error=str(error))
                continue
            cuts = windows(audio, self.sample_rate, window_s=self.window_s, overlap_s=self.overlap_s)
            spans[number] = [(start / self.sample_rate, end / self.sample_rate) for start, end in cuts]
            pieces += [_Window(number, start / self.sample_rate, audio[start:end]) for start, end in cuts]
        decoded: dict[int, list[Heard]] = {number: [] for number in spans}
        # Windows of like length share a batch, so that little of it is padding.
        order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i].samples))
        found: dict[int, Heard] = {}
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            timed = [self.times or len(spans[pieces[i].recording]) > 1 for i in chosen]
            found.update(zip(chosen, self._hear([pieces[i] for i in chosen], timed), strict=True))
        for number, piece in enumerate(pieces):
            decoded[piece.recording].append(found[number])
        for number, path in enumerate(paths):
            yield results[number] or self._transcript(str(path), spans[number], decoded[number])

    def _hear(self, pieces: list[_Window], timed: list[bool]) -> list[Heard]:
        size, prompts = len(self.prompt), [self.prompt] * len(pieces)
        batch = SpeechBatch.collate(
            [piece.samples for piece in pieces], prompts, [size] * len(pieces), pad_id=self.tokenizer.pad_id
        )
        heard = self.recogniser.hear(batch, [piece.start_s for piece in pieces], timed)
        for one in heard:
            if isinstance(one, DataError):
                raise one
        return heard

    def _transcript(self, path: str, spans: list[tuple[float, float]], decoded: list[Heard]) -> Transcript:
        tokens = joined(spans, decoded)
        alternatives = [self.tokenizer.decode(ids) for ids in decoded[0].others] if len(decoded) == 1 else []
        return Transcript(
            path,
            self.recogniser.text(tokens),
            spans[-1][1],
            confidence(tokens),
            self._words(tokens),
            alternatives,
            cut_off=not all(part.ended for part in decoded),
        )

    def _words(self, tokens: list[TimedToken]) -> list[Word]:
        groups: list[list[TimedToken]] = []
        for token in tokens:
            if token.starts_word or not groups:
                groups.append([])
            groups[-1].append(token)
        words = []
        for group in groups:
            text = self.recogniser.text(group)
            start, end = group[0].start_s, group[-1].end_s
            known = not math.isnan(start)
            # A single space piece before the word it belongs to is no word of its own.
            if text:
                sure = math.exp(sum(token.log_prob for token in group))
                words.append(Word(text, start if known else None, end if known else None, sure))
        return words


def only_language(tokenizer: CanaryTokenizer) -> str:
    """The language of a model that knows one. Raises `DataError` for one that knows more."""
    if len(tokenizer.languages) == 1:
        return tokenizer.languages[0]
    raise DataError(
        "the model knows several languages", allowed=", ".join(tokenizer.languages), remedy="name one with --language"
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
