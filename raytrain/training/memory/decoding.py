"""Predict the memory of decoding a batch without the device, as `memory.tracer` does for a training step.

The encoder runs on `meta` tensors, then the search's most expensive steps: the prompt's, the last one with a full cache
of keys and values for every beam, and the copy of that cache when ended utterances leave the batch.

    sizes = BatchSizes(DecodeTracer(model_config, settings), budget_bytes=60 << 30)
    sizes.largest(12_000)      # utterances of 12 s that fit together
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raytrain.data.batch import SpeechBatch
from raytrain.decoding.settings import DecodeSettings
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.model.encoder import subsampled
from raytrain.model.features import HOP
from raytrain.training.memory.live_bytes import DeviceLike, LiveBytes
from raytrain.training.memory.prediction import Prediction, predict_batch_size
from raytrain.training.memory.surface import NeighborLines
from raytrain.training.memory.tracer import StepMemory, meta_batch, without_gc

_PROMPT_TOKENS = 10
_FIRST_EDGE_MS, _RATIO = 1000, 1.15
_aten = torch.ops.aten


class _EvaluationLike(DeviceLike):
    """`DeviceLike` without gradients: then a CPU also has an attention kernel that keeps no scores."""

    def __init__(self, device_type: str) -> None:
        super().__init__(device_type, lambda: None)
        self._on_cuda, self._efficient_attention = self._efficient_attention, True

    def _mixed(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout_p: float, is_causal: bool
    ) -> Tensor:
        if self._on_cuda:
            return super()._mixed(query, key, value, bias, dropout_p, is_causal)
        attend = _aten._scaled_dot_product_flash_attention_for_cpu
        return attend(query, key, value, dropout_p, is_causal, attn_mask=bias)[0]


class DecodeTracer:
    """Traces encoding and search of a model as a `device_type` (cuda or cpu) would run them in float32."""

    def __init__(self, config: ModelConfig, settings: DecodeSettings, *, device_type: str = "cuda") -> None:
        self._config, self._settings, self._device_type = config, settings, device_type
        with torch.device("meta"):
            self._model = Canary(config).eval()
        self._meter = LiveBytes()

    def most_tokens(self, duration_ms: int) -> int:
        """Prompt and text of an utterance take at most this many positions; see `DecodeSettings`."""
        frames = int(subsampled(torch.tensor(duration_ms * self._config.sample_rate // 1000 // HOP)))
        return max(2, min(self._config.max_positions, frames + self._settings.max_generation_delta))

    @torch.no_grad()
    def trace(self, batch_size: int, max_duration_ms: int, max_tokens: int) -> StepMemory:
        """Bytes to decode `batch_size` utterances of `max_duration_ms` into texts that fill `max_tokens` positions."""
        meter = self._meter
        meter.reset()
        batch = meta_batch(self._config, batch_size, max_duration_ms, min(_PROMPT_TOKENS, max_tokens - 1))
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            meter.watch(tensor, "parameters", "model")
        resident = meter.live
        for tensor in batch.tensors():
            meter.watch(tensor, "activations", "batch")
        with without_gc(), torch.device("meta"), meter, _EvaluationLike(self._device_type):
            self._decode(batch, max_tokens)
        return StepMemory.of(meter, resident)

    def _decode(self, batch: SpeechBatch, max_tokens: int) -> None:
        model, meter, beams = self._model, self._meter, self._settings.beam_size
        meter.phase, meter.area = "activations", "encoder"
        if self._settings.ctc_weight:
            states, lengths, ctc = model.encode_with_ctc(batch.audio, batch.audio_lengths)
        else:
            (states, lengths), ctc = model.encode(batch.audio, batch.audio_lengths), None
        meter.area = "decoder"
        size, prompt = len(batch), batch.tokens
        rows = torch.arange(size)
        selected = states[rows]  # the search copies the rows of one prompt length
        decoder, mask = model.transf_decoder, model.cross_mask(selected, lengths)
        cache = decoder.make_cache(selected, max_tokens)
        scores = self._scores(decoder.extend(prompt, cache, 0, mask))
        if beams > 1:
            rows = rows.repeat_interleave(beams, output_size=size * beams)
            cache = [layer.select(rows, prompt.shape[1], slice(None)) for layer in cache]
            hypotheses = torch.empty(2, size, beams, max_tokens)
        last = max_tokens - 1
        scores = self._scores(decoder.extend(torch.empty(size * beams, 1, dtype=torch.long), cache, last, mask, beams))
        if beams > 1:
            scores = scores.unflatten(0, (-1, beams)).topk(min(beams, scores.shape[-1]))
            for layer in cache:
                layer.reorder(rows, max_tokens)
            hypotheses = hypotheses[:, torch.arange(size)]
        cache = [layer.select(torch.arange(size * beams), last, torch.arange(size)) for layer in cache]
        del selected, ctc, states, scores, cache

    def _scores(self, hidden: Tensor) -> Tensor:
        return self._model.log_softmax(hidden[:, -1]).float().log_softmax(-1)


class BatchSizes:
    """The largest batch by duration that fits `budget_bytes`, at most `max_size`.

    Durations share a prediction up to the next edge, 15 % apart, so that a corpus takes about twenty traces.
    """

    def __init__(self, tracer: DecodeTracer, budget_bytes: int, max_size: int = 256) -> None:
        self._tracer, self.budget_bytes, self.max_size = tracer, budget_bytes, max_size
        self._predictions: dict[int, Prediction] = {}
        self._neighbors = NeighborLines()

    def prediction(self, duration_ms: int) -> Prediction:
        """The largest batch at the edge of `duration_ms`; its `batch_size` is None if not even one utterance fits."""
        edge = upper_edge(duration_ms)
        if edge not in self._predictions:
            tokens = self._tracer.most_tokens(edge)
            guess = self._neighbors.guess(edge, tokens)
            prediction = predict_batch_size(self._tracer, edge, tokens, self.budget_bytes, self.max_size, guess)
            self._neighbors.add(edge, tokens, prediction.line)
            self._predictions[edge] = prediction
        return self._predictions[edge]

    def largest(self, duration_ms: int) -> int:
        """Utterances of `duration_ms` to decode together, at least 1: the device decides whether a single one fits."""
        return self.prediction(duration_ms).batch_size or 1


def upper_edge(duration_ms: int) -> int:
    """The shortest edge of at least `duration_ms`; an edge maps to itself."""
    step = max(0, math.floor(math.log(max(duration_ms, 1) / _FIRST_EDGE_MS, _RATIO)) - 1)
    while (edge := math.ceil(_FIRST_EDGE_MS * _RATIO**step)) < duration_ms:
        step += 1
    return edge
