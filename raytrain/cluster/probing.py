"""Probes of batch sizes on a cluster's GPUs: one Ray Tune trial, and one probing process, for every GPU.

An actor holds the `ProbeCoordinator`, and trials ask it what to do next. A trial's meter runs real steps in a process
that may die; it is started once and used for search, timing and soak. Weights sharded over several workers are probed
by a group of as many processes (`probing_groups`); one trial then holds all of their GPUs.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.cluster.placement import Placement
from raytrain.cluster.probing_groups import PROBER_CPUS, GroupMeter, MakeMeter, ProbingProcess
from raytrain.errors import ProfileError, last_line
from raytrain.model.device import emulated_gpu
from raytrain.run_folder.probe_answers import read_answers, write_answers
from raytrain.training.memory.coordinator import Answer, ProbeCoordinator, ProbeJob, ProbeOutcome, Task, run_prober
from raytrain.training.memory.isolated_meter import IsolatedMeter, make_step_meter
from raytrain.training.memory.meter import ProbeGroup
from raytrain.waiting import repeating

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from ray.tune import PlacementGroupFactory

Progress = Callable[[str, int, int], None]  # activity, completed, total


def step_meter(job: ProbeJob, group: ProbeGroup | None = None) -> IsolatedMeter:
    """A meter that runs real steps in a separate process, on the GPU that Ray assigned to this one."""
    device = "cpu" if emulated_gpu() is not None else "cuda"
    return IsolatedMeter(make_step_meter, job.model, job.train, job.budget_bytes, device, "cuda", group)


class CoordinatorActor:
    """Client of a search's `ProbeCoordinator` actor, used by the driver and by trials."""

    def __init__(self, name: str, actor: ActorHandle[Any]) -> None:
        self.name = name
        self._actor: Any = actor

    @classmethod
    def start(cls, job: ProbeJob, answers: Sequence[Answer], placement: Placement) -> CoordinatorActor:
        """Start an actor on a node of `placement`, with the answers of an interrupted search."""
        import ray

        name = f"raytrain-probes-{job.id}-{secrets.token_hex(4)}"
        options = placement.remote_options(cpus=0)
        actor: Any = ray.remote(ProbeCoordinator).options(name=name, **options).remote(job, answers)
        return cls(name, actor)

    @classmethod
    def find(cls, name: str) -> CoordinatorActor:
        """The actor of this name, started by the driver."""
        import ray

        return cls(name, ray.get_actor(name))

    def take(self, prober: str) -> Task:
        """Get the next task of a prober."""
        import ray

        task: ObjectRef[Task] = self._actor.take.remote(prober)
        return ray.get(task)

    def tell(self, prober: str, answer: Answer) -> None:
        """Record the outcome of a prober's task."""
        import ray

        ray.get(self._actor.tell.remote(prober, answer))

    def soaked(self, step: int) -> None:
        """Report how many soak steps have passed; does not wait."""
        self._actor.soaked.remote(step)

    def started(self, seconds: dict[str, float]) -> None:
        """Record that a prober's process runs, and the seconds of each phase of its start."""
        import ray

        ray.get(self._actor.started.remote(seconds))

    def ended(self, num_starts: int) -> None:
        """Record that a prober has ended, and how often its processes were started."""
        import ray

        ray.get(self._actor.ended.remote(num_starts))

    def progress(self) -> tuple[str, int, int]:
        """(activity, completed, total)."""
        import ray

        progress: ObjectRef[tuple[str, int, int]] = self._actor.progress.remote()
        return ray.get(progress)

    def take_news(self) -> list[Answer]:
        """Answers since the last call."""
        import ray

        answers: ObjectRef[list[Answer]] = self._actor.take_news.remote()
        return ray.get(answers)

    def outcome(self) -> ProbeOutcome:
        """The outcome of the search, available once all trials have ended."""
        import ray

        outcome: ObjectRef[ProbeOutcome] = self._actor.outcome.remote()
        return ray.get(outcome)

    def kill(self) -> None:
        """End the actor."""
        import ray

        ray.kill(self._actor)


@dataclass(frozen=True)
class _Trial:
    """What all trials of a search share: the job, the coordinator's name, and how to create a meter."""

    job: ProbeJob
    coordinator: str
    world_size: int
    make_meter: MakeMeter

    def meter(self) -> ProbingProcess:
        """The meter of a trial: for its GPU, or for the group of its GPUs."""
        if self.world_size > 1:
            return GroupMeter(self.job, self.world_size, self.make_meter)
        return self.make_meter(self.job, None)


def _run_trial(parameters: dict[str, int], trial: _Trial) -> None:
    """One trial: probe on a GPU until the coordinator has nothing left to do."""
    from ray import tune

    number = parameters["number"]
    coordinator, meter = CoordinatorActor.find(trial.coordinator), trial.meter()
    try:
        meter.start()
        coordinator.started(meter.seconds)
        prober = f"prober {number}"
        run_prober(prober, coordinator.take, coordinator.tell, meter, trial.job, coordinator.soaked)
        coordinator.ended(meter.num_starts)
    finally:
        meter.close()
    tune.report({"number": number})


def probe_all(
    job: ProbeJob,
    placements: Sequence[Placement],
    answers_file: Path,
    data: Placement,
    on_progress: Progress,
    *,
    world_size: int = 1,
    make_meter: MakeMeter = step_meter,
    gpus: float = 1.0,
) -> ProbeOutcome:
    """All batch sizes of a job, from a trial on each of `placements`: one per GPU, or one per group of `world_size`
    GPUs. The coordinator runs on a node of `data`.

    Answers that `answers_file` holds for an equal job that was interrupted are reused, and new ones are added to it.
    Raises `ProfileError` if a prober fails.
    """
    import ray

    answers = read_answers(answers_file, job)
    coordinator = CoordinatorActor.start(job, answers, data)

    def refresh() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            on_progress(*coordinator.progress())
            if news := coordinator.take_news():
                answers.extend(news)
                write_answers(answers_file, job, answers)

    trial = _Trial(job, coordinator.name, world_size, make_meter)
    try:
        with repeating(refresh, 0.5):
            _run_trials(trial, [_resources(placement, world_size, gpus) for placement in placements])
        return coordinator.outcome()
    finally:
        coordinator.kill()


def _resources(placement: Placement, world_size: int, gpus: float) -> PlacementGroupFactory:
    """What Tune reserves for a trial: a GPU, or a small bundle for the trial plus the GPUs of all ranks."""
    if world_size == 1:
        return placement.trial_resources(PROBER_CPUS, gpus)
    return placement.group_resources(world_size, PROBER_CPUS, gpus)


def _run_trials(trial: _Trial, resources: Sequence[PlacementGroupFactory]) -> None:
    from ray import tune

    trainable = tune.with_resources(
        partial(_run_trial, trial=trial), lambda parameters: resources[parameters["number"]]
    )
    with tempfile.TemporaryDirectory(prefix="raytrain-tune-") as folder:
        tuner = tune.Tuner(
            trainable,
            param_space={"number": tune.grid_search(list(range(len(resources))))},
            run_config=tune.RunConfig(
                name="probes", storage_path=folder, verbose=0, failure_config=tune.FailureConfig(max_failures=1)
            ),
        )
        with contextlib.redirect_stdout(None):
            grid = tuner.fit()
    if grid.errors:
        raise ProfileError(
            "a process that probes batch sizes failed",
            why=last_line(grid.errors[0]),
            remedy="check the node's GPU and memory with `raytrain doctor`, then run oomptimize again",
        )
