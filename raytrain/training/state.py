"""The state of training: the model with its optimizer and average, the progress, and a rank's shares."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from raytrain.model.canary import Canary
from raytrain.training.average import WeightAverage
from raytrain.training.checkpoint import Checkpoint, StateDict
from raytrain.training.step import running_statistics


@dataclass
class TrainState:
    """The state in a checkpoint: a model, its optimizer, and the average of its weights if there is one.

    `model` is the bare model; `wrapped` is what a step calls (the model itself or DDP around it). `sharded` if each
    rank holds a part of the model (FSDP2).
    """

    model: Canary
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None
    sharded: bool = False

    def load(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Load optimizer and average; the weights have to be loaded before the model is wrapped."""
        state = checkpoint.load("optimizer", device)
        if self.sharded:
            from raytrain.training.sharded import load_optimizer  # its imports take seconds

            load_optimizer(self.model, self.optimizer, state)
        else:
            self.optimizer.load_state_dict(state)
        if self.average is not None:
            self.average.load_state_dict(checkpoint.load("average", device))

    def state_dicts(self) -> dict[str, StateDict]:
        """A checkpoint's parts by name. All ranks must call it; of a sharded model only rank 0 gets them."""
        if self.sharded:
            from raytrain.training.sharded import model_state, optimizer_state  # their imports take seconds

            parts = {
                "model": model_state(self.model),
                "optimizer": optimizer_state(self.model, self.optimizer),
            }
        else:
            parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.average is not None:
            parts["average"] = self.average.state_dict()
        return parts

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Inside the block the model has the weights for validation and decoding, unsharded on every rank."""
        with contextlib.ExitStack() as stack:
            if self.average is not None:
                stack.enter_context(self.average.swapped_in())
            if self.sharded:
                from raytrain.training.sharded import gathered  # its imports take seconds

                stack.enter_context(gathered(self.model))
            yield

    def average_statistics(self, shares: RankShares) -> None:
        """Average the rank-local running statistics of batch norm over all shares, for validation and checkpoints."""
        buffers = running_statistics(self.model)
        if shares.are_all or not buffers:
            return
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers]) * (len(shares.shares) / shares.num_shares)
        dist.all_reduce(flat)
        means = flat.split([buffer.numel() for buffer in buffers])
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(mean.view_as(buffer))


@dataclass
class Progress:
    """The progress of training: optimizer steps, seconds of training and seconds of audio, with those of earlier
    attempts. `seconds` stands still while the clock runs; `total_seconds` does not."""

    step: int = 0
    seconds: float = 0.0
    audio_seconds: float = 0.0
    _started: float = field(default_factory=time.perf_counter, init=False, repr=False, compare=False)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint | None) -> Progress:
        """Where training resumes: at a checkpoint, or at the start."""
        if checkpoint is None:
            return cls()
        meta = checkpoint.meta
        return cls(checkpoint.step, meta.get("seconds", 0.0), meta.get("audio_seconds", 0.0))

    def start_clock(self) -> None:
        """Count seconds from now on."""
        self._started = time.perf_counter()

    def total_seconds(self) -> float:
        """Seconds of training so far."""
        return self.seconds + time.perf_counter() - self._started


@dataclass(frozen=True)
class RankShares:
    """The shares of a step that a rank takes, out of `num_shares`: that many consecutive batches make its step."""

    rank: int = 0
    shares: Sequence[int] = (0,)
    num_shares: int = 1

    @property
    def are_all(self) -> bool:
        """Whether this is the only rank."""
        return len(self.shares) == self.num_shares
