"""Greedy and beam decoding with a preallocated key/value cache.

Rows that have ended leave the batch, so late steps cost what the unfinished rows cost. The length cap is each
utterance's own, not that of the batch's padding, so a batch gives what its members give alone. The host does not wait
for a GPU at every token: it looks every few steps which rows have ended, and cuts what they said after their end.

    hypotheses = decode(model, states, lengths, prompt_ids, prompt_lengths, eos_id, DecodeSettings(beam_size=4))
    hypotheses[0][0].ids         # best of the first utterance

Shapes: B utterances, K beams, T encoder frames, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raytrain.decoding.graphs import Programs, StaticSteps, programs_for
from raytrain.decoding.settings import DecodeSettings as DecodeSettings
from raytrain.decoding.steps import EagerSteps
from raytrain.errors import DataError
from raytrain.model.canary import Canary
from raytrain.model.decoder import LayerCache
from raytrain.model.linear import affine_of

# Steps between two looks of the host at a GPU. A wait costs about as much as a step; so does a step after the end.
LOOK_EVERY = 8


@dataclass(frozen=True)
class Hypothesis:
    """One decoded text: generated `ids` without prompt and end, the log-probability of each, the sum of them
    and of the end of text in `log_prob`, and the `score` that hypotheses rank by. `ended` is false where the
    length cap cut it off."""

    ids: list[int]
    token_log_probs: list[float]
    log_prob: float
    score: float
    ended: bool


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

    `states` (B, T, D) and `lengths` (B,) come from `Canary.encode`, `prompt_ids` (B, P) with `prompt_lengths`
    (B,) from the tokenizer; prompts of unequal length are decoded group by group. `ctc_log_probs` (B, T, V + 1), which
    `ctc_weight` needs, come from `Canary.encode_with_ctc`. Raises `DataError` for an
    empty prompt and for one that leaves no position to generate.
    """
    settings = settings or DecodeSettings()
    results: list[list[Hypothesis]] = [[] for _ in range(states.shape[0])]
    sizes = prompt_lengths.tolist()
    if sizes and (min(sizes) < 1 or max(sizes) >= model.config.max_positions):
        raise DataError(
            "a prompt must hold at least one token and leave room for text",
            got=f"{min(sizes)} to {max(sizes)} tokens",
            allowed=f"1 to {model.config.max_positions - 1}",
            remedy="pass prompts from raytrain.data.text.prompt.prompt_ids, with a shorter decodercontext",
        )
    search = _greedy if settings.beam_size == 1 else _beam
    wanted = replace(settings, n_best=settings.beam_size) if settings.ctc_weight else settings
    room = (lengths + settings.max_generation_delta).clamp_max(model.config.max_positions) - prompt_lengths
    for row in (room < 1).nonzero().flatten().tolist():
        results[row] = [Hypothesis([], [], 0.0, 0.0, False)]
    for size in sorted(set(sizes)):
        rows = ((prompt_lengths == size) & (room > 0)).nonzero().flatten()
        if not len(rows):
            continue
        limits = room[rows]
        own = lengths[rows].clamp_min(1)
        group = search(model, states[rows, : int(own.max())], own, prompt_ids[rows, :size], limits, eos_id, wanted)
        for row, hypotheses in zip(rows.tolist(), group, strict=True):
            results[row] = hypotheses
    if settings.ctc_weight:
        for row, hypotheses in enumerate(results):
            one = ctc_log_probs[row, : int(lengths[row])]
            results[row] = _ranked_with_ctc(hypotheses, one, settings.ctc_weight)[: settings.n_best]
    return results


def _ranked_with_ctc(hypotheses: list[Hypothesis], log_probs: Tensor, weight: float) -> list[Hypothesis]:
    """Hypotheses of one utterance by both scores; `log_probs` (T, V + 1)."""
    if not hypotheses or not len(log_probs):
        return hypotheses
    sizes = torch.tensor([len(one.ids) for one in hypotheses], device=log_probs.device)
    targets = torch.zeros(len(hypotheses), max(1, int(sizes.max())), dtype=torch.long, device=log_probs.device)
    for place, one in enumerate(hypotheses):
        targets[place, : len(one.ids)] = torch.tensor(one.ids, dtype=torch.long)
    heard = -F.ctc_loss(
        log_probs[:, None].expand(-1, len(hypotheses), -1),
        targets,
        torch.full_like(sizes, len(log_probs)),
        sizes,
        blank=log_probs.shape[-1] - 1,
        reduction="none",
    )
    both = [
        replace(one, score=(1 - weight) * one.score + weight * value)
        for one, value in zip(hypotheses, heard.tolist(), strict=True)
    ]
    return sorted(both, key=lambda one: -one.score)


def transcribe_batch(model: Canary, batch: Any, eos_id: int, settings: DecodeSettings) -> list[list[Hypothesis]]:
    """`decode` of a `SpeechBatch` after its prompts, from its audio."""
    ctc = None
    if settings.ctc_weight:
        states, lengths, ctc = model.encode_with_ctc(batch.audio, batch.audio_lengths)
    else:
        states, lengths = model.encode(batch.audio, batch.audio_lengths)
    prompts = batch.tokens[:, : int(batch.prompt_lengths.max())]
    return decode(model, states, lengths, prompts, batch.prompt_lengths, eos_id, settings, ctc)


def greedy(
    model: Canary,
    states: Tensor,
    lengths: Tensor,
    prompt_ids: Tensor,
    prompt_lengths: Tensor,
    eos_id: int,
    *,
    max_generation_delta: int = 50,
) -> list[list[int]]:
    """Generated ids of each utterance by greedy search; see `decode`."""
    settings = DecodeSettings(max_generation_delta=max_generation_delta)
    found = decode(model, states, lengths, prompt_ids, prompt_lengths, eos_id, settings)
    return [hypotheses[0].ids for hypotheses in found]


def _greedy(
    model: Canary,
    states: Tensor,
    lengths: Tensor,
    prompt: Tensor,
    limits: Tensor,
    eos_id: int,
    settings: DecodeSettings,
    look_every: int | None = None,
    programs: Programs | None = None,
) -> list[list[Hypothesis]]:
    """One prompt length; `limits` (B,): how many tokens each row may generate, the end included.

    `look_every` and `programs` are chosen by the device, if not given; the results do not depend on them.
    """
    batch, size = prompt.shape
    left, every = limits.tolist(), look_every or _look_every(states)
    most, frames = max(left), states.shape[1]
    programs = programs or programs_for(model, states)
    static = programs is not None and programs.have_room(batch, frames, size + most)
    mask = _cross_mask(model, states, lengths)
    steps = EagerSteps(model, states, mask, prompt, size if static else size + most)
    owners, over, pending = list(range(batch)), [False] * batch, []
    ids: list[list[int]] = [[] for _ in owners]
    spans: list[tuple[list[int], Tensor]] = []  # rows and log-probabilities (R, steps) from one look to the next
    for step in range(1, most + 1):
        pending.append(steps.step())
        if static and step == 1 and most > 1:
            steps = StaticSteps(programs, steps)
        if step % every and step < most:
            continue
        chosen, log_probs = (torch.stack(part, 1) for part in zip(*pending, strict=True))
        spans.append((owners, log_probs))
        tokens, pending = chosen.tolist(), []
        for row, own in zip(owners, tokens, strict=True):
            ids[row] += own
            over[row] = over[row] or step >= left[row] or eos_id in own
        keep = [i for i, row in enumerate(owners) if not over[row]]
        if not keep:
            break
        if len(keep) < len(owners):
            owners = [owners[i] for i in steps.keep(keep)]
    return [
        [_finish(own[:limit], values[:limit], eos_id, settings.length_penalty)]
        for own, values, limit in zip(ids, _by_row(spans, batch), left, strict=True)
    ]


def _look_every(states: Tensor) -> int:
    """On a CPU a look costs nothing."""
    return LOOK_EVERY if states.is_cuda else 1


def _by_row(spans: list[tuple[list[int], Tensor]], batch: int) -> list[list[float]]:
    """Each row's values in order, read from the device at once."""
    found: list[list[float]] = [[] for _ in range(batch)]
    flat = torch.cat([values.flatten() for _, values in spans]).tolist()
    first = 0
    for owners, values in spans:
        size = values.shape[1]
        for row in owners:
            found[row] += flat[first : first + size]
            first += size
    return found


def _cross_mask(model: Canary, states: Tensor, lengths: Tensor) -> Tensor | None:
    """Attention is faster without a mask, where no frame is padding."""
    return None if bool((lengths == states.shape[1]).all()) else model.cross_mask(states, lengths)


def _finish(ids: list[int], log_probs: list[float], eos_id: int, alpha: float) -> Hypothesis:
    ended = eos_id in ids
    size = ids.index(eos_id) if ended else len(ids)
    used = size + ended
    total = float(sum(log_probs[:used]))
    return Hypothesis(ids[:size], log_probs[:size], total, total / _penalty(used, alpha), ended)


def _penalty(num_tokens: int | Tensor, alpha: float) -> float | Tensor:
    return ((5 + num_tokens) / 6) ** alpha


@dataclass
class _Beams:
    """Search state of the unfinished utterances, (B, K) each; a beam that has ended keeps its slot and score.

    `owners` are the utterances' numbers in the batch and `limits` (B, 1) their length caps; `ids` and `log_probs`
    (B, K, most) hold what was generated; `sizes` counts tokens, the end included.
    """

    owners: list[int]
    limits: Tensor
    ids: Tensor
    log_probs: Tensor
    totals: Tensor
    sizes: Tensor
    ended: Tensor
    cache: list[LayerCache] = field(default_factory=list)

    def scores(self, alpha: float) -> Tensor:
        """(B, K): what hypotheses rank by."""
        return self.totals / _penalty(self.sizes, alpha)

    def rows(self, slots: list[int], filled: int) -> _Beams:
        """Keep some utterances."""
        keep, beams = torch.tensor(slots, dtype=torch.long, device=self.ids.device), self.ids.shape[1]
        flat = (keep[:, None] * beams + torch.arange(beams, device=keep.device)).flatten()
        cache = [layer.select(flat, filled, keep) for layer in self.cache]
        parts = (self.limits, self.ids, self.log_probs, self.totals, self.sizes, self.ended)
        return _Beams([self.owners[i] for i in slots], *(part[keep] for part in parts), cache=cache)


def _beam(
    model: Canary,
    states: Tensor,
    lengths: Tensor,
    prompt: Tensor,
    limits: Tensor,
    eos_id: int,
    settings: DecodeSettings,
    look_every: int | None = None,
) -> list[list[Hypothesis]]:
    """Beam search over one prompt length; see `_greedy`. An utterance ends when no live beam can still overtake
    its `n_best` ended ones, so that more steps would change nothing; the host need not look at once."""
    batch, size = prompt.shape
    device, beams, left = states.device, settings.beam_size, limits.tolist()
    every, most = look_every or _look_every(states), max(left)
    results: list[list[Hypothesis]] = [[Hypothesis([], [], 0.0, 0.0, False)] for _ in range(batch)]
    if most < 1:
        return results
    decoder, mask = model.transf_decoder, _cross_mask(model, states, lengths)
    # The prompt is the same in all beams: it runs once per utterance and its keys are then repeated.
    cache = decoder.make_cache(states, size + most)
    head = affine_of(model.log_softmax.mlp["layer0"])
    log_probs = head(decoder.extend(prompt, cache, 0, mask)[:, -1]).float().log_softmax(-1)
    search = _first_beams(log_probs, limits, beams, most, eos_id)
    repeat = torch.arange(batch, device=device).repeat_interleave(beams)
    search.cache = [layer.select(repeat, size, slice(None)) for layer in cache]
    for step in range(1, most + 1):
        filled = size + step - 1
        if step % every == 0 or step >= min(left[row] for row in search.owners):
            search, mask = _retire(results, search, mask, eos_id, settings, step, filled)
            if not search.owners:
                break
        inputs = search.ids[:, :, step - 1].reshape(-1, 1)
        hidden = decoder.extend(inputs, search.cache, filled, mask, beams)
        log_probs = head(hidden[:, -1]).float().log_softmax(-1).unflatten(0, (-1, beams))
        _grow(search, log_probs, step, size, eos_id, settings.length_penalty)
    return results


def _first_beams(log_probs_BV: Tensor, limits: Tensor, beams: int, most: int, eos_id: int) -> _Beams:
    batch, vocab = log_probs_BV.shape
    best, chosen = log_probs_BV.topk(min(beams, vocab))
    if beams > vocab:
        raise DataError(
            "beam_size is larger than the vocabulary", got=beams, allowed=f"1 to {vocab}", remedy="lower beam_size"
        )
    ids = torch.full((batch, beams, most), eos_id, device=chosen.device)
    values = torch.zeros(batch, beams, most, device=chosen.device)
    ids[:, :, 0], values[:, :, 0] = chosen, best
    ended = chosen == eos_id
    return _Beams(list(range(batch)), limits[:, None], ids, values, best, torch.ones_like(chosen), ended)


def _grow(search: _Beams, log_probs_BKV: Tensor, step: int, prompt_size: int, eos_id: int, alpha: float) -> None:
    """Extend live beams by one token each and keep the best K of all; ended beams stand for themselves."""
    beams, vocab = log_probs_BKV.shape[1:]
    # K candidates of each beam suffice, since at most K survive.
    gains, chosen = log_probs_BKV.topk(beams)
    ended = search.ended[:, :, None]
    first = torch.arange(beams, device=chosen.device) == 0
    gains = torch.where(ended, torch.where(first, 0.0, float("-inf")), gains)
    chosen = chosen.masked_fill(ended, eos_id)
    totals = search.totals[:, :, None] + gains
    sizes = search.sizes[:, :, None] + ~ended
    ranking = (totals / _penalty(sizes, alpha)).flatten(1).topk(beams).indices
    parent = ranking // beams
    index = parent[:, :, None].expand(-1, -1, search.ids.shape[2])
    picked = chosen.flatten(1).gather(1, ranking)
    search.ids = search.ids.gather(1, index)
    search.log_probs = search.log_probs.gather(1, index)
    search.ids[:, :, step] = picked
    search.log_probs[:, :, step] = gains.flatten(1).gather(1, ranking)
    search.totals = totals.flatten(1).gather(1, ranking)
    search.sizes = sizes.expand(-1, -1, beams).flatten(1).gather(1, ranking)
    search.ended = search.ended.gather(1, parent) | (picked == eos_id)
    rows = torch.arange(parent.shape[0], device=parent.device)[:, None] * beams + parent
    filled = prompt_size + step
    for layer in search.cache:
        layer.reorder(rows.flatten(), filled)


def _retire(
    results: list[list[Hypothesis]],
    search: _Beams,
    mask: Tensor | None,
    eos_id: int,
    settings: DecodeSettings,
    step: int,
    filled: int,
) -> tuple[_Beams, Tensor | None]:
    """Write the hypotheses of utterances that are decided, and go on with the others."""
    alpha, scores = settings.length_penalty, search.scores(settings.length_penalty)
    # A live beam can at best keep its log-probability and use up its length.
    reachable = torch.where(search.ended, float("-inf"), search.totals / _penalty(search.limits, alpha))
    ended = torch.where(search.ended, scores, float("-inf"))
    decided = ended.topk(settings.n_best).values[:, -1] >= reachable.amax(1)
    done = (decided | search.ended.all(1) | (step >= search.limits[:, 0])).tolist()
    over, keep = ([i for i, one in enumerate(done) if one is wanted] for wanted in (True, False))
    if not over:
        return search, mask
    rows = torch.tensor(over, device=scores.device)[:, None]
    order = scores[rows[:, 0]].argsort(dim=1, descending=True, stable=True)[:, : settings.n_best]
    ids, values = (part[rows, order, :step].tolist() for part in (search.ids, search.log_probs))
    for slot, *texts in zip(over, ids, values, strict=True):
        results[search.owners[slot]] = [_finish(*text, eos_id, alpha) for text in zip(*texts, strict=True)]
    search = search.rows(keep, filled)
    return search, mask if mask is None else mask[torch.tensor(keep, dtype=torch.long, device=mask.device)]
