"""Beam search. Finished utterances leave the batch, and the beams of an utterance share its encoder states.

Shapes: B utterances, K beams, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from raytrain.decoding.hypothesis import Hypothesis, length_penalty
from raytrain.decoding.steps import NextToken, PromptGroup, default_sync_interval
from raytrain.errors import DataError
from raytrain.model.canary import Canary
from raytrain.model.decoder import LayerCache


class Ranking(NamedTuple):
    """How many hypotheses of each utterance are returned, and how they are ranked; see `DecodeSettings`."""

    n_best: int
    length_penalty: float


def beam_search(
    model: Canary,
    group: PromptGroup,
    eos_id: int,
    beam_size: int,
    ranking: Ranking,
    *,
    sync_interval: int | None = None,
) -> list[list[Hypothesis]]:
    """The best hypotheses of each utterance, best first.

    An utterance ends when no live beam can overtake its `n_best` ended ones, so that more steps would change nothing;
    the host need not notice at once, so it synchronizes with the device every `sync_interval` steps.
    """
    batch, size = group.prompt.shape
    limits = group.limits.tolist()
    interval, most = sync_interval or default_sync_interval(group.states), max(limits)
    results = [[Hypothesis.empty()] for _ in range(batch)]
    if most < 1:
        return results
    next_token, mask = NextToken.of(model), group.mask(model)
    # The prompt is the same in all beams: it runs once per utterance and its keys are then repeated.
    cache = next_token.decoder.make_cache(group.states, size + most)
    log_probs = next_token.log_probs(group.prompt, cache, 0, mask)
    beams = _first_beams(log_probs, group.limits, mask, beam_size, most, eos_id)
    repeat = torch.arange(batch, device=group.states.device).repeat_interleave(beam_size)
    beams.cache = [layer.select(repeat, size, slice(None)) for layer in cache]
    for step in range(1, most + 1):
        filled = size + step - 1
        if step % interval == 0 or step >= min(limits[row] for row in beams.rows):
            beams = _retire(results, beams, step, filled, eos_id, ranking)
            if not beams.rows:
                break
        inputs = beams.ids[:, :, step - 1].reshape(-1, 1)
        log_probs = next_token.log_probs(inputs, beams.cache, filled, beams.mask, beam_size)
        _grow(beams, log_probs.unflatten(0, (-1, beam_size)), step, size, eos_id, ranking.length_penalty)
    return results


@dataclass
class _Beams:
    """Search state of the unfinished utterances, (B, K) each; a beam that has ended keeps its slot and score.

    `rows` are the utterances' numbers in the batch, `limits` (B, 1) their length caps and `mask` their frames; `ids`
    and `log_probs` (B, K, most) hold the generated tokens; `sizes` counts tokens, the end included.
    """

    rows: list[int]
    limits: Tensor
    mask: Tensor | None
    ids: Tensor
    log_probs: Tensor
    totals: Tensor
    sizes: Tensor
    ended: Tensor
    cache: list[LayerCache] = field(default_factory=list)

    def scores(self, alpha: float) -> Tensor:
        """(B, K): the scores that rank hypotheses."""
        return self.totals / length_penalty(self.sizes, alpha)

    def are_decided(self, step: int, ranking: Ranking) -> list[bool]:
        """For each utterance, whether more steps would change nothing."""
        # A live beam can at best keep its log-probability and use up its length.
        best = self.totals / length_penalty(self.limits, ranking.length_penalty)
        reachable = torch.where(self.ended, float("-inf"), best)
        ended = torch.where(self.ended, self.scores(ranking.length_penalty), float("-inf"))
        decided = ended.topk(ranking.n_best).values[:, -1] >= reachable.amax(1)
        values: list[bool] = (decided | self.ended.all(1) | (step >= self.limits[:, 0])).tolist()
        return values

    def hypotheses(self, slots: list[int], step: int, eos_id: int, ranking: Ranking) -> list[list[Hypothesis]]:
        """The best hypotheses of these utterances, as they are after `step` steps."""
        scores = self.scores(ranking.length_penalty)
        rows = torch.tensor(slots, device=scores.device)[:, None]
        order = scores[rows[:, 0]].argsort(dim=1, descending=True, stable=True)[:, : ranking.n_best]
        ids, values = (part[rows, order, :step].tolist() for part in (self.ids, self.log_probs))
        return [
            [Hypothesis.of(*text, eos_id, ranking.length_penalty) for text in zip(*beams, strict=True)]
            for beams in zip(ids, values, strict=True)
        ]

    def select(self, slots: list[int], filled: int) -> _Beams:
        """Keep these utterances."""
        keep, beams = torch.tensor(slots, dtype=torch.long, device=self.ids.device), self.ids.shape[1]
        flat = (keep[:, None] * beams + torch.arange(beams, device=keep.device)).flatten()
        return _Beams(
            rows=[self.rows[slot] for slot in slots],
            limits=self.limits[keep],
            mask=None if self.mask is None else self.mask[keep],
            ids=self.ids[keep],
            log_probs=self.log_probs[keep],
            totals=self.totals[keep],
            sizes=self.sizes[keep],
            ended=self.ended[keep],
            cache=[layer.select(flat, filled, keep) for layer in self.cache],
        )


def _first_beams(
    log_probs_BV: Tensor, limits: Tensor, mask: Tensor | None, beam_size: int, most: int, eos_id: int
) -> _Beams:
    batch, vocab = log_probs_BV.shape
    best, chosen = log_probs_BV.topk(min(beam_size, vocab))
    if beam_size > vocab:
        raise DataError(
            "beam_size is larger than the vocabulary", got=beam_size, allowed=f"1 to {vocab}", remedy="lower beam_size"
        )
    ids = torch.full((batch, beam_size, most), eos_id, device=chosen.device)
    values = torch.zeros(batch, beam_size, most, device=chosen.device)
    ids[:, :, 0], values[:, :, 0] = chosen, best
    return _Beams(
        rows=list(range(batch)),
        limits=limits[:, None],
        mask=mask,
        ids=ids,
        log_probs=values,
        totals=best,
        sizes=torch.ones_like(chosen),
        ended=chosen == eos_id,
    )


def _grow(beams: _Beams, log_probs_BKV: Tensor, step: int, prompt_size: int, eos_id: int, alpha: float) -> None:
    """Extend live beams by one token each and keep the best K of all; ended beams compete unchanged."""
    beam_size = log_probs_BKV.shape[1]
    # K candidates of each beam suffice, since at most K survive.
    gains, chosen = log_probs_BKV.topk(beam_size)
    ended = beams.ended[:, :, None]
    first = torch.arange(beam_size, device=chosen.device) == 0
    gains = torch.where(ended, torch.where(first, 0.0, float("-inf")), gains)
    chosen = chosen.masked_fill(ended, eos_id)
    totals = beams.totals[:, :, None] + gains
    sizes = beams.sizes[:, :, None] + ~ended
    ranking = (totals / length_penalty(sizes, alpha)).flatten(1).topk(beam_size).indices
    parent = ranking // beam_size
    index = parent[:, :, None].expand(-1, -1, beams.ids.shape[2])
    picked = chosen.flatten(1).gather(1, ranking)
    beams.ids = beams.ids.gather(1, index)
    beams.log_probs = beams.log_probs.gather(1, index)
    beams.ids[:, :, step] = picked
    beams.log_probs[:, :, step] = gains.flatten(1).gather(1, ranking)
    beams.totals = totals.flatten(1).gather(1, ranking)
    beams.sizes = sizes.expand(-1, -1, beam_size).flatten(1).gather(1, ranking)
    beams.ended = beams.ended.gather(1, parent) | (picked == eos_id)
    rows = torch.arange(parent.shape[0], device=parent.device)[:, None] * beam_size + parent
    filled = prompt_size + step
    for layer in beams.cache:
        layer.reorder(rows.flatten(), filled)


def _retire(
    results: list[list[Hypothesis]], beams: _Beams, step: int, filled: int, eos_id: int, ranking: Ranking
) -> _Beams:
    """Write the hypotheses of finished utterances; returns the beams of the rest."""
    decided = beams.are_decided(step, ranking)
    if not any(decided):
        return beams
    finished = [slot for slot, is_decided in enumerate(decided) if is_decided]
    unfinished = [slot for slot, is_decided in enumerate(decided) if not is_decided]
    for slot, hypotheses in zip(finished, beams.hypotheses(finished, step, eos_id, ranking), strict=True):
        results[beams.rows[slot]] = hypotheses
    return beams.select(unfinished, filled)
