"""The training loop of one rank: steps, metrics, validation, checkpoints, and when to stop.

It knows neither Ray nor MLflow: batches come from an iterator, numbers go to a `log` function, and ranks meet
through `torch.distributed` where it is initialised. Random numbers are seeded by (seed, step, rank), so a
resumed run draws what an uninterrupted one would.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytrain.data.batch import LoadedStep, SpeechBatch
from raytrain.errors import TrainingError
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, make_folder
from raytrain.training.average import WeightAverage
from raytrain.training.checkpoint import CheckpointFolder, CheckpointWriter, validation_of
from raytrain.training.optim import learning_rate, set_learning_rate
from raytrain.training.settings import TrainSettings
from raytrain.training.step import StepResult, resolve_precision, running_statistics, train_step


class GaveUp(TrainingError):
    """Training ended itself, on all ranks at once: started again from the last checkpoint it would end the same."""


Log = Callable[[dict[str, float], int, float], None]


@dataclass
class _OfBucket:
    """What this rank saw of one bucket: utterances of a whole step, audio, and the peak (bytes) of the GPU's steps."""

    size: int = 0
    samples: int = 0
    padded_samples: int = 0
    peak: int = 0


@dataclass
class _Window:
    """What happened since the last log line, on this rank, kept on the device until it is read."""

    results: list[StepResult] = field(default_factory=list)
    loaded: list[Sequence[LoadedStep]] = field(default_factory=list)  # without their tensors
    rows: int = 0
    samples: int = 0
    padded_samples: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    replaced: int = 0
    flops: float = 0.0
    waited: float = 0.0
    read: float = 0.0
    read_on_cpu: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    by_bucket: dict[int, _OfBucket] = field(default_factory=dict)

    def add(self, result: StepResult, micro: Sequence[LoadedStep], waited: float, peak: int = 0) -> None:
        """Count one step; its batches are still on the host, so reading their lengths waits for nothing."""
        self.results.append(result)
        self.waited += waited
        plan = micro[0].plan
        of_bucket = self.by_bucket.setdefault(plan.bucket, _OfBucket())
        of_bucket.size, of_bucket.peak = sum(plan.sizes), max(of_bucket.peak, peak)
        for loaded in micro:
            batch = loaded.batch
            self.rows += len(batch)
            self.samples += int(batch.audio_lengths.sum())
            self.padded_samples += batch.audio.numel()
            self.tokens += int(batch.token_lengths.sum())
            self.padded_tokens += batch.tokens.numel()
            self.replaced += loaded.num_replaced
            self.read += loaded.read_seconds
            self.read_on_cpu += loaded.cpu_seconds
            of_bucket.samples += int(batch.audio_lengths.sum())
            of_bucket.padded_samples += batch.audio.numel()
        self.loaded.append([_without_tensors(loaded) for loaded in micro])

    def data_metrics(self, elapsed: float) -> dict[str, float]:
        """Shares of `elapsed` seconds in which this rank waited for data and in which its loader's threads read, and of
        the latter the share in which they had a CPU. Those of threads are left out where none are here."""
        metrics = {"data_wait": self.waited / elapsed}
        if self.read:
            # What was read ahead of the first step is in its window too.
            metrics |= {"loader_busy": min(1.0, self.read / elapsed), "loader_cpu": self.read_on_cpu / self.read}
        return metrics

    def totals(self, device: torch.device, stop: bool, save: bool) -> tuple[dict[str, float], list[float]]:
        """Sums over all ranks, with the losses'; `stop` and `save` are above 0 everywhere if they are true on any rank.
        And what tells this rank's steps apart: 1 where one was skipped."""
        names = ("rows", "samples", "padded_samples", "tokens", "padded_tokens", "replaced", "flops")
        values = {name: float(getattr(self, name)) for name in names} | {"stop": float(stop), "save": float(save)}
        skipped = torch.stack([result.skipped for result in self.results])
        # The loss of a skipped step is no number, and would hide those of the others.
        losses = torch.stack([torch.where(one.skipped > 0, 0, one.sums) for one in self.results]).sum(0)
        numbers = torch.tensor(list(values.values()), dtype=torch.float64)
        numbers = torch.cat([numbers.to(device), losses.double()])
        if dist.is_initialized():
            dist.all_reduce(numbers)
        found = numbers.tolist()
        return dict(zip([*values, "loss", "ce_loss", "ctc_loss", "labels"], found, strict=True)), skipped.tolist()


def _without_tensors(loaded: LoadedStep) -> LoadedStep:
    return LoadedStep(None, loaded.plan, loaded.state, loaded.num_replaced, loaded.is_last, rows=loaded.rows)  # type: ignore[arg-type]


@dataclass
class TrainingLoop:
    """All that one rank needs; `run` trains until a limit is reached and returns the last step.

    `model` is the bare model; `wrapped` is what the step calls (the model itself or DDP around it). `shares` are those
    of a step's `num_shares` that this rank takes: as many of `batches` in a row make a step. `on_out_of_memory` is told
    the bucket and the batch size of a step that did not fit; `before_step` the step that begins, and its batch; `doing`
    what the rank does next; `flops` gives what a step takes for a batch, for the share of `peak_flops` that is reached
    (MFU); `precision` is fp32 or bf16, by default what the settings say for the device; `before_saving` is called
    before each checkpoint. On every log line `save_now` is asked whether to save at once (a node is about to go), and
    on rank 0 `stop_now` whether to end. Training gives up where clearly more than `max_replaced` of the rows were
    replaced, as a share, since their audio can't be read.
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
    audio_seconds: float = 0.0
    label_smoothing: float = 0.0
    shares: Sequence[int] = (0,)
    num_shares: int = 1
    average: WeightAverage | None = None
    sharded: bool = False
    on_out_of_memory: Callable[[int, int], None] = lambda bucket, size: None
    before_step: Callable[[int, LoadedStep], None] = lambda step, loaded: None
    doing: Callable[[str], None] = lambda what: None
    before_saving: Callable[[], None] = lambda: None
    save_now: Callable[[], bool] = lambda: False
    stop_now: Callable[[], bool] = lambda: False
    flops: Callable[[SpeechBatch], float] | None = None
    peak_flops: float | None = None
    precision: str | None = None
    max_replaced: float = 1.0

    def run(self) -> int:
        """Train to `max_steps`, the batches' end, `max_minutes`, `stop_at_wer` or the end of patience."""
        self._started = time.perf_counter()
        self._heard: Counter[str] = Counter()
        self._skipped_in_a_row = self._skipped = self._peak = 0
        self._rows = self._replaced = 0.0
        note = self.checkpoints.best_note(validation_of(self.checkpoint_meta))
        self._best = (note["error"], note["step"]) if note else (math.inf, self.step)
        self._stop = self.step >= self.settings.max_steps
        self._precision = self.precision or resolve_precision(self.settings.precision, self.device.type)
        self.wrapped.train()
        with CheckpointWriter(self.checkpoints) as self._writer:
            if not self._stop:
                self._train()
        return self.step

    def _train(self) -> None:
        window, batches = _Window(), iter(self.batches)
        while not self._stop:
            self.doing(f"waiting for the batch of step {self.step + 1}")
            asked = time.perf_counter()
            micro = list(itertools.islice(batches, len(self.shares)))
            if not micro:
                return
            waited = time.perf_counter() - asked
            self.step += 1
            self.before_step(self.step, micro[0])
            self.doing(f"in step {self.step}, bucket {micro[0].plan.bucket}")
            set_learning_rate(self.optimizer, learning_rate(self.step, self.settings))
            result = self._one_step(micro)
            window.add(result, micro, waited, self._step_peak())
            for loaded in micro:
                self._heard.update(loaded.samples_by_corpus)
                window.flops += self.flops(loaded.batch) if self.flops is not None else 0.0
            window = self._after_step(micro[-1], window)

    def _one_step(self, micro: Sequence[LoadedStep]) -> StepResult:
        try:
            return train_step(
                self.wrapped,
                [loaded.batch.to(self.device) for loaded in micro],
                self.optimizer,
                self.settings,
                precision=self._precision,
                label_smoothing=self.label_smoothing,
                seeds=[hash((self.seed, self.step, share)) & 0x7FFF_FFFF for share in self.shares],
                average=self.average,
            )
        except torch.OutOfMemoryError as error:
            bucket, size = micro[0].plan.bucket, max(len(loaded.batch) for loaded in micro)
            self.on_out_of_memory(bucket, size)
            raise TrainingError(
                f"step {self.step} does not fit into the device's memory",
                got=f"{size} utterances of bucket {bucket}",
                why=str(error).splitlines()[0],
                remedy="training goes on from the last checkpoint with fewer of them; lower oomptimize.memory_fraction "
                "where that happens often",
            ) from error

    def _after_step(self, loaded: LoadedStep, window: _Window) -> _Window:
        last = loaded.is_last or self.step >= self.settings.max_steps
        save = False
        if self.step % self.settings.log_every_steps == 0 or last:
            stop, save = self._log_window(loaded, window)
            self._stop = stop or last
            window = _Window()
        error = None
        if self.validate is not None and (self._stop or self.step % self.settings.validate_every_steps == 0):
            error = self._run_validation()
            window.started = time.perf_counter()
        if self._stop or save or error is not None or self.step % self.settings.checkpoint_every_steps == 0:
            self._save(loaded, error)
        return window

    def seconds(self) -> float:
        """Training time so far, that of interrupted runs included."""
        return self.seconds_before + time.perf_counter() - self._started

    def _log_window(self, loaded: LoadedStep, window: _Window) -> tuple[bool, bool]:
        limit = self.settings.max_minutes
        late = limit is not None and self.seconds() > limit * 60
        end = self.rank == 0 and (late or self.stop_now())
        sums, skipped = window.totals(self.device, end, self.save_now())
        elapsed = time.perf_counter() - window.started
        self._count_skipped(window, skipped)
        self.audio_seconds += sums["samples"] / self.sample_rate
        if self.rank == 0:
            labels, steps = max(sums["labels"], 1.0), len(window.results)
            ranks = dist.get_world_size() if dist.is_initialized() else 1
            metrics = {
                **{name: sums[name] / labels for name in ("loss", "ce_loss", "ctc_loss") if sums["labels"]},
                "lr": learning_rate(self.step, self.settings),
                "batch_size": sums["rows"] / steps,
                "audio_padding": 1 - sums["samples"] / sums["padded_samples"],
                "token_padding": 1 - sums["tokens"] / sums["padded_tokens"],
                "audio_seconds_per_second": sums["samples"] / self.sample_rate / elapsed,
                "tokens_per_second": sums["tokens"] / elapsed,
                "audio_seconds_per_second_per_worker": sums["samples"] / self.sample_rate / elapsed / ranks,
                "steps_per_second": steps / elapsed,
                **window.data_metrics(elapsed),
                "memory_gib": self._peak / 2**30 if self._peak else _resident_gib(),
                "bucket": loaded.plan.bucket,
                **self._by_bucket(window),
                "epoch": loaded.state.epoch,
                "audio_hours": self.audio_seconds / 3600,
                "replaced": sums["replaced"],
                "skipped_steps": self._skipped,
            }
            grad_norm = float(window.results[-1].grad_norm)
            if math.isfinite(grad_norm):
                metrics["grad_norm"] = grad_norm
            if self.device.type == "cuda":
                free, total = torch.cuda.mem_get_info(self.device)
                metrics["memory_headroom"] = free / total
            if self.peak_flops:
                metrics["mfu"] = sums["flops"] / elapsed / ranks / self.peak_flops
            if len(self._heard) > 1:  # this rank's audio since it started, which is a fair sample of all
                heard = self._heard.total()
                metrics |= {f"share_{corpus}": samples / heard for corpus, samples in self._heard.items()}
            self.log(metrics, self.step, self.seconds())
        self._give_up_if_nothing_is_finite()
        self._give_up_if_much_is_replaced(sums["rows"], sums["replaced"])
        return sums["stop"] > 0, sums["save"] > 0

    def _step_peak(self) -> int:
        """Bytes that the step took of a GPU at its peak; the host knows without waiting. 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._peak = max(self._peak, peak)
        return peak

    def _by_bucket(self, window: _Window) -> dict[str, float]:
        """Batch size and padding of each bucket that the window had steps of, and what a GPU had left in them."""
        metrics: dict[str, float] = {}
        total = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 0
        for bucket, one in sorted(window.by_bucket.items()):
            metrics[f"batch_size_by_bucket/{bucket:03}"] = one.size
            metrics[f"audio_padding_by_bucket/{bucket:03}"] = 1 - one.samples / one.padded_samples
            if total:
                metrics[f"memory_headroom_by_bucket/{bucket:03}"] = 1 - one.peak / total
        return metrics

    def _count_skipped(self, window: _Window, skipped: list[float]) -> None:
        """All ranks skip the same steps; each notes the rows that it had in them."""
        first = self.step - len(skipped) + 1
        for step, micro, was_skipped in zip(itertools.count(first), window.loaded, skipped, strict=False):
            if not was_skipped:
                self._skipped_in_a_row = 0
                continue
            self._skipped += 1
            self._skipped_in_a_row += 1
            rows = [row._asdict() for loaded in micro for row in loaded.rows]
            body = {"step": step, "rank": self.rank, "bucket": micro[0].plan.bucket, "rows": rows}
            folder = make_folder(self.checkpoints.folder.parent / "bad_steps")
            atomic_write_bytes(folder / f"step_{step:08d}_rank_{self.rank}.json", canonical_json(body))

    def _give_up_if_nothing_is_finite(self) -> None:
        if self._skipped_in_a_row >= self.settings.max_skipped_steps:
            raise GaveUp(
                f"the gradients of {self._skipped_in_a_row} steps in a row were not finite, up to step {self.step}",
                got=f"learning rate {learning_rate(self.step, self.settings):.2e}",
                allowed=f"train.max_skipped_steps: {self.settings.max_skipped_steps}",
                remedy="lower train.learning_rate or raise train.warmup_steps; bad_steps in the run folder has the "
                "steps' rows; training resumes from the last checkpoint",
            )

    def _give_up_if_much_is_replaced(self, rows: float, replaced: float) -> None:
        """Of few rows the share says little: what counts is the number less three of its standard deviations."""
        self._rows += rows
        self._replaced += replaced
        if self._replaced - 3 * math.sqrt(self._replaced) > self.max_replaced * self._rows:
            share = f"{self._replaced / self._rows:.1%}"
            raise GaveUp(
                f"the audio of too many rows can't be read, up to step {self.step}",
                got=f"{self._replaced:.0f} of {self._rows:.0f} rows replaced by others ({share})",
                allowed=f"data.max_bad_fraction = {self.max_replaced:.2%}",
                remedy="quarantine.jsonl in the run folder names the recordings: mend them or leave their rows out, or "
                "raise the limit; training resumes from the last checkpoint",
            )

    def _run_validation(self) -> float | None:
        """The validation's error, None where it has no score."""
        self.doing(f"validating after step {self.step}")
        self._average_statistics()
        with contextlib.ExitStack() as stack:
            if self.average is not None:
                stack.enter_context(self.average.in_place())
            if self.sharded:
                stack.enter_context(sharded_module().gathered(self.model))
            metrics = self.validate(self.model, self.device)
        if self.rank == 0:
            self.log(metrics, self.step, self.seconds())
        error, goal = metrics.get("error"), self.settings.stop_at_wer
        if error is None:
            return None
        if goal is not None and metrics.get("wer", math.inf) <= goal:
            self._stop = True
        if error < self._best[0]:
            self._best = (error, self.step)
        patience = self.settings.patience
        if patience is not None and self.step - self._best[1] >= patience * self.settings.validate_every_steps:
            self._stop = True
        return error

    def _average_statistics(self) -> None:
        """Batch norm's running statistics are a rank's own; what is validated and saved is their mean over shares."""
        buffers = running_statistics(self.model)
        if self.num_shares == len(self.shares) or not buffers:
            return
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers]) * (len(self.shares) / self.num_shares)
        dist.all_reduce(flat)
        means = flat.split([buffer.numel() for buffer in buffers])
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(mean.view_as(buffer))

    def _save(self, loaded: LoadedStep, error: float | None) -> None:
        self._average_statistics()
        self.doing(f"saving step {self.step}")
        self.before_saving()
        try:
            self._copy_and_write(loaded, error)
            return
        except torch.OutOfMemoryError:
            if self.sharded:
                raise  # ranks copy together, and the others know nothing of this
        # Gradients are of no use any more, and the cache is the next step's: with both gone there is room for copies.
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._copy_and_write(loaded, error)

    def _copy_and_write(self, loaded: LoadedStep, error: float | None) -> None:
        if self.sharded:
            one = sharded_module()
            parts = {
                "model": one.model_state(self.model),
                "optimizer": one.optimizer_state(self.model, self.optimizer),
            }
        else:
            parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.average is not None:
            parts["average"] = self.average.state_dict()
        if self.rank != 0:
            return
        meta = {
            **self.checkpoint_meta,
            "schedule": loaded.state.to_dict(),
            "seconds": round(self.seconds(), 3),
            "audio_seconds": self.audio_seconds,
        }
        self._writer.save(self.step, parts, meta, error, wait=self._stop)


def sharded_module() -> Any:
    """`raytrain.training.sharded`, whose imports cost seconds that nobody else should pay."""
    from raytrain.training import sharded

    return sharded


def _resident_gib() -> float:
    """The most memory that this process had so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
