"""An exponential moving average of the weights, which often decode better than the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average of a model's trainable parameters, on their device: average ← d·average + (1 − d)·weights, each step.

    d rises with the number of updates t as (1 + t) / (10 + t), up to `decay`, so that the initial weights are soon
    forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._names: list[str] = []
        self._weights: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._names.append(name)
                self._weights.append(parameter)
        self._average = [weight.detach().clone() for weight in self._weights]
        # A tied weight has several names in a model's state, but is a single parameter.
        numbers = {id(weight): number for number, weight in enumerate(self._weights)}
        aliases = model.named_parameters(remove_duplicate=False)
        self._aliases = {name: numbers[id(weight)] for name, weight in aliases if id(weight) in numbers}
        self._decay, self._updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights."""
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
        """Averages by each name of a parameter, and the number of updates as `updates`; all ranks must call it."""
        whole = [average.full_tensor() if hasattr(average, "full_tensor") else average for average in self._average]
        averages = {name: whole[number] for name, number in self._aliases.items()}
        return {**averages, "updates": torch.tensor(self._updates)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for name, average in zip(self._names, self._average, strict=True):
            value = state[name].to(average.device)
            average.copy_(_sharded_like(value, average) if hasattr(average, "full_tensor") else value)
        self._updates = int(state["updates"])


def _sharded_like(value: Tensor, target: Tensor) -> Tensor:
    """Distribute a full tensor like a sharded model's parameter."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # their imports take seconds

    return distribute_tensor(value, target.device_mesh, target.placements) if isinstance(target, DTensor) else value
