"""How to train: every setting of the training loop, with its unit in the name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from raytrain.ranges import Range, range_problems, refuse

MAX_WORKERS = 65_536
LearningRate = Annotated[float, Range(0, 100, above=True)]
Steps = Annotated[int, Range(1, 10**12)]
Minutes = Annotated[float, Range(0, 10**7, above=True)]
ErrorRate = Annotated[float, Range(0, 100)]  # WER is above 1 where more is inserted than said
Moment = Annotated[float, Range(0, 1, above=True, below=True)]


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
    num_workers: Annotated[int | tuple[int, int], Range(1, MAX_WORKERS)] = (1, 2)
    accumulate: Annotated[int, Range(1, 65_536)] = 1
    device: str = "auto"
    precision: str = "auto"
    max_steps: Steps = 1000
    max_epochs: Annotated[int, Range(1, 10**9)] | None = None
    max_minutes: Minutes | None = None
    stop_at_wer: ErrorRate | None = None
    learning_rate: LearningRate = 3e-4
    min_learning_rate: Annotated[float, Range(0, 100)] = 1e-6
    warmup_steps: Steps = 2500
    schedule: str = "inverse_sqrt"
    beta1: Moment = 0.9
    beta2: Moment = 0.98
    weight_decay: Annotated[float, Range(0, 100)] = 1e-3
    clip_norm: Annotated[float, Range(0, 10**9, above=True)] = 1.0
    average_decay: Moment | None = None
    max_skipped_steps: Steps = 10
    ctc_weight: Annotated[float, Range(0, 1, below=True)] = 0.0
    mask_prompt: bool = False
    validate_every_steps: Steps = 500
    max_validation_utterances: Annotated[int, Range(1, 10**9)] = 500
    checkpoint_every_steps: Steps = 500
    keep_checkpoints: Annotated[int, Range(1, 10**6)] = 2
    keep_best: Annotated[int, Range(1, 10**6)] = 1
    storage_path: str | None = None
    patience: Annotated[int, Range(1, 10**9)] | None = None
    log_every_steps: Steps = 10
    num_loader_threads: Annotated[int | str, Range(1, 4096)] = "auto"
    prefetch_batches: Annotated[int, Range(1, 4096)] = 4
    max_failures: Annotated[int, Range(0, 10**6)] = 3
    stall_minutes: Minutes = 30.0

    def __post_init__(self) -> None:
        problems = range_problems(self)
        for name, allowed in _ONE_OF.items():
            if getattr(self, name) not in allowed:
                problems.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        threads = self.num_loader_threads
        if isinstance(threads, str) and threads != "auto":
            problems.append(f"num_loader_threads must be auto or a number from 1 on, got {threads!r}")
        refuse(problems)
        if self.least_workers > self.most_workers:
            problems.append(f"num_workers must be a number, or [least, most], got {list(self.num_workers)}")
        if self.min_learning_rate > self.learning_rate:
            problems.append(
                f"min_learning_rate must be at most learning_rate ({self.learning_rate:g}), "
                f"got {self.min_learning_rate:g}"
            )
        refuse(problems)

    @property
    def least_workers(self) -> int:
        """The fewest workers to train with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """The number of workers to train with if there is room."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


_ONE_OF = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "fp32", "bf16"),
    "schedule": ("inverse_sqrt", "cosine"),
}
