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
    encoder's blocks twice, for less memory. `shard` spreads weights, gradients and moments over all workers (FSDP2),
    for models that one GPU does not hold. Training ends at `max_steps`, `max_epochs` or `max_minutes`, whichever comes
    first, or where the best WER is `patience` validations old.

    `accumulate` micro-batches of one bucket make a step, as if there were that many times more workers: the same rows
    in the same steps. `schedule` is what follows the warm-up: `inverse_sqrt`, or `cosine` down to `min_learning_rate`
    at `max_steps`. With `average_decay` (0.999) a moving average of the weights is kept, validated and saved too. After
    `max_skipped_steps` steps in a row whose gradients were not finite training ends; the run folder's `bad_steps` has
    their rows. A worker that does nothing for `stall_minutes` is ended, and training starts again from the last
    checkpoint, as it does after any failure, up to `max_failures` times.

    `storage_path` (a folder or `s3://bucket/path`) gets copies of the checkpoints, from which training goes on where
    the run folder is lost.

    `num_loader_threads` read and decode audio ahead of a worker's steps; `auto` is its node's CPUs over the node's
    workers, less one, from 1 to 16.

    `num_workers` may be [least, most]: training then goes on with as many workers as there is room for, and with fewer
    of them each accumulates more, so that the steps stay the same.
    """

    __pydantic_config__ = {"extra": "forbid"}

    init_from: str | None = None
    activation_checkpointing: bool = False
    shard: bool = False
    num_workers: int | tuple[int, int] = (1, 2)
    accumulate: int = 1
    device: str = "auto"
    precision: str = "auto"
    max_steps: int = 1000
    max_epochs: int | None = None
    max_minutes: float | None = None
    stop_at_wer: float | None = None
    learning_rate: float = 3e-4
    min_learning_rate: float = 1e-6
    warmup_steps: int = 2500
    schedule: str = "inverse_sqrt"
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 1e-3
    clip_norm: float = 1.0
    average_decay: float | None = None
    max_skipped_steps: int = 10
    ctc_weight: float = 0.0
    mask_prompt: bool = False
    validate_every_steps: int = 500
    max_validation_utterances: int = 500
    checkpoint_every_steps: int = 500
    keep_checkpoints: int = 2
    keep_best: int = 1
    storage_path: str | None = None
    patience: int | None = None
    log_every_steps: int = 10
    num_loader_threads: int | str = "auto"
    prefetch_batches: int = 4
    max_failures: int = 3
    stall_minutes: float = 30.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {low}, got {getattr(self, name)}"
            for name, low in _AT_LEAST.items()
            if getattr(self, name) < low
        ]
        if self.least_workers < 1 or self.least_workers > self.most_workers:
            problems.append(f"num_workers must be a number from 1 on, or [least, most], got {self.num_workers}")
        threads = self.num_loader_threads
        if threads != "auto" and (not isinstance(threads, int) or threads < 1):
            problems.append(f"num_loader_threads must be auto or a number from 1 on, got {threads!r}")
        if self.stall_minutes <= 0:
            problems.append(f"stall_minutes must be above 0, got {self.stall_minutes}")
        for name, allowed in _ONE_OF.items():
            if getattr(self, name) not in allowed:
                problems.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("max_epochs", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1, got {value}")
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            problems.append(f"average_decay must be between 0 and 1, got {self.average_decay}")
        if not 0 <= self.ctc_weight < 1:
            problems.append(f"ctc_weight must be in [0, 1), got {self.ctc_weight}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def least_workers(self) -> int:
        """The fewest workers to train with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """The number of workers to train with if there is room."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


_AT_LEAST = {
    "accumulate": 1,
    "max_skipped_steps": 1,
    "max_steps": 1,
    "warmup_steps": 1,
    "validate_every_steps": 1,
    "checkpoint_every_steps": 1,
    "keep_checkpoints": 1,
    "keep_best": 1,
    "log_every_steps": 1,
    "prefetch_batches": 1,
    "max_failures": 0,
}
_ONE_OF = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "fp32", "bf16"),
    "schedule": ("inverse_sqrt", "cosine"),
}
