"""One token for each row of a batch: what greedy search repeats, with nothing read back to the host.

    steps = EagerSteps(model, states, mask, prompt, max_tokens)
    chosen, log_probs = steps.step()         # (R,) each, on the device
    slots = steps.keep([0, 2])               # go on with these rows; says which ones really go on

Shapes: R rows, P prompt tokens, T encoder frames, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raytrain.model.canary import Canary
from raytrain.model.linear import affine_of


def most_likely(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The best token of each row and its log-probability, in float32."""
    best, chosen = logits_RV.float().log_softmax(-1).max(-1)
    return chosen, best


class EagerSteps:
    """Steps whose shapes are as large as what they hold: `states` (R, T, D), `mask` (R, 1, 1, T) or None where no frame
    is padding, `prompt` (R, P), and room for `max_tokens` with the prompt."""

    def __init__(self, model: Canary, states: Tensor, mask: Tensor | None, prompt: Tensor, max_tokens: int) -> None:
        self.decoder, self.head = model.transf_decoder, affine_of(model.log_softmax.mlp["layer0"])
        self.cache = self.decoder.make_cache(states, max_tokens)
        self.mask, self.inputs, self.position = mask, prompt, 0

    def step(self) -> tuple[Tensor, Tensor]:
        """The next token of each row and its log-probability; the token is the next step's input."""
        hidden = self.decoder.extend(self.inputs, self.cache, self.position, self.mask)
        self.position += self.inputs.shape[1]
        chosen, log_probs = most_likely(self.head(hidden[:, -1]))
        self.inputs = chosen[:, None]
        return chosen, log_probs

    def keep(self, slots: list[int]) -> list[int]:
        """Go on with some rows."""
        index = torch.tensor(slots, device=self.inputs.device)
        self.inputs = self.inputs[index]
        self.mask = self.mask if self.mask is None else self.mask[index]
        self.cache = [layer.select(index, self.position) for layer in self.cache]
        return slots
