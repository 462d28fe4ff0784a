"""Measurements between two log lines: losses, padding, speed, waiting for data, memory by bucket."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from raytrain.data.batch import LoadedStep, SpeechBatch
from raytrain.lengths.padding import padding_fraction
from raytrain.training.step import StepResult

_COUNTS = ("rows", "samples", "padded_samples", "tokens", "padded_tokens", "replaced", "flops")
_GIB = 2**30


@dataclass(frozen=True)
class FlopsEstimate:
    """Operations of a training step for a batch, and a device's peak operations per second (None if unknown): their
    ratio is the model FLOPs utilization (MFU)."""

    of_batch: Callable[[SpeechBatch], float]
    peak: float | None = None


@dataclass
class BucketTotals:
    """This rank's statistics of one bucket: utterances of a whole step, audio, and the peak (bytes) of the GPU's
    steps."""

    batch_size: int = 0
    samples: int = 0
    padded_samples: int = 0
    peak: int = 0


@dataclass(frozen=True)
class StepRows:
    """A step without its batches: its bucket, and this rank's rows."""

    bucket: int
    rows: Sequence[Any]  # assignment.Row


@dataclass(frozen=True)
class WindowTotals:
    """Sums over the steps of a window and over all ranks. `stop` and `save` are above 0 on every rank if they were true
    on any. `loss`, `ce_loss` and `ctc_loss` are sums over `labels`, those of skipped steps left out."""

    rows: float
    samples: float
    padded_samples: float
    tokens: float
    padded_tokens: float
    replaced: float
    flops: float
    stop: float
    save: float
    loss: float
    ce_loss: float
    ctc_loss: float
    labels: float

    def losses(self) -> dict[str, float]:
        """Mean losses per label; empty if all steps were skipped."""
        if not self.labels:
            return {}
        labels = max(self.labels, 1.0)
        return {"loss": self.loss / labels, "ce_loss": self.ce_loss / labels, "ctc_loss": self.ctc_loss / labels}

    def rates(self, steps: int, elapsed: float, sample_rate: int) -> dict[str, float]:
        """Batch size, padding, and training throughput."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return {
            "batch_size": self.rows / steps,
            "audio_padding": padding_fraction(self.samples, self.padded_samples),
            "token_padding": padding_fraction(self.tokens, self.padded_tokens),
            "audio_seconds_per_second": self.samples / sample_rate / elapsed,
            "tokens_per_second": self.tokens / elapsed,
            "audio_seconds_per_second_per_worker": self.samples / sample_rate / elapsed / ranks,
            "steps_per_second": steps / elapsed,
        }

    def utilization(self, elapsed: float, peak_flops: float | None) -> dict[str, float]:
        """Share of the devices' peak rate that was reached, if that rate is known."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return {"mfu": self.flops / elapsed / ranks / peak_flops} if peak_flops else {}


@dataclass
class LogWindow:
    """This rank's measurements since the last log line, kept on the device until they are read."""

    results: list[StepResult] = field(default_factory=list)
    steps: list[StepRows] = field(default_factory=list)
    rows: int = 0
    samples: int = 0
    padded_samples: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    replaced: int = 0
    flops: float = 0.0
    wait_seconds: float = 0.0
    read_seconds: float = 0.0
    cpu_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    by_bucket: dict[int, BucketTotals] = field(default_factory=dict)

    def add(self, result: StepResult, micro_batches: Sequence[LoadedStep], wait_seconds: float, peak: int = 0) -> None:
        """Count one step; its batches are still on the host, so reading their lengths does not wait for the device."""
        self.results.append(result)
        self.wait_seconds += wait_seconds
        plan = micro_batches[0].plan
        bucket = self.by_bucket.setdefault(plan.bucket, BucketTotals())
        bucket.batch_size, bucket.peak = sum(plan.sizes), max(bucket.peak, peak)
        for loaded in micro_batches:
            self._add_micro_batch(loaded, bucket)
        self.steps.append(StepRows(plan.bucket, [row for loaded in micro_batches for row in loaded.rows]))

    def _add_micro_batch(self, loaded: LoadedStep, bucket: BucketTotals) -> None:
        batch = loaded.batch
        samples = int(batch.audio_lengths.sum())
        self.rows += len(batch)
        self.samples += samples
        self.padded_samples += batch.audio.numel()
        self.tokens += int(batch.token_lengths.sum())
        self.padded_tokens += batch.tokens.numel()
        self.replaced += loaded.num_replaced
        self.read_seconds += loaded.read_seconds
        self.cpu_seconds += loaded.cpu_seconds
        bucket.samples += samples
        bucket.padded_samples += batch.audio.numel()

    def data_metrics(self, elapsed: float) -> dict[str, float]:
        """Shares of `elapsed` seconds in which this rank waited for data and in which its loader's threads read, and of
        the latter the share in which they had a CPU. The shares of threads are left out if there are none in this
        process."""
        metrics = {"data_wait": self.wait_seconds / elapsed}
        if self.read_seconds:
            # Reads ahead of the first step fall into its window too.
            busy = min(1.0, self.read_seconds / elapsed)
            metrics |= {"loader_busy": busy, "loader_cpu": self.cpu_seconds / self.read_seconds}
        return metrics

    def bucket_metrics(self, device_bytes: int) -> dict[str, float]:
        """Batch size and padding of each bucket with steps in the window, and the memory that a GPU of `device_bytes`
        had left in them; 0 bytes for a CPU."""
        metrics: dict[str, float] = {}
        for number, bucket in sorted(self.by_bucket.items()):
            metrics[f"batch_size_by_bucket/{number:03}"] = bucket.batch_size
            padding = padding_fraction(bucket.samples, bucket.padded_samples)
            metrics[f"audio_padding_by_bucket/{number:03}"] = padding
            if device_bytes:
                metrics[f"memory_headroom_by_bucket/{number:03}"] = 1 - bucket.peak / device_bytes
        return metrics

    def gradient_metrics(self) -> dict[str, float]:
        """The gradient norm of the last step, if it is finite."""
        norm = float(self.results[-1].grad_norm)
        return {"grad_norm": norm} if math.isfinite(norm) else {}

    def skipped(self) -> list[float]:
        """For each step 1 if it was skipped, else 0; waits for the device."""
        flags: list[float] = torch.stack([result.skipped for result in self.results]).tolist()
        return flags

    def totals(self, device: torch.device, stop: bool, save: bool) -> WindowTotals:
        """Sums over all ranks, with the losses'; `stop` and `save` are above 0 everywhere if true on any rank."""
        # The loss of a skipped step is non-finite, and would spoil the sum.
        losses = torch.stack([torch.where(result.skipped > 0, 0, result.sums) for result in self.results]).sum(0)
        values = [float(getattr(self, name)) for name in _COUNTS]
        numbers = torch.tensor([*values, float(stop), float(save)], dtype=torch.float64)
        numbers = torch.cat([numbers.to(device), losses.double()])
        if dist.is_initialized():
            dist.all_reduce(numbers)
        return WindowTotals(*numbers.tolist())


class PeakMemory:
    """Peaks of a device's memory, which the host knows without waiting; on a CPU those of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._peak = device, 0
        self._is_cuda = device.type == "cuda"
        self.device_bytes = torch.cuda.get_device_properties(device).total_memory if self._is_cuda else 0

    def step_peak(self) -> int:
        """A GPU's peak bytes since the last call, for a step; 0 on a CPU."""
        if not self._is_cuda:
            return 0
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._peak = max(self._peak, peak)
        return peak

    def peak_gib(self) -> float:
        """The highest peak of all steps."""
        return self._peak / _GIB if self._peak else _resident_gib()

    def headroom(self) -> dict[str, float]:
        """Share of a GPU's memory that is free."""
        if not self._is_cuda:
            return {}
        free, total = torch.cuda.mem_get_info(self._device)
        return {"memory_headroom": free / total}


def _resident_gib() -> float:
    """The most memory that this process had so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
