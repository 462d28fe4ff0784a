"""A decoded text with its scores: the result of both searches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

from torch import Tensor


@dataclass(frozen=True)
class Hypothesis:
    """A decoded text: generated `ids` without prompt and end, the log-probability of each, the sum of them and of the
    end of text in `log_prob`, and the `score` that hypotheses rank by. `ended` is false if the length cap cut it
    off."""

    ids: list[int]
    token_log_probs: list[float]
    log_prob: float
    score: float
    ended: bool

    @classmethod
    def of(cls, ids: list[int], log_probs: list[float], eos_id: int, alpha: float) -> Hypothesis:
        """The hypothesis of generated tokens up to the first end of text; `alpha` is the length penalty."""
        ended = eos_id in ids
        size = ids.index(eos_id) if ended else len(ids)
        used = size + ended
        total = float(sum(log_probs[:used]))
        return cls(ids[:size], log_probs[:size], total, total / length_penalty(used, alpha), ended)

    @classmethod
    def empty(cls) -> Hypothesis:
        """No text, for lack of room."""
        return cls([], [], 0.0, 0.0, False)


@overload
def length_penalty(num_tokens: int, alpha: float) -> float: ...


@overload
def length_penalty(num_tokens: Tensor, alpha: float) -> Tensor: ...


def length_penalty(num_tokens: int | Tensor, alpha: float) -> float | Tensor:
    """The divisor for a log-probability of `num_tokens` tokens, the end included (Wu et al. 2016)."""
    penalty: float | Tensor = ((5 + num_tokens) / 6) ** alpha
    return penalty
