"""Greedy and beam decoding with a preallocated key/value cache.

Rows that have ended leave the batch, so late steps cost what the unfinished rows cost. The length cap depends on each
utterance, not on the batch's padding, so batching does not change results.

    hypotheses = decode(model, states, lengths, prompt_ids, prompt_lengths, eos_id, DecodeSettings(beam_size=4))
    hypotheses[0][0].ids         # best of the first utterance

Shapes: B utterances, P prompt tokens, T encoder frames, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raytrain.data.batch import SpeechBatch
from raytrain.decoding.beam import Ranking, beam_search
from raytrain.decoding.greedy import greedy_search
from raytrain.decoding.hypothesis import Hypothesis
from raytrain.decoding.settings import DecodeSettings
from raytrain.decoding.steps import PromptGroup
from raytrain.errors import DataError
from raytrain.model.canary import Canary


@torch.no_grad()
def decode(
    model: Canary,
    states: Tensor,
    lengths: Tensor,
    prompt_ids: Tensor,
    prompt_lengths: Tensor,
    eos_id: int,
    settings: DecodeSettings | None = None,
    ctc_log_probs: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """The `n_best` hypotheses of each utterance, best first.

    `states` (B, T, D) and `lengths` (B,) come from `Canary.encode`, `prompt_ids` (B, P) with `prompt_lengths` (B,) from
    the tokenizer; prompts of unequal length are decoded group by group. `ctc_log_probs` (B, T, V + 1), which
    `ctc_weight` needs, come from `Canary.encode_with_ctc`. Raises `DataError` for an empty prompt or one that leaves no
    position to generate.
    """
    settings = settings or DecodeSettings()
    sizes = prompt_lengths.tolist()
    _check_prompts(sizes, model.config.max_positions)
    room = (lengths + settings.max_generation_delta).clamp_max(model.config.max_positions) - prompt_lengths
    results = [[Hypothesis.empty()] for _ in sizes]
    for size in sorted(set(sizes)):
        rows = ((prompt_lengths == size) & (room > 0)).nonzero().flatten()
        if not len(rows):
            continue
        valid = lengths[rows].clamp_min(1)
        group = PromptGroup(states[rows, : int(valid.max())], valid, prompt_ids[rows, :size], room[rows])
        for row, hypotheses in zip(rows.tolist(), _search(model, group, eos_id, settings), strict=True):
            results[row] = hypotheses
    if not settings.ctc_weight:
        return results
    assert ctc_log_probs is not None, "ctc_weight needs ctc_log_probs"
    return [
        _ranked_with_ctc(hypotheses, log_probs[: int(length)], settings.ctc_weight)[: settings.n_best]
        for hypotheses, log_probs, length in zip(results, ctc_log_probs, lengths, strict=True)
    ]


def _check_prompts(sizes: list[int], max_positions: int) -> None:
    if sizes and (min(sizes) < 1 or max(sizes) >= max_positions):
        raise DataError(
            "a prompt must hold at least one token and leave room for text",
            got=f"{min(sizes)} to {max(sizes)} tokens",
            allowed=f"1 to {max_positions - 1}",
            remedy="pass prompts from raytrain.data.text.prompt.prompt_ids, with a shorter decodercontext",
        )


def _search(model: Canary, group: PromptGroup, eos_id: int, settings: DecodeSettings) -> list[list[Hypothesis]]:
    """The hypotheses of each utterance: all of the beam if CTC reranks them."""
    if settings.beam_size == 1:
        return [[hypothesis] for hypothesis in greedy_search(model, group, eos_id, settings.length_penalty)]
    ranking = Ranking(settings.beam_size if settings.ctc_weight else settings.n_best, settings.length_penalty)
    return beam_search(model, group, eos_id, settings.beam_size, ranking)


def _ranked_with_ctc(hypotheses: list[Hypothesis], log_probs: Tensor, weight: float) -> list[Hypothesis]:
    """Hypotheses of one utterance, ranked by both scores; `log_probs` (T, V + 1)."""
    if not hypotheses or not len(log_probs):
        return hypotheses
    sizes = torch.tensor([len(hypothesis.ids) for hypothesis in hypotheses], device=log_probs.device)
    targets = torch.zeros(len(hypotheses), max(1, int(sizes.max())), dtype=torch.long, device=log_probs.device)
    for row, hypothesis in enumerate(hypotheses):
        targets[row, : len(hypothesis.ids)] = torch.tensor(hypothesis.ids, dtype=torch.long)
    ctc_scores = -F.ctc_loss(
        log_probs[:, None].expand(-1, len(hypotheses), -1),
        targets,
        torch.full_like(sizes, len(log_probs)),
        sizes,
        blank=log_probs.shape[-1] - 1,
        reduction="none",
    )
    rescored = [
        replace(hypothesis, score=(1 - weight) * hypothesis.score + weight * ctc_score)
        for hypothesis, ctc_score in zip(hypotheses, ctc_scores.tolist(), strict=True)
    ]
    return sorted(rescored, key=lambda hypothesis: -hypothesis.score)


class Encoded(NamedTuple):
    """The encoder's output for a batch: `states` (B, T, D), `lengths` (B,), and log-probabilities of the CTC head (B,
    T, V + 1) if the search needs them."""

    states: Tensor
    lengths: Tensor
    ctc_log_probs: Tensor | None = None


def encode_batch(model: Canary, batch: SpeechBatch, settings: DecodeSettings) -> Encoded:
    """Run the encoder on a batch's audio."""
    if settings.ctc_weight:
        return Encoded(*model.encode_with_ctc(batch.audio, batch.audio_lengths))
    return Encoded(*model.encode(batch.audio, batch.audio_lengths))


def decode_batch(
    model: Canary, batch: SpeechBatch, encoded: Encoded, eos_id: int, settings: DecodeSettings
) -> list[list[Hypothesis]]:
    """`decode` a batch after its prompts."""
    prompts = batch.tokens[:, : int(batch.prompt_lengths.max())]
    states, lengths, ctc_log_probs = encoded
    return decode(model, states, lengths, prompts, batch.prompt_lengths, eos_id, settings, ctc_log_probs)


def transcribe_batch(
    model: Canary, batch: SpeechBatch, eos_id: int, settings: DecodeSettings
) -> list[list[Hypothesis]]:
    """`decode` a batch after its prompts, from its audio."""
    return decode_batch(model, batch, encode_batch(model, batch, settings), eos_id, settings)
