"""An exponential moving average of the weights, which often decodes better than the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average of a model's trainable parameters, on their device: average ← d·average + (1 − d)·weights, each step.

    d rises with the number of updates t as (1 + t) / (10 + t), up to `decay`, so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._names, self._weights = [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._names.append(name)
                self._weights.append(parameter)
        self._average = [weight.detach().clone() for weight in self._weights]
        # A tied weight has several names in a model's state, and is one and the same under all of them.
        place = {id(weight): number for number, weight in enumerate(self._weights)}
        every = model.named_parameters(remove_duplicate=False)
        self._aliases = {name: place[id(weight)] for name, weight in every if id(weight) in place}
        self._decay, self._updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self._weights, self._average, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by each name of a parameter, and the number of updates as `updates`; all ranks must ask for it."""
        whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in self._average]
        averages = {name: whole[number] for name, number in self._aliases.items()}
        return {**averages, "updates": torch.tensor(self._updates)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for name, average in zip(self._names, self._average, strict=True):
            value = state[name].to(average.device)
            if hasattr(average, "full_tensor"):  # of a sharded model
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value, average.device_mesh, average.placements)
            average.copy_(value)
        self._updates = int(state["updates"])
