"""The driver's side of training on Ray Train: start the workers, follow their metrics, restart after a failure."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from raytrain.cluster.failures import Failure, decide, failure_of, readable, stalled
from raytrain.cluster.placement import Placement
from raytrain.cluster.reservations import free_noted, free_orphans
from raytrain.cluster.room import Workers, choose_workers, describe_worker, find_room, waiting_for
from raytrain.cluster.training_job import TrainingJob, make_job
from raytrain.config import Config
from raytrain.errors import RaytrainError
from raytrain.run_folder.training_plan import TrainingPlan
from raytrain.storage.leftovers import RAY_FOLDER
from raytrain.storage.run_files import LOWERED_PROFILE
from raytrain.storage.run_store import RunStore
from raytrain.tracking.metrics_file import follow_metrics
from raytrain.training.faults import FaultNotes
from raytrain.training.run_notes import GAVE_UP, STOP, fetch_fault_notes, noted_error, shared_fault_notes

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train.v2.torch.torch_trainer import TorchTrainer

_DEATH_SECONDS = 1.0
_ABORT_SECONDS = 3.0  # the whole Ctrl-C shutdown gets ten
_LEAST_COLLECTIVE_SECONDS = 600


def run_training(
    plan: TrainingPlan, on_metrics: Callable[[dict[str, Any]], None], say: Callable[[str], None] = lambda line: None
) -> None:
    """Train to the end; `on_metrics` gets each line of metrics, and `say` each message.

    Restarts even if Ray Train gives up for good although training could continue: after a step that ran out of memory,
    and after a worker that Ray's memory monitor killed. Raises the worker's own error if it has a readable one.
    """
    config, store = plan.config, RunStore(plan.location, plan.config.run.cache_size)
    job = make_job(plan, store)
    for name in (GAVE_UP, LOWERED_PROFILE, STOP):
        store.discard(name)
    workers = _choose_workers(config, job.cuda, say)
    with _without_ray_folder(store), follow_metrics(store, on_metrics):
        _train_with_restarts(config, store, job, workers, say)
    store.refresh(LOWERED_PROFILE)
    if (error := noted_error(store)) is not None:
        raise error


def _choose_workers(config: Config, cuda: bool, say: Callable[[str], None]) -> Workers:
    """The number of workers to start; prints a line if training waits for room."""
    room, description = find_room(config, cuda), describe_worker(config, cuda)
    workers = choose_workers(config.train.num_workers, room, description)
    if line := waiting_for(workers, room, description):
        say(f"  {line}, for at most {config.train.stall_minutes:g} minutes")
    return workers


def _train_with_restarts(
    config: Config, store: RunStore, job: TrainingJob, workers: Workers, say: Callable[[str], None]
) -> None:
    notes, attempts_left = shared_fault_notes(store, job.profile_id), config.train.max_failures
    while True:
        fetch_fault_notes(store)
        num_reasons, started = len(notes.reasons()), time.time()
        try:
            with contextlib.redirect_stdout(None), _health_check(config):
                _fit(_make_trainer(config, store, job, workers, max_failures=attempts_left))
            return
        except Exception as error:
            fetch_fault_notes(store)
            lowered, failure = notes.reasons()[num_reasons:], failure_of(error)
            if failure is Failure.KILLED_FOR_MEMORY:
                notes.note_kill_for_memory()
            decision = decide(failure, lowered, attempts_left)
            if decision is None:
                raise _final_error(error, config, store, notes, started) from error
            free_noted(store)
            attempts_left = decision.attempts_left
            say(f"  restarting training: {decision.because}")


def _final_error(error: Exception, config: Config, store: RunStore, notes: FaultNotes, started: float) -> Exception:
    """Why the attempt that began at `started` failed: a stall, an error that a worker recorded, or Ray's error."""
    if stalls := notes.stalls(started):
        return stalled(stalls, config)
    return noted_error(store) or readable(error)


@contextlib.contextmanager
def _without_ray_folder(store: RunStore) -> Iterator[None]:
    """Remove Ray Train's own state, from which nothing resumes, before and after training."""
    store.clear(RAY_FOLDER)
    try:
        yield
    finally:
        with contextlib.suppress(RaytrainError):
            store.clear(RAY_FOLDER)


@contextlib.contextmanager
def _health_check(config: Config) -> Iterator[None]:
    """Make Ray Train give up on an unresponsive worker sooner than after its default ten minutes."""
    name = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
    before = os.environ.get(name)
    os.environ.setdefault(name, str(min(600.0, config.train.stall_minutes * 60)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _run_worker(settings: dict[str, TrainingJob]) -> None:
    from raytrain.cluster.training_worker import train_worker  # imports torch, which the driver does not need

    train_worker(settings["job"])


def _make_trainer(
    config: Config, store: RunStore, job: TrainingJob, workers: Workers, max_failures: int
) -> TorchTrainer:
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    class Trainer(TorchTrainer):
        """Replace Ray Train's handler, which swallows Ctrl-C while workers wait for room and then exits with status
        0."""

        def _register_sigint_handler(self, controller: ActorHandle[Any]) -> None:
            self.controller = controller

    stall_seconds = int(config.train.stall_minutes * 60)
    return Trainer(
        _run_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(
            backend=job.backend,
            # A rank that waits for a hung one must not end before the hung rank's watchdog has recorded the hang.
            timeout_s=max(_LEAST_COLLECTIVE_SECONDS, stall_seconds + 60),
        ),
        scaling_config=ScalingConfig(
            num_workers=workers,
            **Placement.train(config.cluster).scaling(gpus=1.0 if job.cuda else 0.0),
        ),
        run_config=RunConfig(
            # Reusing a finished run's name would resume past its end; raytrain's own checkpoints say where to resume.
            name=f"train-{time.time_ns()}",
            storage_path=store.location_of(RAY_FOLDER),
            # By default Ray Train waits a minute for room for its workers, and without a limit forever.
            failure_config=FailureConfig(
                max_failures=max_failures, controller_failure_limit=max(1, round(config.train.stall_minutes))
            ),
        ),
    )


def _fit(trainer: TorchTrainer) -> None:
    """Train to completion; Ctrl-C ends the workers and is raised as an ordinary `KeyboardInterrupt`."""
    import ray

    try:
        trainer.fit()
    except KeyboardInterrupt:
        if (controller := getattr(trainer, "controller", None)) is not None:  # otherwise nothing has started
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(controller.abort.remote(), timeout=_ABORT_SECONDS)
        with contextlib.suppress(ray.exceptions.RayError):
            free_orphans(_DEATH_SECONDS)
        raise
