"""How to train: every setting of the training loop, with its unit in the name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainSettings:
    """Settings of training; the defaults are the recipe of arXiv 2503.05931 where it states one.

    `precision` is `auto` (bf16 autocast on a GPU, fp32 on a CPU), `fp32` or `bf16`. `ctc_weight` mixes an
    auxiliary CTC loss on the encoder into the total: (1 − w)·CE + w·CTC; a decoder trained from scratch on
    few hours does not learn to attend without it. `device` is `auto`, `cpu` or `cuda`. `init_from` names a model to
    start from: a `.nemo` file, a run, a checkpoint or a Hugging Face folder, where every worker can read it.
    `mask_prompt` trains on the text alone and not on the prompt's tokens. `activation_checkpointing` computes the
    encoder's blocks twice, for less memory. Training ends at `max_steps`, `max_epochs` or `max_minutes`,
    whichever comes first.
    """

    __pydantic_config__ = {"extra": "forbid"}

    init_from: str | None = None
    activation_checkpointing: bool = False
    num_workers: int = 2
    device: str = "auto"
    precision: str = "auto"
    max_steps: int = 1000
    max_epochs: int | None = None
    max_minutes: float | None = None
    stop_at_wer: float | None = None
    learning_rate: float = 3e-4
    min_learning_rate: float = 1e-6
    warmup_steps: int = 2500
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 1e-3
    clip_norm: float = 1.0
    ctc_weight: float = 0.0
    mask_prompt: bool = False
    validate_every_steps: int = 500
    max_validation_utterances: int = 500
    checkpoint_every_steps: int = 500
    keep_checkpoints: int = 2
    log_every_steps: int = 10
    num_loader_threads: int = 2
    prefetch_batches: int = 4
    max_failures: int = 3

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {low}, got {getattr(self, name)}"
            for name, low in _AT_LEAST.items()
            if getattr(self, name) < low
        ]
        for name, allowed in _ONE_OF.items():
            if getattr(self, name) not in allowed:
                problems.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.max_epochs is not None and self.max_epochs < 1:
            problems.append(f"max_epochs must be at least 1, got {self.max_epochs}")
        if not 0 <= self.ctc_weight < 1:
            problems.append(f"ctc_weight must be in [0, 1), got {self.ctc_weight}")
        if problems:
            raise ValueError("; ".join(problems))


_AT_LEAST = {
    "num_workers": 1,
    "max_steps": 1,
    "warmup_steps": 1,
    "validate_every_steps": 1,
    "checkpoint_every_steps": 1,
    "keep_checkpoints": 1,
    "log_every_steps": 1,
    "num_loader_threads": 1,
    "prefetch_batches": 1,
    "max_failures": 0,
}
_ONE_OF = {"device": ("auto", "cpu", "cuda"), "precision": ("auto", "fp32", "bf16")}
