"""Does a batch fit? Two meters with one question: traced on `meta` tensors, or a real step on a GPU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from raytrain.data.batch import SpeechBatch
from raytrain.lengths.search import BatchSizeSearch
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.training.memory import MemoryLine, trace_step
from raytrain.training.optim import make_optimizer
from raytrain.training.settings import TrainSettings
from raytrain.training.step import resolve_precision, train_step


@dataclass(frozen=True)
class Probe:
    """One measured batch: peak bytes (also when it does not fit, if known) and seconds per step on a GPU."""

    fits: bool
    peak_bytes: int | None
    step_seconds: float | None = None


class Meter(Protocol):
    """Measures one batch size of one bucket against the budget."""

    def measure(self, batch_size: int) -> Probe:
        """Run or trace a training step at the bucket's upper bounds."""
        ...


@dataclass(frozen=True)
class TraceMeter:
    """Meter without a device: peak bytes of a traced step against a named budget."""

    model: ModelConfig
    settings: TrainSettings
    max_duration_ms: int
    max_tokens: int
    budget_bytes: int
    world_size: int = 1

    def measure(self, batch_size: int) -> Probe:
        """Trace a step of `batch_size` utterances at the bucket's edges."""
        memory = trace_step(
            self.model,
            self.settings,
            batch_size=batch_size,
            max_duration_ms=self.max_duration_ms,
            max_tokens=self.max_tokens,
            world_size=self.world_size,
        )
        return Probe(fits=memory.peak_bytes <= self.budget_bytes, peak_bytes=memory.peak_bytes)


class CudaMeter:
    """Meter on this process's GPU: real steps on a synthetic batch within a memory budget.

    Out of memory is caught in one place, and the cache is emptied only after the except block has ended, when
    no traceback holds the failed step's tensors any more.
    """

    def __init__(
        self,
        model: ModelConfig,
        settings: TrainSettings,
        max_duration_ms: int,
        max_tokens: int,
        budget_bytes: int,
        num_steps: int = 3,
    ) -> None:
        self._device = torch.device("cuda")
        total = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total))
        self._config, self._settings, self._num_steps = model, settings, num_steps
        self._edges = (max_duration_ms, max_tokens)
        self._model = Canary(model).to(self._device).train()
        self._model.encoder.checkpoint_blocks = settings.activation_checkpointing
        self._optimizer = make_optimizer(self._model, settings)
        self._precision = resolve_precision(settings.precision, "cuda")
        # DDP keeps gradients in reducer buckets; an equal reserve stands for them here.
        self._reducer = [torch.empty_like(parameter) for parameter in self._model.parameters()]

    def measure(self, batch_size: int) -> Probe:
        """Run `num_steps` training steps of `batch_size` utterances at the bucket's edges."""
        torch.cuda.reset_peak_memory_stats(self._device)
        seconds = self._try_steps(batch_size)
        if seconds is None:
            self._optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return Probe(fits=False, peak_bytes=None)
        return Probe(True, torch.cuda.max_memory_allocated(self._device), seconds)

    def _try_steps(self, batch_size: int) -> float | None:
        try:
            batch = SpeechBatch.synthetic(
                batch_size, *self._edges, vocab=self._config.vocab_size, device=self._device,
                sample_rate=self._config.sample_rate,
            )  # fmt: skip
            for _ in range(self._num_steps):
                torch.cuda.synchronize()
                start = time.perf_counter()
                train_step(self._model, batch, self._optimizer, self._settings, precision=self._precision)
                torch.cuda.synchronize()
            return time.perf_counter() - start
        except torch.OutOfMemoryError:
            return None


@dataclass(frozen=True)
class BucketSize:
    """The answer for one bucket; `batch_size` is None where not even 1 fits."""

    batch_size: int | None
    peak_bytes: int
    num_probes: int
    step_seconds: float | None = None


def search_batch_size(meter: Meter, predictor: TraceMeter, *, max_size: int, tolerance: float) -> BucketSize:
    """Largest batch that fits by `meter`, starting where two traces of `predictor` say it should lie."""
    first, second = predictor.measure(1), predictor.measure(4)
    line = MemoryLine.through(1, first.peak_bytes, 4, second.peak_bytes)
    start = min(max_size, line.largest_batch(predictor.budget_bytes))
    search = BatchSizeSearch(start=start, max_size=max_size, tolerance=tolerance, growth=1.1)
    best: Probe | None = None
    num_probes = 0
    while (size := search.next()) is not None:
        probe = meter.measure(size)
        num_probes += 1
        search.report(size, probe.fits)
        if probe.fits and size == search.result:
            best = probe
    if best is None:
        return BucketSize(None, first.peak_bytes, num_probes)
    return BucketSize(search.result, best.peak_bytes, num_probes, best.step_seconds)
