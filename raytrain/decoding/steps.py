"""One token for each row of a batch: the step that both searches repeat, without reading anything back to the host.

    steps = EagerSteps(model, group, max_tokens)
    chosen, log_probs = steps.step()         # (R,) each, on the device
    slots = steps.keep([0, 2])               # continue with these rows; returns the rows actually kept

Shapes: R rows, P prompt tokens, T encoder frames, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raytrain.model.canary import Canary
from raytrain.model.decoder import LayerCache, TransformerDecoder
from raytrain.model.linear import Linear

# Steps between two synchronizations of the host with a GPU, to see which rows have ended. A wait costs about as much as
# a step; and so does a step after the end.
SYNC_INTERVAL = 8


def default_sync_interval(states: Tensor) -> int:
    """On a CPU a synchronization costs nothing."""
    return SYNC_INTERVAL if states.is_cuda else 1


@dataclass(frozen=True)
class PromptGroup:
    """Utterances whose prompts have the same length: encoder `states` (R, T, D), their `lengths` (R,) of at least 1,
    `prompt` (R, P), and `limits` (R,), how many tokens each row may generate, the end included."""

    states: Tensor
    lengths: Tensor
    prompt: Tensor
    limits: Tensor

    def mask(self, model: Canary) -> Tensor | None:
        """(R, 1, 1, T): the frames that cross-attention sees; None if no frame is padding, which is faster."""
        if bool((self.lengths == self.states.shape[1]).all()):
            return None
        return model.cross_mask(self.states, self.lengths)


@dataclass(frozen=True)
class NextToken:
    """A model's distribution of the next token."""

    decoder: TransformerDecoder
    head: Linear

    @classmethod
    def of(cls, model: Canary) -> NextToken:
        """The distribution of a model whose weights are looked up once."""
        return cls(model.transf_decoder, model.head())

    def log_probs(
        self, ids: Tensor, cache: list[LayerCache], start: int | Tensor, mask: Tensor | None, beams: int = 1
    ) -> Tensor:
        """(R, V) float32, after `ids` (R, U) at positions from `start` on; see `TransformerDecoder.extend`."""
        hidden = self.decoder.extend(ids, cache, start, mask, beams)
        return self.head(hidden[:, -1]).float().log_softmax(-1)

    def best(
        self, ids: Tensor, cache: list[LayerCache], start: int | Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The most likely token of each row and its log-probability, (R,) each."""
        best, chosen = self.log_probs(ids, cache, start, mask).max(-1)
        return chosen, best


class Steps(Protocol):
    """Greedy steps of a batch that may shrink."""

    def step(self) -> tuple[Tensor, Tensor]:
        """The next token of each row and its log-probability; the token is the next step's input."""

    def keep(self, slots: list[int]) -> list[int]:
        """Continue with these rows, or with more if that is free; returns the rows kept."""


class EagerSteps:
    """Steps with the exact shapes of their content and room for `max_tokens`, the prompt included."""

    def __init__(self, model: Canary, group: PromptGroup, max_tokens: int) -> None:
        self.next_token = NextToken.of(model)
        self.mask = group.mask(model)
        self.cache = self.next_token.decoder.make_cache(group.states, max_tokens)
        self.inputs, self.position = group.prompt, 0

    def step(self) -> tuple[Tensor, Tensor]:
        """See `Steps.step`."""
        chosen, log_probs = self.next_token.best(self.inputs, self.cache, self.position, self.mask)
        self.position += self.inputs.shape[1]
        self.inputs = chosen[:, None]
        return chosen, log_probs

    def keep(self, slots: list[int]) -> list[int]:
        """See `Steps.keep`."""
        index = torch.tensor(slots, device=self.inputs.device)
        self.inputs = self.inputs[index]
        self.mask = self.mask if self.mask is None else self.mask[index]
        self.cache = [layer.select(index, self.position) for layer in self.cache]
        return slots
