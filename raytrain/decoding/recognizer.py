"""A model on a device: batches of audio to tokens, windows of a recording to one text. Runs locally or on a cluster.

recognizer = Recognizer(model, tokenizer, DecodeSettings(), torch.device("cpu"))
windows = recognizer.recognize(batch, starts_s=[0.0, 36.2], timed=[True, True])
tokens = joined([(0.0, 40.0), (36.2, 70.0)], windows)
recognizer.text(tokens), confidence(tokens)
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from raytrain.data.batch import SpeechBatch
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.decoding.alignment import token_spans
from raytrain.decoding.halving import in_halves
from raytrain.decoding.hypothesis import Hypothesis
from raytrain.decoding.longform import TimedToken, join
from raytrain.decoding.precision import prepare_for_inference
from raytrain.decoding.search import Encoded, decode_batch, encode_batch
from raytrain.decoding.settings import DecodeSettings
from raytrain.errors import DataError
from raytrain.model.canary import Canary

PARTS = ("features", "encoder", "decoder")


class Recognition(NamedTuple):
    """The result for a window: its best tokens, the ids of the other hypotheses, and whether the text is complete."""

    tokens: list[TimedToken]
    alternatives: list[list[int]]
    ended: bool


class Stopwatch:
    """Seconds that a device spends on the parts of a batch. On CUDA, events measure them, and nothing waits for the GPU
    until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """Attribute the time since the last mark to `part`; the first mark only starts the clock."""
        now: Any = time.perf_counter()
        if self._on_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((part, now))

    def take(self) -> Counter[str]:
        """Seconds by part since the last call."""
        marks, self._marks = self._marks, []
        if self._on_cuda and marks:
            marks[-1][1].synchronize()
        seconds: Counter[str] = Counter()
        for (_, before), (part, after) in zip(marks, marks[1:], strict=False):
            seconds[part] += before.elapsed_time(after) / 1000 if self._on_cuda else after - before
        return seconds


class Recognizer:
    """A model on a device, and how to search. The model can't be trained afterwards (`prepare_for_inference`)."""

    def __init__(
        self,
        model: Canary,
        tokenizer: CanaryTokenizer,
        settings: DecodeSettings,
        device: torch.device,
        precision: str = "fp32",
    ) -> None:
        self.model = prepare_for_inference(model, precision, device)
        self.tokenizer, self.settings, self.device = tokenizer, settings, device
        self._seconds: Counter[str] = Counter()
        self._watch = Stopwatch(device)
        model.preprocessor.register_forward_hook(lambda *_: self._watch.mark("features"))

    def recognize(
        self, batch: SpeechBatch, starts_s: Sequence[float], timed: Sequence[bool], limit: int | None = None
    ) -> list[Recognition | DataError]:
        """The windows of a batch, at most `limit` of them at a time.

        `starts_s` are their times in the recordings. Tokens have times if `timed` asks for them, else NaN. The prompts
        are the first `prompt_lengths` of the batch's tokens. If a GPU runs out of memory, the batch is halved; a window
        that does not fit alone gets the error as its result.
        """

        def recognize(rows: slice) -> Sequence[Recognition | DataError]:
            return self._recognize(batch.part(rows), starts_s[rows], timed[rows])

        def too_long(rows: slice, why: str) -> Sequence[Recognition | DataError]:
            return [self._too_long(batch.part(rows), why)]

        parts = in_halves(len(batch), limit or len(batch), recognize, lambda _: self._watch.take(), too_long)
        return [window for _, windows in parts for window in windows]

    def _too_long(self, window: SpeechBatch, why: str) -> DataError:
        seconds = int(window.audio_lengths[0]) / self.model.config.sample_rate
        return DataError(
            f"{seconds:.1f} s of audio need more memory than the device has left",
            why=why,
            remedy="lower --window-seconds or --beam-size, or make sure that nothing else uses the device",
        )

    @torch.inference_mode()
    def _recognize(self, batch: SpeechBatch, starts_s: Sequence[float], timed: Sequence[bool]) -> list[Recognition]:
        watch, samples = self._watch, batch.audio_lengths.tolist()
        watch.mark("start")
        batch = batch.to(self.device)
        encoded = encode_batch(self.model, batch, self.settings)
        watch.mark("encoder")
        results = []
        for row, hypotheses in enumerate(
            decode_batch(self.model, batch, encoded, self.tokenizer.eos_id, self.settings)
        ):
            best, duration_s = hypotheses[0], samples[row] / self.model.config.sample_rate
            spans = self._spans(encoded, batch, row, best, duration_s) if timed[row] else None
            alternatives = [hypothesis.ids for hypothesis in hypotheses[1:]]
            results.append(Recognition(self._timed(best, spans, starts_s[row]), alternatives, best.ended))
        watch.mark("decoder")
        self._seconds += watch.take()
        return results

    def _spans(
        self, encoded: Encoded, batch: SpeechBatch, row: int, best: Hypothesis, duration_s: float
    ) -> list[tuple[float, float]]:
        rows = slice(row, row + 1)
        prompt = batch.tokens[row, : int(batch.prompt_lengths[row])].tolist()
        spans = token_spans(self.model, encoded.states[rows], encoded.lengths[rows], prompt, best.ids)
        return [(start, min(end, duration_s)) for start, end in spans]

    def _timed(self, best: Hypothesis, spans: list[tuple[float, float]] | None, start_s: float) -> list[TimedToken]:
        unknown = (math.nan, math.nan)
        return [
            TimedToken(token, *(spans[i] if spans else unknown), log_prob, self.tokenizer.starts_word(token)).later(
                start_s
            )
            for i, (token, log_prob) in enumerate(zip(best.ids, best.token_log_probs, strict=True))
        ]

    def take_seconds(self) -> Counter[str]:
        """Seconds that the device spent on each of `PARTS` since the last call."""
        seconds, self._seconds = self._seconds, Counter()
        return seconds

    def text(self, tokens: Sequence[TimedToken]) -> str:
        """The text of tokens."""
        return self.tokenizer.decode(token.id for token in tokens)


def joined(spans_s: Sequence[tuple[float, float]], windows: Sequence[Recognition]) -> list[TimedToken]:
    """The tokens of a recording from those of its windows, located at `spans_s`."""
    tokens = windows[0].tokens
    for (_, left_end), (right_start, _), window in zip(spans_s, spans_s[1:], windows[1:], strict=False):
        tokens = join(tokens, window.tokens, right_start, left_end)
    return tokens


def confidence(tokens: Sequence[TimedToken]) -> float | None:
    """The geometric mean of the tokens' probabilities, None if there are none."""
    return math.exp(sum(token.log_prob for token in tokens) / len(tokens)) if tokens else None
