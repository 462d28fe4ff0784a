"""How to train: the settings of the training loop, with units in their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from raytrain.model.config import Checkpointing
from raytrain.settings import Range, Setting, Switch, refuse, setting_problems

MAX_WORKERS = 65_536
LearningRate = Annotated[float, Range(0, 100, above=True)]
Steps = Annotated[int, Range(1, 10**12)]
Minutes = Annotated[float, Range(0, 10**7, above=True)]
COMPILING = Switch(on="always", off="never")
CHECKPOINTING = Switch(on="full", off="none")
ErrorRate = Annotated[float, Range(0, 100)]  # WER exceeds 1 if there are more errors than reference words
Moment = Annotated[float, Range(0, 1, above=True, below=True)]


@dataclass(frozen=True)
class TrainSettings:
    """Settings of training; the defaults are the recipe of arXiv 2503.05931 where it states one."""

    __pydantic_config__ = {"extra": "forbid"}

    init_from: Annotated[
        str | None,
        Setting(
            "A model to start from, where every worker can read it: a .nemo file, a run, a checkpoint or a Hugging "
            "Face folder. Its content decides whether training can be resumed, not its path.",
            lineage=False,
        ),
    ] = None
    activation_checkpointing: Annotated[
        Checkpointing,
        CHECKPOINTING,
        Setting(
            "What is computed twice, to take less memory: full is the encoder's blocks (true means the same, false "
            "none), selective their cheap operations and the decoder's.",
            lineage=False,
        ),
    ] = "none"
    compile: Annotated[
        Literal["auto", "always", "never"],
        COMPILING,
        Setting(
            "Compile the model's blocks, and on a GPU compute attention without keeping scores: auto does on a GPU, "
            "where it takes up to a minute and a half at the first start on a machine. If the compiler fails, training "
            "warns and runs uncompiled. true and false mean always and never.",
            lineage=False,
        ),
    ] = "auto"
    shard: Annotated[
        bool,
        Setting(
            "Spread weights, gradients and moments over all workers (FSDP2), for models that one GPU can't hold.",
            lineage=False,
        ),
    ] = False
    num_workers: Annotated[
        int | tuple[int, int],
        Range(1, MAX_WORKERS),
        Setting(
            "Training workers, or [least, most]: as many as there is room for. Fewer workers accumulate more each, so "
            "that the steps stay the same.",
            unit="workers",
            lineage=False,
        ),
    ] = (1, 2)
    accumulate: Annotated[
        int,
        Range(1, 65_536),
        Setting(
            "Micro-batches of one bucket that make a step, as if there were that many times more workers.",
            unit="batches",
            lineage=False,
        ),
    ] = 1
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Setting("Where workers compute: auto takes a GPU where there is one.", lineage=False),
    ] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        Setting(
            "Precision of the computation: auto is bf16 on a GPU and fp32 on a CPU. Weights and "
            "moments are in fp32 in either case."
        ),
    ] = "auto"
    reduce_in: Annotated[
        Literal["fp32", "bf16"],
        Setting(
            "Precision in which workers exchange gradients: bf16 halves the bytes, for links that training waits for, "
            "and rounds each sum to 8 bits.",
            lineage=False,
        ),
    ] = "fp32"
    max_steps: Annotated[
        Steps,
        Setting(
            "Training ends after this many steps. With the cosine schedule, which ends there too, training can't be "
            "resumed with another number.",
            unit="steps",
            lineage=False,
        ),
    ] = 1000
    max_epochs: Annotated[
        int | None, Range(1, 10**9), Setting("Training ends after this many epochs.", unit="epochs", lineage=False)
    ] = None
    max_minutes: Annotated[Minutes | None, Setting("Training ends after this time.", unit="minutes", lineage=False)] = (
        None
    )
    stop_at_wer: Annotated[
        ErrorRate | None,
        Setting("Training ends once the validation WER (0.1 is 10 %) is at most this.", lineage=False),
    ] = None
    learning_rate: Annotated[LearningRate, Setting("Peak learning rate, reached after the warm-up.")] = 3e-4
    min_learning_rate: Annotated[
        float, Range(0, 100), Setting("Lowest learning rate after the warm-up, at most the peak.")
    ] = 1e-6
    warmup_steps: Annotated[Steps, Setting("Steps over which the learning rate rises to its peak.", unit="steps")] = (
        2500
    )
    schedule: Annotated[
        Literal["inverse_sqrt", "cosine"],
        Setting("The learning rate after the warm-up; cosine reaches min_learning_rate at max_steps."),
    ] = "inverse_sqrt"
    beta1: Annotated[Moment, Setting("AdamW's decay of the mean of gradients.")] = 0.9
    beta2: Annotated[Moment, Setting("AdamW's decay of the mean of squared gradients.")] = 0.98
    weight_decay: Annotated[float, Range(0, 100), Setting("AdamW's weight decay.")] = 1e-3
    clip_norm: Annotated[
        float, Range(0, 10**9, above=True), Setting("Gradients of a larger norm are scaled down to this.")
    ] = 1.0
    average_decay: Annotated[
        Moment | None,
        Setting("With it (0.999) a moving average of the weights is kept, validated and saved too."),
    ] = None
    max_skipped_steps: Annotated[
        Steps,
        Setting(
            "Training ends after this many steps in a row with non-finite gradients; the run folder's bad_steps has "
            "their rows.",
            unit="steps",
            lineage=False,
        ),
    ] = 10
    ctc_weight: Annotated[
        float,
        Range(0, 1, below=True),
        Setting(
            "Share w of a CTC loss on the encoder in the total, (1 − w)·CE + w·CTC. A decoder trained from scratch on "
            "few hours doesn't learn to attend without it."
        ),
    ] = 0.0
    mask_prompt: Annotated[bool, Setting("Train on the text alone and not on the prompt's tokens.")] = False
    validate_every_steps: Annotated[Steps, Setting("Steps between two validations.", unit="steps", lineage=False)] = 500
    max_validation_utterances: Annotated[
        int,
        Range(1, 10**9),
        Setting("The most utterances that a validation decodes.", unit="utterances", lineage=False),
    ] = 500
    checkpoint_every_steps: Annotated[Steps, Setting("Steps between two checkpoints.", unit="steps", lineage=False)] = (
        500
    )
    keep_checkpoints: Annotated[
        int, Range(1, 10**6), Setting("How many of the newest checkpoints are kept.", lineage=False)
    ] = 2
    keep_best: Annotated[
        int, Range(1, 10**6), Setting("How many of the checkpoints with the best validation are kept.", lineage=False)
    ] = 1
    storage_path: Annotated[
        str | None,
        Setting(
            "A folder or s3://bucket/path that gets copies of the checkpoints, from which training resumes where the "
            "run folder is lost.",
            lineage=False,
        ),
    ] = None
    patience: Annotated[
        int | None,
        Range(1, 10**9),
        Setting("Training ends when the best WER is this many validations old.", unit="validations", lineage=False),
    ] = None
    log_every_steps: Annotated[Steps, Setting("Steps between two lines of metrics.", unit="steps", lineage=False)] = 10
    num_loader_threads: Annotated[
        int | str,
        Range(1, 4096),
        Setting(
            "Threads that read and decode audio ahead of a worker's steps. auto is its node's CPUs over the node's "
            "workers, less one, from 1 to 16.",
            unit="threads",
            lineage=False,
        ),
    ] = "auto"
    prefetch_batches: Annotated[
        int, Range(1, 4096), Setting("Batches that are read ahead of a worker's steps.", unit="batches", lineage=False)
    ] = 4
    max_failures: Annotated[
        int,
        Range(0, 10**6),
        Setting("How often training restarts from the last checkpoint after a failure.", lineage=False),
    ] = 3
    stall_minutes: Annotated[
        Minutes,
        Setting(
            "A worker without progress for this long is ended, and training restarts as after any failure.",
            unit="minutes",
            lineage=False,
        ),
    ] = 30.0

    def __post_init__(self) -> None:
        problems = setting_problems(self)
        threads = self.num_loader_threads
        if isinstance(threads, str) and threads != "auto":
            problems.append(f"num_loader_threads must be auto or a number from 1 on, got {threads!r}")
        refuse(problems)
        if isinstance(self.num_workers, tuple | list) and self.least_workers > self.most_workers:
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
