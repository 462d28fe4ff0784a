"""The training loop of one rank: steps, metrics, validation, checkpoints, and when to stop.

It knows neither Ray nor MLflow: batches come from an iterator, numbers go to a `log` function, and ranks meet
through `torch.distributed` where it is initialised. Random numbers are seeded by (seed, step, rank), so a
resumed run draws what an uninterrupted one would.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytrain.data.batch import LoadedStep, SpeechBatch
from raytrain.errors import TrainingError
from raytrain.training.checkpoint import CheckpointFolder
from raytrain.training.optim import learning_rate, set_learning_rate
from raytrain.training.settings import TrainSettings
from raytrain.training.step import StepResult, resolve_precision, train_step

Log = Callable[[dict[str, float], int, float], None]


@dataclass
class _Window:
    """What happened since the last log line, on this rank, kept on the device until it is read."""

    results: list[StepResult] = field(default_factory=list)
    rows: int = 0
    samples: int = 0
    padded_samples: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    replaced: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, result: StepResult, batch: SpeechBatch, replaced: int) -> None:
        """Count one step; `batch` is still on the host, so reading its lengths waits for nothing."""
        self.results.append(result)
        self.rows += len(batch)
        self.samples += int(batch.audio_lengths.sum())
        self.padded_samples += batch.audio.numel()
        self.tokens += int(batch.token_lengths.sum())
        self.padded_tokens += batch.tokens.numel()
        self.replaced += replaced

    def totals(self, device: torch.device, stop: bool) -> list[float]:
        """Sums over all ranks; `stop` is true everywhere if it is on any rank."""
        numbers = [
            self.rows,
            self.samples,
            self.padded_samples,
            self.tokens,
            self.padded_tokens,
            self.replaced,
            stop,
        ]
        values = torch.tensor([float(number) for number in numbers], dtype=torch.float64, device=device)
        if dist.is_initialized():
            dist.all_reduce(values)
        return values.tolist()


@dataclass
class TrainingLoop:
    """All that one rank needs; `run` trains until a limit is reached and returns the last step.

    `model` is the bare model; `wrapped` is what the step calls (the model itself or DDP around it).
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    settings: TrainSettings
    batches: Iterable[LoadedStep]
    checkpoints: CheckpointFolder
    device: torch.device
    log: Log
    validate: Callable[[nn.Module, torch.device], dict[str, float]] | None
    checkpoint_meta: dict[str, Any]
    seed: int
    sample_rate: int
    rank: int = 0
    step: int = 0
    seconds_before: float = 0.0
    label_smoothing: float = 0.0

    def run(self) -> int:
        """Train to `max_steps`, the batches' end, `max_minutes` or `stop_at_wer`, whichever comes first."""
        self._started = time.perf_counter()
        self._heard: Counter[str] = Counter()
        self._stop = self.step >= self.settings.max_steps
        precision = resolve_precision(self.settings.precision, self.device.type)
        window = _Window()
        self.wrapped.train()
        if not self._stop:
            for loaded in self.batches:
                self.step += 1
                torch.manual_seed(hash((self.seed, self.step, self.rank)) & 0x7FFF_FFFF)
                set_learning_rate(self.optimizer, learning_rate(self.step, self.settings))
                result = train_step(
                    self.wrapped,
                    loaded.batch.to(self.device),
                    self.optimizer,
                    self.settings,
                    precision=precision,
                    label_smoothing=self.label_smoothing,
                )
                window.add(result, loaded.batch, loaded.num_replaced)
                self._heard.update(loaded.samples_by_corpus)
                window = self._after_step(loaded, window)
                if self._stop:
                    break
        return self.step

    def _after_step(self, loaded: LoadedStep, window: _Window) -> _Window:
        last = loaded.is_last or self.step >= self.settings.max_steps
        if self.step % self.settings.log_every_steps == 0 or last:
            self._stop = self._log_window(loaded, window) or last
            window = _Window()
        wer = None
        if self.validate is not None and (self._stop or self.step % self.settings.validate_every_steps == 0):
            wer = self._run_validation()
            window.started = time.perf_counter()
        if self._stop or wer is not None or self.step % self.settings.checkpoint_every_steps == 0:
            self._save(loaded, wer)
        return window

    def seconds(self) -> float:
        """Training time so far, that of interrupted runs included."""
        return self.seconds_before + time.perf_counter() - self._started

    def _log_window(self, loaded: LoadedStep, window: _Window) -> bool:
        limit = self.settings.max_minutes
        late = self.rank == 0 and limit is not None and self.seconds() > limit * 60
        rows, samples, padded, tokens, padded_tokens, replaced, stop = window.totals(self.device, late)
        sums = torch.stack([result.sums for result in window.results]).sum(0).tolist()
        elapsed = time.perf_counter() - window.started
        if not math.isfinite(sums[0]):
            raise TrainingError(
                f"the loss is {sums[0]} at step {self.step}",
                got=f"bucket {loaded.plan.bucket}, learning rate {learning_rate(self.step, self.settings):.2e}",
                remedy="lower train.learning_rate or raise train.warmup_steps; training resumes from the last "
                "checkpoint",
            )
        if self.rank == 0:
            metrics = {
                "loss": sums[0] / sums[3],
                "ce_loss": sums[1] / sums[3],
                "ctc_loss": sums[2] / sums[3],
                "lr": learning_rate(self.step, self.settings),
                "grad_norm": float(window.results[-1].grad_norm),
                "batch_size": rows / len(window.results),
                "audio_padding": 1 - samples / padded,
                "token_padding": 1 - tokens / padded_tokens,
                "audio_seconds_per_second": samples / self.sample_rate / elapsed,
                "steps_per_second": len(window.results) / elapsed,
                "memory_gib": _memory_gib(self.device),
                "bucket": loaded.plan.bucket,
                "epoch": loaded.state.epoch,
                "replaced": replaced,
            }
            if len(self._heard) > 1:  # this rank's audio since it started, which is a fair sample of all
                heard = self._heard.total()
                metrics |= {f"share_{corpus}": samples / heard for corpus, samples in self._heard.items()}
            self.log(metrics, self.step, self.seconds())
        return stop > 0

    def _run_validation(self) -> float:
        _share_buffers(self.model)
        metrics = self.validate(self.model, self.device)
        if self.rank == 0:
            self.log(metrics, self.step, self.seconds())
        goal = self.settings.stop_at_wer
        if goal is not None and metrics["wer"] <= goal:
            self._stop = True
        return metrics["wer"]

    def _save(self, loaded: LoadedStep, wer: float | None) -> None:
        if self.rank != 0:
            return
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        meta = {
            **self.checkpoint_meta,
            "schedule": loaded.state.to_dict(),
            "seconds": round(self.seconds(), 3),
        }
        self.checkpoints.save(self.step, parts, meta)
        if wer is not None:
            self.checkpoints.mark_best(self.step, wer)


def _share_buffers(model: nn.Module) -> None:
    """Give every rank the batch-norm statistics of rank 0, which are the ones that a checkpoint keeps."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def _memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
