"""One training rank, in a Ray Train worker: build → restore → run.

A worker gets a `TrainingJob` and builds all objects from it and from the run folder's artifacts. It resumes from the
newest complete checkpoint, and writes metrics itself, since Ray's reports are throttled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import train
from ray.train.torch import get_device

from raytrain.cluster.failures import cause_of_kind
from raytrain.cluster.ingest import RankInput, open_batches
from raytrain.cluster.ranks import PreemptionNotices, agree_on_batch_sizes, agree_on_checkpoint, gather
from raytrain.cluster.reservations import note_reservation
from raytrain.cluster.training_job import TrainingJob
from raytrain.config import Config
from raytrain.data.assignment import DamagedPartError
from raytrain.data.batch import LoadedStep, SpeechBatch
from raytrain.errors import CheckpointError
from raytrain.lengths.schedule import shares_of
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.model.cost import peak_flops, training_flops
from raytrain.model.device import Device, worker_device
from raytrain.model.formats.transfer import initialize_from
from raytrain.run_folder.checkpoint_mirror import mirror_of
from raytrain.run_folder.quarantine import share_quarantine
from raytrain.run_folder.scored_rows import make_validator
from raytrain.run_folder.workspace import Workspace
from raytrain.storage.run_store import RunStore
from raytrain.tracking.metrics_file import Log, metrics_log, no_log
from raytrain.training.average import WeightAverage
from raytrain.training.checkpoint import Checkpoint, CheckpointFolder
from raytrain.training.conversion import load_model
from raytrain.training.faults import SAVING, FaultNotes, Watchdog, kills_for_memory
from raytrain.training.hooks import LoopHooks
from raytrain.training.limits import GaveUp
from raytrain.training.loop import TrainingLoop
from raytrain.training.optim import make_optimizer
from raytrain.training.parallel import is_sharded, parallel_model
from raytrain.training.run_notes import (
    GAVE_UP,
    STOP,
    LoweredNote,
    fetch_fault_notes,
    note_giving_up,
    note_lowered,
    shared_fault_notes,
)
from raytrain.training.state import Progress, RankShares, TrainState
from raytrain.training.step import resolve_precision
from raytrain.training.window import FlopsEstimate

Mark = Callable[[int | None, int, int], None]  # see `FaultNotes.marking`


def train_worker(job: TrainingJob) -> None:
    """Train as one rank, to completion.

    Ray Train restarts after any failure. Damaged rows would end every attempt: the first attempt leaves a note, the
    second returns when it sees the note, and the driver raises the error in it.
    """
    store = RunStore(job.location)
    if any(gather(store.refresh(GAVE_UP).exists())):
        return
    try:
        _train(job)
    except Exception as error:
        if (damage := cause_of_kind(error, DamagedPartError)) is not None:
            note_giving_up(store, damage)
        raise


def _train(job: TrainingJob) -> None:
    rank = Rank.of_worker(job)
    model = build_model(rank)
    _learn_from_faults(rank)
    try:
        checkpoint = agree_on_checkpoint(rank.checkpoints, rank.rank, job.meta)
    except GaveUp as error:
        if rank.is_first:
            note_giving_up(rank.store, error, CheckpointError)
        return
    fetch_fault_notes(rank.store)
    state = build(rank, model, checkpoint)
    progress = restore(state, checkpoint, rank.device.torch)
    run(rank, state, progress, checkpoint.meta.get("schedule") if checkpoint else None)
    if rank.is_first:
        rank.checkpoints.flush()


@dataclass(frozen=True)
class Rank:
    """This worker: its job, the run's artifacts, its device, and its rank among `world_size`."""

    job: TrainingJob
    workspace: Workspace
    checkpoints: CheckpointFolder
    notes: FaultNotes
    device: Device
    rank: int
    world_size: int
    local_workers: int

    @classmethod
    def of_worker(cls, job: TrainingJob) -> Rank:
        """The rank that runs in this Ray Train worker."""
        workspace, context = Workspace(job.config, job.location), train.get_context()
        rank = context.get_world_rank()
        return cls(
            job=job,
            workspace=workspace,
            checkpoints=workspace.checkpoints(mirror_of(job.config)),
            notes=shared_fault_notes(workspace.store, job.profile_id, rank),
            device=worker_device(job.cuda, lambda: get_device().index),
            rank=rank,
            world_size=context.get_world_size(),
            local_workers=context.get_local_world_size(),
        )

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.job.config

    @property
    def store(self) -> RunStore:
        """The run folder's files."""
        return self.workspace.store

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes on behalf of all."""
        return self.rank == 0

    @property
    def shares(self) -> range:
        """The shares of each step that this rank takes."""
        return shares_of(self.rank, self.world_size, self.job.num_shares)


def _learn_from_faults(rank: Rank) -> None:
    """Have the first rank lower the batch size that the last attempt was running when a process was killed; all ranks
    must call it."""
    deaths = gather((kills_for_memory(), rank.notes.take_marks()))
    if rank.is_first:
        fetch_fault_notes(rank.store)
        rank.notes.learn_from_deaths(
            dict(kills for kills, _ in deaths), [mark for _, marks in deaths for mark in marks]
        )
        note_reservation(rank.store)


# --- build


def build_model(rank: Rank) -> Canary:
    """The model on the rank's device, with weights initialized from the run's seed."""
    device = rank.device.torch
    if device.type == "cpu":
        torch.set_num_threads(max(1, rank.job.cpus // rank.world_size))
    torch.manual_seed(rank.config.seed)
    model = Canary(rank.workspace.model_config()).to(device)
    model.set_checkpointing(rank.config.train.activation_checkpointing)
    return model


def build(rank: Rank, model: Canary, checkpoint: Checkpoint | None) -> TrainState:
    """The model with its starting weights, and what trains it: the model is wrapped after its weights are loaded, and
    the optimizer is created after that."""
    settings, device = rank.config.train, rank.device.torch
    if checkpoint is not None:
        model.load_state_dict(checkpoint.load("model", device))
    elif settings.init_from:
        initialize_from(model, rank.workspace.tokenizer.models, load_model(Path(settings.init_from).expanduser()))
    return TrainState(
        model=model,
        wrapped=parallel_model(model, settings, rank.world_size, device),
        optimizer=make_optimizer(model, settings),
        average=WeightAverage(model, settings.average_decay) if settings.average_decay is not None else None,
        sharded=is_sharded(settings, rank.world_size),
    )


# --- restore


def restore(state: TrainState, checkpoint: Checkpoint | None, device: torch.device) -> Progress:
    """Load the optimizer and the average (`build` has loaded the weights); returns the training progress."""
    if checkpoint is not None:
        state.load(checkpoint, device)
    return Progress.of_checkpoint(checkpoint)


# --- run


def run(rank: Rank, state: TrainState, progress: Progress, schedule: Mapping[str, Any] | None) -> None:
    """Train to completion; `schedule` is the schedule's state to resume from."""
    job, notes = rank.job, rank.notes
    with (
        metrics_log(rank.store, progress.step, job.mlflow) if rank.is_first else no_log() as log,
        open_batches(rank.workspace, _input(rank, schedule)) as batches,
        notes.marking() as mark,
        Watchdog(rank.config.train.stall_minutes * 60, notes.note_stall) as watchdog,
    ):
        loop = make_loop(rank, state, progress, batches, make_hooks(rank, log, mark, watchdog.beat))
        try:
            loop.run()
        except GaveUp as error:
            # Raising would make Ray Train restart; returning ends training, and the driver raises the error in the
            # note.
            if rank.is_first:
                note_giving_up(rank.store, error)
        finally:
            share_quarantine(rank.store)


def _input(rank: Rank, schedule: Mapping[str, Any] | None) -> RankInput:
    return RankInput(
        batch_sizes=_batch_sizes(rank),
        state=schedule,
        shares=rank.shares,
        num_shares=rank.job.num_shares,
        rank=rank.rank,
        world_size=rank.world_size,
        local_workers=rank.local_workers,
        pin_memory=rank.device.pins_memory,
    )


def _batch_sizes(rank: Rank) -> tuple[int, ...]:
    """Batch sizes that fit all ranks, reduced by what fault notes recorded."""
    sizes = agree_on_batch_sizes(rank.workspace.profiles(), rank.device)
    lowered = rank.notes.lowered(sizes)
    if lowered != sizes and rank.is_first:
        note_lowered(rank.store, LoweredNote(lowered, sizes, rank.notes.reasons()))
    return lowered


def make_hooks(rank: Rank, log: Log, mark: Mark, beat: Callable[[str], None]) -> LoopHooks:
    """The loop's callbacks: it logs with `log` and reports its activity to `mark` and `beat`."""
    notes = rank.notes

    def lower(bucket: int, size: int) -> None:
        notes.lower(bucket, size, "out of memory in a training step")

    return LoopHooks(
        log=log,
        validate=make_validator(rank.workspace, rank.rank, rank.world_size, notes, beat, mark),
        before_step=lambda step, loaded: mark(step, loaded.plan.bucket, max(loaded.plan.sizes)),
        before_saving=lambda: mark(None, SAVING, 0),
        on_activity=beat,
        on_out_of_memory=lower,
        should_save=PreemptionNotices().has_new,
        should_stop=rank.workspace.path(STOP).exists,
    )


def make_loop(
    rank: Rank, state: TrainState, progress: Progress, batches: Iterable[LoadedStep], hooks: LoopHooks
) -> TrainingLoop:
    """A rank's loop over its batches."""
    config, device, model_config = rank.config, rank.device, rank.workspace.model_config()
    return TrainingLoop(
        state=state,
        settings=config.train,
        batches=batches,
        checkpoints=rank.checkpoints,
        device=device.torch,
        checkpoint_meta=rank.job.meta,
        seed=config.seed,
        sample_rate=model_config.sample_rate,
        hooks=hooks,
        progress=progress,
        shares=RankShares(rank.rank, rank.shares, rank.job.num_shares),
        label_smoothing=model_config.label_smoothing,
        precision=resolve_precision(config.train.precision, device.kind),
        flops=FlopsEstimate(_flops(model_config), None if device.is_emulated else peak_flops(device.name)),
        max_replaced=config.data.max_bad_fraction,
    )


def _flops(config: ModelConfig) -> Callable[[SpeechBatch], float]:
    """The FLOPs of a training step on a batch."""
    flops = training_flops(config)
    return lambda batch: flops(batch.audio_lengths * 1000 / config.sample_rate / 80, batch.token_lengths)
