"""The settings of greedy and beam search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from raytrain.settings import Range, Setting, refuse, setting_problems

BeamSize = Annotated[int, Range(1, 4096), Setting("Hypotheses of the beam search; 1 is greedy.")]
LengthPenalty = Annotated[
    float,
    Range(0, 1000),
    Setting(
        "Exponent p of hypotheses' ranking: those of n tokens, the end included, rank by log-probability / "
        "((5 + n) / 6)^p (Wu et al. 2016)."
    ),
]
GenerationDelta = Annotated[
    int,
    Range(1, 1 << 20),
    Setting(
        "The prompt and the generated tokens together are at most this many more than the encoder's frames.",
        unit="tokens",
    ),
]
CtcWeight = Annotated[
    float,
    Range(0, 1, below=True),
    Setting(
        "With w above 0, hypotheses of a beam rank by (1 − w)·score + w·log-probability of the CTC head (Watanabe et "
        "al. 2017), which is robust where words repeat."
    ),
]


@dataclass(frozen=True)
class DecodeSettings:
    """How to search."""

    __pydantic_config__ = {"extra": "forbid"}

    beam_size: BeamSize = 1
    length_penalty: LengthPenalty = 0.0
    n_best: Annotated[int, Range(1, 4096), Setting("Hypotheses to return, at most beam_size.")] = 1
    max_generation_delta: GenerationDelta = 50
    ctc_weight: CtcWeight = 0.0

    def __post_init__(self) -> None:
        refuse(setting_problems(self))
        problems = []
        if self.n_best > self.beam_size:
            problems.append(f"n_best must be from 1 to beam_size ({self.beam_size}), got {self.n_best}")
        if self.ctc_weight and self.beam_size == 1:
            problems.append(f"ctc_weight needs a beam_size above 1, got ctc_weight {self.ctc_weight}")
        refuse(problems)
