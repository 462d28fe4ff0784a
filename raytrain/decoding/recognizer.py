"""A model that listens: batches of audio to tokens, windows of a recording to one text. Local or on a cluster.

recogniser = Recogniser(model, tokenizer, DecodeSettings(), torch.device("cpu"))
heard = recogniser.hear(batch, starts_s=[0.0, 36.2], timed=[True, True])
tokens = joined([(0.0, 40.0), (36.2, 70.0)], heard)
recogniser.text(tokens), confidence(tokens)
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raytrain.data.batch import SpeechBatch
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.decoding.alignment import token_spans
from raytrain.decoding.longform import TimedToken, join
from raytrain.decoding.precision import prepare_for_inference
from raytrain.decoding.search import DecodeSettings, Hypothesis, decode
from raytrain.errors import DataError
from raytrain.model.canary import Canary

PARTS = ("features", "encoder", "decoder")


class Heard(NamedTuple):
    """What a window holds: its best tokens, the ids of the other hypotheses, and whether the text came to its end."""

    tokens: list[TimedToken]
    others: list[list[int]]
    ended: bool


class Stopwatch:
    """Seconds that a device spends on the parts of a batch. On CUDA events tell them, and nothing waits for the GPU
    until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """What ran since the last mark was `part`; the first mark only starts."""
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
        found: Counter[str] = Counter()
        for (_, before), (part, after) in zip(marks, marks[1:], strict=False):
            found[part] += before.elapsed_time(after) / 1000 if self._on_cuda else after - before
        return found


class Recogniser:
    """A model on a device, and how to search. The model can't be trained any more (`prepare_for_inference`)."""

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

    def hear(
        self, batch: SpeechBatch, starts_s: Sequence[float], timed: Sequence[bool], limit: int | None = None
    ) -> list[Heard | DataError]:
        """The windows of a batch, at most `limit` of them at a time.

        `starts_s` are their times in the recordings. Tokens have times where `timed` asks for them, else NaN. The
        prompts are the first `prompt_lengths` of the batch's tokens. Where a GPU runs out of memory, halves are tried;
        a window that does not fit alone is answered with the error.
        """
        found: list[Heard | DataError] = []
        limit = limit or len(batch)
        while len(found) < len(batch):
            first, last = len(found), min(len(found) + limit, len(batch))
            own = slice(first, last)
            part = batch.part(own)
            # What did not fit is freed only after the except block has ended, which holds it.
            try:
                found += self._hear(part, starts_s[own], timed[own])
                continue
            except torch.OutOfMemoryError as error:
                why = str(error).strip().splitlines()[0]
            self._watch.take()
            torch.cuda.empty_cache()
            if len(part) == 1:
                seconds = int(part.audio_lengths[0]) / self.model.config.sample_rate
                found.append(
                    DataError(
                        f"{seconds:.1f} s of audio need more memory than the device has left",
                        why=why,
                        remedy="lower --window-seconds or --beam-size, or see that nothing else uses the device",
                    )
                )
            limit = -(-len(part) // 2)
        return found

    @torch.inference_mode()
    def _hear(self, batch: SpeechBatch, starts_s: Sequence[float], timed: Sequence[bool]) -> list[Heard]:
        settings, watch, samples = self.settings, self._watch, batch.audio_lengths.tolist()
        watch.mark("start")
        batch = batch.to(self.device)
        ctc = None
        if settings.ctc_weight:
            states, sizes, ctc = self.model.encode_with_ctc(batch.audio, batch.audio_lengths)
        else:
            states, sizes = self.model.encode(batch.audio, batch.audio_lengths)
        watch.mark("encoder")
        prompts = batch.tokens[:, : int(batch.prompt_lengths.max())]
        best = decode(self.model, states, sizes, prompts, batch.prompt_lengths, self.tokenizer.eos_id, settings, ctc)
        heard = []
        for row, (hypotheses, start_s) in enumerate(zip(best, starts_s, strict=True)):
            duration_s = samples[row] / self.model.config.sample_rate
            spans = self._spans(states, sizes, batch, row, hypotheses[0], duration_s) if timed[row] else None
            others = [one.ids for one in hypotheses[1:]]
            heard.append(Heard(self._timed(hypotheses[0], spans, start_s), others, hypotheses[0].ended))
        watch.mark("decoder")
        self._seconds += watch.take()
        return heard

    def _spans(
        self, states: Tensor, sizes: Tensor, batch: SpeechBatch, row: int, best: Hypothesis, duration_s: float
    ) -> list[tuple[float, float]]:
        own = slice(row, row + 1)
        prompt = batch.tokens[row, : int(batch.prompt_lengths[row])].tolist()
        found = token_spans(self.model, states[own], sizes[own], prompt, best.ids)
        return [(start, min(end, duration_s)) for start, end in found]

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


def joined(spans_s: Sequence[tuple[float, float]], heard: Sequence[Heard]) -> list[TimedToken]:
    """The tokens of a recording from those of its windows, which lie at `spans_s`."""
    tokens = heard[0].tokens
    for (_, left_end), (right_start, _), part in zip(spans_s, spans_s[1:], heard[1:], strict=False):
        tokens = join(tokens, part.tokens, right_start, left_end)
    return tokens


def confidence(tokens: Sequence[TimedToken]) -> float | None:
    """The geometric mean of the tokens' probabilities, None where there are none."""
    return math.exp(sum(token.log_prob for token in tokens) / len(tokens)) if tokens else None
