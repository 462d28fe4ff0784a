"""The training loop of one rank: steps, metrics, validation, checkpoints, and when to stop.

It knows neither Ray nor MLflow: batches come from an iterator, metrics go to a `log` function, and ranks communicate
through `torch.distributed` if it is initialized. Random numbers are seeded by (seed, step, share), so a resumed run
draws the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from raytrain.data.batch import LoadedStep
from raytrain.errors import TrainingError, first_line
from raytrain.training.ahead import DeviceCopies
from raytrain.training.checkpoint import CheckpointFolder, CheckpointWriter
from raytrain.training.checkpoint_meta import CheckpointMeta, validation_of
from raytrain.training.hooks import LoopHooks, Validate
from raytrain.training.limits import Patience, ReplacedRows, SkippedSteps
from raytrain.training.optim import learning_rate, set_learning_rate
from raytrain.training.settings import TrainSettings
from raytrain.training.state import Progress, RankShares, TrainState
from raytrain.training.step import StepResult, resolve_precision, train_step
from raytrain.training.window import FlopsEstimate, LogWindow, PeakMemory, WindowTotals


@dataclass
class TrainingLoop:
    """The state of one rank; `run` trains until a limit is reached and returns the last step.

    `precision` is fp32 or bf16, by default chosen by the settings for the device. `flops` estimates a step's
    operations, to compute the share of the device's peak that is reached. Training gives up if significantly more than
    the fraction `max_replaced` of the rows were replaced because their audio can't be read.
    """

    state: TrainState
    settings: TrainSettings
    batches: Iterable[LoadedStep]
    checkpoints: CheckpointFolder
    device: torch.device
    checkpoint_meta: CheckpointMeta
    seed: int
    sample_rate: int
    hooks: LoopHooks = field(default_factory=LoopHooks)
    progress: Progress = field(default_factory=Progress)
    shares: RankShares = field(default_factory=RankShares)
    label_smoothing: float = 0.0
    precision: str | None = None
    flops: FlopsEstimate | None = None
    max_replaced: float = 1.0

    def run(self) -> int:
        """Train to `max_steps`, the batches' end, `max_minutes`, `stop_at_wer` or until patience runs out."""
        self.progress.start_clock()
        self._samples_by_corpus: Counter[str] = Counter()
        self._skipped = SkippedSteps(self.checkpoints.folder.parent / "bad_steps", self.shares.rank, self.settings)
        self._replaced = ReplacedRows(self.max_replaced)
        self._memory = PeakMemory(self.device)
        self._copies = DeviceCopies(self.device)
        note = self.checkpoints.best_note(validation_of(self.checkpoint_meta))
        best = (note["error"], note["step"]) if note else (math.inf, self.progress.step)
        self._patience = Patience(self.settings, *best)
        self._stop = self.progress.step >= self.settings.max_steps
        self._precision = self.precision or resolve_precision(self.settings.precision, self.device.type)
        self.state.wrapped.train()
        with CheckpointWriter(self.checkpoints) as self._writer:
            if not self._stop:
                self._train()
        return self.progress.step

    def _train(self) -> None:
        window, batches = LogWindow(), iter(self.batches)
        while not self._stop:
            self.hooks.on_activity(f"waiting for the batch of step {self.progress.step + 1}")
            asked = time.perf_counter()
            micro_batches = list(itertools.islice(batches, len(self.shares.shares)))
            if not micro_batches:
                return
            wait_seconds = time.perf_counter() - asked
            self.progress.step += 1
            self._start_step(micro_batches[0])
            result = self._run_step(micro_batches)
            window.add(result, micro_batches, wait_seconds, self._memory.step_peak())
            for loaded in micro_batches:
                self._samples_by_corpus.update(loaded.samples_by_corpus)
                window.flops += self.flops.of_batch(loaded.batch) if self.flops is not None else 0.0
            window = self._finish_step(micro_batches[-1], window)

    def _start_step(self, loaded: LoadedStep) -> None:
        step = self.progress.step
        self.hooks.before_step(step, loaded)
        self.hooks.on_activity(f"in step {step}, bucket {loaded.plan.bucket}")
        set_learning_rate(self.state.optimizer, learning_rate(step, self.settings))

    def _run_step(self, micro_batches: Sequence[LoadedStep]) -> StepResult:
        step = self.progress.step
        try:
            return train_step(
                self.state.wrapped,
                self._copies.copy([loaded.batch for loaded in micro_batches]),
                self.state.optimizer,
                self.settings,
                precision=self._precision,
                label_smoothing=self.label_smoothing,
                seeds=[hash((self.seed, step, share)) & 0x7FFF_FFFF for share in self.shares.shares],
                average=self.state.average,
            )
        except torch.OutOfMemoryError as error:
            bucket, size = micro_batches[0].plan.bucket, max(len(loaded.batch) for loaded in micro_batches)
            self.hooks.on_out_of_memory(bucket, size)
            raise TrainingError(
                f"step {step} does not fit into the device's memory",
                got=f"{size} utterances of bucket {bucket}",
                why=first_line(error),
                remedy="training resumes from the last checkpoint with fewer of them; lower oomptimize.memory_fraction "
                "if that happens often",
            ) from error

    def _finish_step(self, loaded: LoadedStep, window: LogWindow) -> LogWindow:
        """Log, validate and save if due after a step; returns the window of the next one."""
        step = self.progress.step
        last = loaded.is_last or step >= self.settings.max_steps
        save = False
        if step % self.settings.log_every_steps == 0 or last:
            totals = self._log_window(loaded, window)
            self._stop, save = totals.stop > 0 or last, totals.save > 0
            window = LogWindow()
        error = None
        validate = self.hooks.validate
        if validate is not None and (self._stop or step % self.settings.validate_every_steps == 0):
            error = self._run_validation(validate)
            window.started = time.perf_counter()
        if self._stop or save or error is not None or step % self.settings.checkpoint_every_steps == 0:
            self._save(loaded, error)
        return window

    def _log_window(self, loaded: LoadedStep, window: LogWindow) -> WindowTotals:
        rank, step, limit = self.shares.rank, self.progress.step, self.settings.max_minutes
        late = limit is not None and self.progress.total_seconds() > limit * 60
        stop = rank == 0 and (late or self.hooks.should_stop())
        totals = window.totals(self.device, stop, self.hooks.should_save())
        elapsed = time.perf_counter() - window.started
        self._skipped.add(step, window.steps, window.skipped())
        self.progress.audio_seconds += totals.samples / self.sample_rate
        if rank == 0:
            self.hooks.log(self._metrics(loaded, window, totals, elapsed), step, self.progress.total_seconds())
        self._skipped.check(step)
        self._replaced.add(totals.rows, totals.replaced, step)
        return totals

    def _metrics(self, loaded: LoadedStep, window: LogWindow, totals: WindowTotals, elapsed: float) -> dict[str, float]:
        return {
            **totals.losses(),
            "lr": learning_rate(self.progress.step, self.settings),
            **totals.rates(len(window.results), elapsed, self.sample_rate),
            **window.data_metrics(elapsed),
            "memory_gib": self._memory.peak_gib(),
            "bucket": loaded.plan.bucket,
            **window.bucket_metrics(self._memory.device_bytes),
            "epoch": loaded.state.epoch,
            "audio_hours": self.progress.audio_seconds / 3600,
            "replaced": totals.replaced,
            "skipped_steps": self._skipped.total,
            **window.gradient_metrics(),
            **self._memory.headroom(),
            **totals.utilization(elapsed, self.flops.peak if self.flops is not None else None),
            **self._corpus_shares(),
        }

    def _corpus_shares(self) -> dict[str, float]:
        """Shares of corpora in this rank's audio since it started, a representative sample of all ranks."""
        if len(self._samples_by_corpus) < 2:
            return {}
        total = self._samples_by_corpus.total()
        return {f"share_{corpus}": samples / total for corpus, samples in self._samples_by_corpus.items()}

    def _run_validation(self, validate: Validate) -> float | None:
        """The validation's error, None if it has no score."""
        step = self.progress.step
        self.hooks.on_activity(f"validating after step {step}")
        self.state.average_statistics(self.shares)
        with self.state.evaluation_weights():
            metrics = validate(self.state.model, self.device)
        if self.shares.rank == 0:
            self.hooks.log(metrics, step, self.progress.total_seconds())
        if self._patience.ends_with(metrics, step):
            self._stop = True
        return metrics.get("error")

    def _save(self, loaded: LoadedStep, error: float | None) -> None:
        self.state.average_statistics(self.shares)
        self.hooks.on_activity(f"saving step {self.progress.step}")
        self.hooks.before_saving()
        try:
            self._copy_and_write(loaded, error)
            return
        except torch.OutOfMemoryError:
            if self.state.sharded:
                raise  # ranks copy together, and the others don't know about this error
        # Gradients are no longer needed, and the cache is for the next step: freeing both makes room for the copies.
        self.state.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._copy_and_write(loaded, error)

    def _copy_and_write(self, loaded: LoadedStep, error: float | None) -> None:
        parts = self.state.state_dicts()
        if self.shares.rank != 0:
            return
        meta: CheckpointMeta = {
            **self.checkpoint_meta,
            "schedule": loaded.state.to_dict(),
            "seconds": round(self.progress.total_seconds(), 3),
            "audio_seconds": self.progress.audio_seconds,
        }
        self._writer.save(self.progress.step, parts, meta, error, wait=self._stop)
