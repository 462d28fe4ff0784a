"""Greedy search: the most likely token at each step. Rows that have ended leave the batch.

The host does not wait for a GPU at every token: every few steps it reads which rows have ended, and discards what they
generated after their end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raytrain.decoding.graphs import Programs, StaticSteps, programs_for
from raytrain.decoding.hypothesis import Hypothesis
from raytrain.decoding.steps import EagerSteps, PromptGroup, Steps, default_sync_interval
from raytrain.model.canary import Canary


def greedy_search(
    model: Canary,
    group: PromptGroup,
    eos_id: int,
    length_penalty: float = 0.0,
    *,
    sync_interval: int | None = None,
    programs: Programs | None = None,
) -> list[Hypothesis]:
    """The text of each utterance. `sync_interval` and `programs` default to the device's best; the results do not
    depend on them."""
    batch, size = group.prompt.shape
    texts = _Texts(group.limits.tolist(), eos_id)
    interval, most = sync_interval or default_sync_interval(group.states), max(texts.limits)
    programs = programs or programs_for(model, group.states)
    if programs is not None and not programs.have_room(batch, group.states.shape[1], size + most):
        programs = None
    eager = EagerSteps(model, group, size + most if programs is None else size)
    steps: Steps = eager
    for step in range(1, most + 1):
        texts.add(*steps.step())
        if programs is not None and step == 1 and most > 1:
            steps = StaticSteps(programs, eager)
        if step % interval and step < most:
            continue
        unfinished = texts.sync(step)
        if not unfinished:
            break
        if len(unfinished) < len(texts.rows):
            texts.keep(steps.keep(unfinished))
    return texts.hypotheses(length_penalty)


class _Texts:
    """The output of greedy search so far: the tokens of each row on the host, and their log-probabilities on the
    device. `rows` are those that the steps continue with."""

    def __init__(self, limits: list[int], eos_id: int) -> None:
        self.limits, self.eos_id = limits, eos_id
        self.rows = list(range(len(limits)))
        self._ids: list[list[int]] = [[] for _ in limits]
        self._ended = [False] * len(limits)
        self._pending: list[tuple[Tensor, Tensor]] = []
        # Rows and their log-probabilities (R, steps) from one synchronization to the next.
        self._spans: list[tuple[list[int], Tensor]] = []

    def add(self, chosen: Tensor, log_probs: Tensor) -> None:
        """Record a step without waiting for it."""
        self._pending.append((chosen, log_probs))

    def sync(self, step: int) -> list[int]:
        """Read the tokens since the last call; returns which of `rows` have not ended after `step` steps."""
        chosen, log_probs = (torch.stack(part, 1) for part in zip(*self._pending, strict=True))
        self._spans.append((self.rows, log_probs))
        self._pending = []
        for row, ids in zip(self.rows, chosen.tolist(), strict=True):
            self._ids[row] += ids
            self._ended[row] = self._ended[row] or step >= self.limits[row] or self.eos_id in ids
        return [slot for slot, row in enumerate(self.rows) if not self._ended[row]]

    def keep(self, slots: list[int]) -> None:
        """Continue with these of `rows`."""
        self.rows = [self.rows[slot] for slot in slots]

    def hypotheses(self, length_penalty: float) -> list[Hypothesis]:
        """All rows' texts, each up to its limit."""
        return [
            Hypothesis.of(ids[:limit], values[:limit], self.eos_id, length_penalty)
            for ids, values, limit in zip(self._ids, self._log_probs(), self.limits, strict=True)
        ]

    def _log_probs(self) -> list[list[float]]:
        """Each row's values in order, read from the device at once."""
        by_row: list[list[float]] = [[] for _ in self.limits]
        flat = torch.cat([values.flatten() for _, values in self._spans]).tolist()
        first = 0
        for rows, values in self._spans:
            size = values.shape[1]
            for row in rows:
                by_row[row] += flat[first : first + size]
                first += size
        return by_row
