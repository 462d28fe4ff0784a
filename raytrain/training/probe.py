"""Does a batch fit? Real steps on this process's device, and what to make of their outcomes.

A meter runs training steps of one batch size at a bucket's upper edges and says what it took. `search_batch_size`,
`smallest_as_fast` and `soak` ask it; they hold for any meter, also for one in another process (`IsolatedMeter`).
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from raytrain.data.batch import SpeechBatch
from raytrain.lengths.bucket_searches import BucketSearches
from raytrain.lengths.search import BatchSizeSearch
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.training.average import WeightAverage
from raytrain.training.optim import make_optimizer
from raytrain.training.settings import TrainSettings
from raytrain.training.step import resolve_precision, train_step

Edges = tuple[int, int]  # max_duration_ms, max_tokens


@dataclass(frozen=True)
class Probe:
    """The outcome of one batch size: peak bytes where the device tells them, seconds of the fastest step, and why it
    does not fit."""

    batch_size: int
    fits: bool
    peak_bytes: int | None = None
    step_seconds: float | None = None
    why: str | None = None


class Meter(Protocol):
    """Runs training steps on a device with a memory budget."""

    def measure(self, batch_size: int, edges: Edges, num_steps: int, *, fresh: bool = True) -> Probe:
        """`num_steps` steps of a batch at a bucket's upper edges; `fresh` gives the allocator's cache back before."""
        ...


class StepMeter:
    """Meter of this process: the step of training on synthetic batches, on `cuda` or `cpu`.

    With several workers in training the model is wrapped in DDP here too, in a group of one process. On a GPU the
    process may take `budget_bytes`; on a CPU nothing is limited, and the peak is that of the process.
    """

    def __init__(
        self, model: ModelConfig, settings: TrainSettings, budget_bytes: int | None = None, device: str = "cuda"
    ) -> None:
        self._device, self._config, self._settings = torch.device(device), model, settings
        if self._device.type == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())  # some calls want the number
        if self._device.type == "cuda" and budget_bytes is not None:
            total = torch.cuda.get_device_properties(self._device).total_memory
            _wait_for_memory(self._device, min(budget_bytes, total))
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total), self._device)
        self._bare = Canary(model).to(self._device).train()
        self._bare.encoder.checkpoint_blocks = settings.activation_checkpointing
        self._wrap()
        self._optimizer = make_optimizer(self._bare, settings)
        decay = settings.average_decay
        self._average = WeightAverage(self._bare, decay) if decay is not None else None
        self._precision = resolve_precision(settings.precision, self._device.type)
        with contextlib.suppress(torch.OutOfMemoryError):
            self._run(1, (1000, 16))  # the optimizer's states come with its first step

    def _wrap(self) -> None:
        """Put the model into a new DDP: one whose backward pass was broken off refuses the next step."""
        self._model: torch.nn.Module = self._bare
        if self._settings.most_workers > 1:
            if not dist.is_initialized():
                backend = "nccl" if self._device.type == "cuda" else "gloo"
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            self._model = torch.nn.parallel.DistributedDataParallel(self._bare, gradient_as_bucket_view=True)

    def measure(self, batch_size: int, edges: Edges, num_steps: int, *, fresh: bool = True) -> Probe:
        """Real steps; see `Meter`."""
        if fresh:
            self._empty()
        _reset_peak(self._device)
        # The cache is emptied only after the except block has ended, when no traceback holds the failed step's tensors.
        try:
            seconds = min(self._run(batch_size, edges) for _ in range(num_steps))
            return Probe(batch_size, True, _peak_bytes(self._device), seconds)
        except torch.OutOfMemoryError as error:
            why = str(error).strip().splitlines()[0]
        self._optimizer.zero_grad(set_to_none=True)
        self._model = self._bare  # the old DDP's buckets go before the new one's come
        self._empty()
        self._wrap()
        return Probe(batch_size, False, why=why)

    def _run(self, batch_size: int, edges: Edges) -> float:
        batch = SpeechBatch.synthetic(
            batch_size, *edges, vocab=self._config.vocab_size, device=self._device,
            sample_rate=self._config.sample_rate,
        )  # fmt: skip
        self._wait()
        start = time.perf_counter()
        train_step(
            self._model, [batch] * min(2, self._settings.accumulate), self._optimizer, self._settings,
            precision=self._precision, label_smoothing=self._config.label_smoothing, average=self._average,
        )  # fmt: skip
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _empty(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _wait_for_memory(device: torch.device, needed_bytes: int, seconds: float = 30.0) -> None:
    """A process that ended a moment ago may still hold memory, and would make batches fail that fit."""
    until = time.monotonic() + seconds
    while torch.cuda.mem_get_info(device)[0] < needed_bytes and time.monotonic() < until:
        time.sleep(0.5)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: the peak of the resident size starts anew


def _peak_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return None


@dataclass(frozen=True)
class BucketSize:
    """The answer for one bucket: the largest batch that fits, None where not even 1 does; its probe, None where other
    buckets' probes implied it; and all probes that were run, in order."""

    batch_size: int | None
    best: Probe | None
    probes: tuple[Probe, ...]


def search_batch_size(
    measure: Callable[[int], Probe],
    search: BatchSizeSearch,
    before: Callable[[], tuple[Any, ...]] | None = None,
    after: Callable[[Probe], None] | None = None,
) -> BucketSize:
    """Run one bucket's search to its end. `before` gives what the search is to be informed of, `after` is told each
    outcome."""
    probes: list[Probe] = []
    while True:
        if before is not None:
            search.inform(*before())
        size = search.next()
        if size is None:
            return _bucket_size(search.result, probes)
        probe = measure(size)
        probes.append(probe)
        search.report(size, probe.fits)
        if after is not None:
            after(probe)


def search_buckets(measure: Callable[[int, int], Probe], searches: BucketSearches) -> tuple[BucketSize, ...]:
    """Run all buckets' searches to their ends in this process; `measure` takes a bucket's number and a size."""
    probes: list[list[Probe]] = [[] for _ in range(searches.num_buckets)]
    while (ask := searches.next()) is not None:
        bucket, size = ask
        probe = measure(bucket, size)
        probes[bucket].append(probe)
        searches.report(bucket, size, probe.fits, probe.peak_bytes)
    return tuple(_bucket_size(searches.result(bucket), ran) for bucket, ran in enumerate(probes))


def _bucket_size(size: int | None, probes: Sequence[Probe]) -> BucketSize:
    best = next((probe for probe in probes if probe.fits and probe.batch_size == size), None)
    return BucketSize(size, best, tuple(probes))


_AS_FAST = 1.03  # seconds per utterance within this factor are equal; timings repeat to about 2 %


def smallest_as_fast(measure: Callable[[int], Probe], best: Probe) -> tuple[Probe, list[Probe]]:
    """The smallest halving of `best` whose step is as fast per utterance as any, and the probes that this took.

    Halves while that costs at most 3 %; a larger batch can be slower too, hence the fastest so far is what counts.
    """
    probes = [best]
    while (size := probes[-1].batch_size // 2) >= 1:
        probes.append(measure(size))
        if not probes[-1].fits or _per_utterance(probes[-1]) > _AS_FAST * min(map(_per_utterance, probes)):
            break
    limit = _AS_FAST * min(map(_per_utterance, probes))
    return min((one for one in probes if _per_utterance(one) <= limit), key=lambda one: one.batch_size), probes[1:]


def _per_utterance(probe: Probe) -> float:
    return float("inf") if probe.step_seconds is None else probe.step_seconds / probe.batch_size


@dataclass(frozen=True)
class SoakStep:
    """One soaked step; `lowered_to` where it failed, 0 where not even 1 fits."""

    bucket: int
    probe: Probe
    lowered_to: int | None = None


def soak(meter: Meter, edges: Sequence[Edges], sizes: Sequence[int], num_steps: int, seed: int) -> Iterator[SoakStep]:
    """At least `num_steps` shuffled steps over all buckets at their sizes, as training mixes them; yields each.

    The allocator's cache is left as it is from step to step. A bucket that fails is lowered by a twentieth, at least
    by 1, and the soak starts again, until one passes.
    """
    rng, current = random.Random(seed), list(sizes)
    while True:
        order = [
            bucket for _ in range(-(-num_steps // len(edges))) for bucket in rng.sample(range(len(edges)), len(edges))
        ]
        for bucket in order:
            probe = meter.measure(current[bucket], edges[bucket], 1, fresh=False)
            if not probe.fits:
                current[bucket] = min(current[bucket] - 1, int(current[bucket] * 0.95))
                yield SoakStep(bucket, probe, current[bucket])
                if current[bucket] < 1:
                    return
                break
            yield SoakStep(bucket, probe)
        else:
            return
