"""Does a batch fit? Real steps on this process's device.

A meter runs training steps of one batch size at a bucket's upper edges and measures them. `search_batch_size`,
`smallest_as_fast` and `soak` use it; they work with any meter, including one in another process (`IsolatedMeter`).
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator

import torch

from raytrain.data.batch import SpeechBatch
from raytrain.errors import ProfileError, first_line
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.training.acceleration import accelerate
from raytrain.training.average import WeightAverage
from raytrain.training.memory.meter import Edges, Probe, ProbeGroup
from raytrain.training.optim import make_optimizer
from raytrain.training.parallel import is_sharded, join_alone, micro_batches, parallel_model
from raytrain.training.settings import TrainSettings
from raytrain.training.step import resolve_precision, train_step


class StepMeter:
    """Meter of this process: the step of training on synthetic batches, on `cuda` or `cpu`.

    With several workers in training the model is wrapped as training wraps it: in DDP, in a group of this process alone
    or in `group`; or sharded, which needs a `group` of several meters that get the same calls at the same time. A
    failed step leaves a sharded model in an inconsistent state and the other ranks waiting, so all of them must be
    recreated.

    A GPU process may take `budget_bytes`. A CPU has no such limit, so there a step does not fit if the process's
    resident size exceeded it. `kind` is the device type to compute as (precision), `device` where it is done. `seconds`
    says how long each part of the start took.
    """

    def __init__(
        self,
        model: ModelConfig,
        settings: TrainSettings,
        budget_bytes: int | None = None,
        device: str = "cuda",
        kind: str | None = None,
        group: ProbeGroup | None = None,
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._config, self._settings = torch.device(device), model, settings
        self._budget = budget_bytes
        self._broken: str | None = None
        self._precision = resolve_precision(settings.precision, kind or self._device.type)
        self._world_size = group.world_size if group is not None else settings.most_workers
        with self._timed("context"):
            self._open_device()
            if group is not None:
                group.join(self._device.type)
            elif self._world_size > 1 and not settings.shard:
                join_alone(self._device.type)
        with self._timed("model"):
            self._bare = probe_model(model, self._device).train()
        with self._timed("compilation"):  # before it is wrapped, as in training: FSDP2 changes the blocks' classes
            accelerate(self._bare, settings, self._precision)
        with self._timed("model"):
            self._wrap()
            self._optimizer = make_optimizer(self._bare, settings)
            decay = settings.average_decay
            self._average = WeightAverage(self._bare, decay) if decay is not None else None
        with self._timed("first_step"), contextlib.suppress(torch.OutOfMemoryError):
            self._run(1, (1000, 16))  # the optimizer's states come with its first step

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def _open_device(self) -> None:
        if self._device.type != "cuda":
            return
        self._device = torch.device("cuda", torch.cuda.current_device())  # some calls want the number
        if self._budget is not None:
            total = torch.cuda.get_device_properties(self._device).total_memory
            _wait_for_memory(self._device, min(self._budget, total))
            torch.cuda.set_per_process_memory_fraction(min(1.0, self._budget / total), self._device)

    def _wrap(self) -> None:
        self._model = parallel_model(self._bare, self._settings, self._world_size, self._device)

    def measure(self, batch_size: int, edges: Edges, num_steps: int, *, fresh: bool = True) -> Probe:
        """Real steps; see `Meter`. Raises `ProfileError` after a failed step of a sharded model."""
        if self._broken is not None:
            raise ProfileError(
                "a failed step left the sharded model in an inconsistent state",
                why=self._broken,
                remedy="recreate the meters of all ranks",
            )
        if fresh:
            self._empty()
        _reset_peak(self._device)
        # Memory is freed only after the except block, when no traceback holds the failed step's tensors.
        try:
            seconds = min(self._run(batch_size, edges) for _ in range(num_steps))
            return self._within_budget(Probe(batch_size, True, _peak_bytes(self._device), seconds))
        except torch.OutOfMemoryError as error:
            why = first_line(error)
        self._recover(why)
        return Probe(batch_size, False, why=why)

    def _within_budget(self, probe: Probe) -> Probe:
        """The probe; on a CPU, it may not fit its budget."""
        peak, budget = probe.peak_bytes, self._budget
        if self._device.type == "cuda" or budget is None or peak is None or peak <= budget:
            return probe
        return Probe(
            probe.batch_size, False, why=f"the process took {peak / _GIB:.2f} GiB of a budget of {budget / _GIB:.2f}"
        )

    def _recover(self, why: str) -> None:
        """Clean up after an aborted step: DDP refuses the next step after an aborted backward pass."""
        self._optimizer.zero_grad(set_to_none=True)
        if is_sharded(self._settings, self._world_size):
            self._broken = why
            return
        self._model = self._bare  # free the old DDP's buckets before the new DDP allocates its own
        # The first DDP of a process imports modules in its constructor, whose frames hold it in a cycle: without a
        # collection its buckets, as large as the weights, would leak.
        gc.collect()
        self._empty()
        self._wrap()

    def _run(self, batch_size: int, edges: Edges) -> float:
        batch = SpeechBatch.synthetic(
            batch_size,
            *edges,
            vocab=self._config.vocab_size,
            device=self._device,
            sample_rate=self._config.sample_rate,
        )
        self._wait()
        start = time.perf_counter()
        train_step(
            self._model,
            [batch] * micro_batches(self._settings, self._world_size),
            self._optimizer,
            self._settings,
            precision=self._precision,
            label_smoothing=self._config.label_smoothing,
            average=self._average,
        )
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _empty(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def probe_model(config: ModelConfig, device: torch.device | str) -> Canary:
    """A Canary on `device` whose weights are meaningless but compute like trained weights: nothing overflows, and none
    are zeros, which GPUs multiply faster.

    Drawing 0.9 billion numbers takes a processor 17 s, longer than the probes. Here matrices repeat 2¹⁶ normal numbers
    of standard deviation 0.02, biases are 0, and normalizations and computed tables are as in a new model.
    """
    with torch.device("meta"):
        model = Canary(config)
    model.to_empty(device=device)
    model.tie_head()
    model.reset_constants()
    noise = torch.randn(_NOISE, device=device).mul_(0.02)
    with torch.no_grad():
        for parameter in model.parameters():
            _repeat(noise, parameter) if parameter.ndim > 1 else parameter.zero_()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm1d):
            module.reset_parameters()
    return model


_NOISE = 1 << 16
_GIB = 2**30


def _repeat(numbers: torch.Tensor, target: torch.Tensor) -> None:
    """Fill a contiguous tensor with `numbers` (N,), again and again."""
    flat = target.view(-1)
    whole = len(flat) - len(flat) % len(numbers)
    flat[:whole].view(-1, len(numbers)).copy_(numbers)
    flat[whole:].copy_(numbers[: len(flat) - whole])


def _wait_for_memory(device: torch.device, needed_bytes: int, seconds: float = 30.0) -> None:
    """A process that has just ended may still hold memory, and would make batches fail that fit."""
    until = time.monotonic() + seconds
    while torch.cuda.mem_get_info(device)[0] < needed_bytes and time.monotonic() < until:
        time.sleep(0.5)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: resets the peak of the resident size


def _peak_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return None
