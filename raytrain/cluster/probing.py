"""Probes of batch sizes on a cluster's GPUs: one Ray Tune trial, and one probing process, for every GPU.

An actor holds the `ProbeCoordinator`, and trials ask it what to do. A trial's meter runs real steps in a process that
may die, which is started once and serves for search, timing and soak. Weights sharded over several workers are probed
by a group of as many: one trial then holds all of their GPUs.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from raytrain.cluster.nodes import last_line
from raytrain.cluster.placement import Placement
from raytrain.errors import ProfileError
from raytrain.model.device import emulated_gpu
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, read_state
from raytrain.training.memory.coordinator import (
    Answer,
    AnswerNote,
    ProbeCoordinator,
    ProbeJob,
    ProbeOutcome,
    Task,
    answers_from_json,
    answers_to_json,
    run_prober,
)
from raytrain.training.memory.isolated_meter import IsolatedMeter, make_step_meter
from raytrain.training.memory.meter import Edges, Meter, Probe, ProbeGroup, joint_probe
from raytrain.waiting import repeating

Progress = Callable[[str, int, int], None]  # what is done, how many of how many


class ProbingProcess(Meter, Protocol):
    """A meter that is a process, or several: started once, and again after a batch that ended it.

    `seconds` says what the parts of the last start took, `num_starts` how often processes were started.
    """

    seconds: dict[str, float]
    num_starts: int

    def start(self) -> None:
        """Start the process, unless it runs."""
        ...

    def kill(self) -> None:
        """End the process from another thread."""
        ...

    def close(self) -> None:
        """End the process."""
        ...


MakeMeter = Callable[[ProbeJob, ProbeGroup | None], ProbingProcess]


def step_meter(job: ProbeJob, group: ProbeGroup | None = None) -> IsolatedMeter:
    """A meter of real steps in a process of its own, on the GPU that Ray gave this one."""
    device = "cpu" if emulated_gpu() is not None else "cuda"
    return IsolatedMeter(make_step_meter, job.model, job.train, job.budget_bytes, device, "cuda", group)


class GroupMeter:
    """A meter of as many ranks as the trial's placement group has GPUs, each in an actor with a process of its own.

    A batch fits if it fits every rank. After one that does not all processes start anew: the others wait for the rank
    that failed, and would for ever.
    """

    def __init__(self, job: ProbeJob, world_size: int, make_meter: MakeMeter) -> None:
        self._ranks = [_rank_actor(job, rank, world_size, make_meter) for rank in range(world_size)]
        self._address: str | None = None
        self.seconds: dict[str, float] = {}
        self.num_starts = 0

    def start(self) -> None:
        """Start all ranks' processes, unless they run."""
        import ray

        if self._address is None:
            self._address = ray.get(self._ranks[0].address.remote())
            self.seconds = ray.get([rank.start.remote(self._address) for rank in self._ranks])[0]
            self.num_starts += len(self._ranks)

    def measure(self, batch_size: int, edges: Edges, num_steps: int, *, fresh: bool = True) -> Probe:
        """See `Meter`."""
        import ray

        self.start()
        pending = [rank.measure.remote(batch_size, edges, num_steps, fresh) for rank in self._ranks]
        probes: list[Probe] = []
        while pending:
            ready, pending = ray.wait(pending)
            probes += ray.get(ready)
            if not probes[-1].fits and self._address is not None:
                self.kill()
        return joint_probe(probes)

    def kill(self) -> None:
        """End all processes; the next probe starts new ones."""
        import ray

        self._address = None
        ray.get([rank.stop.remote() for rank in self._ranks])

    def close(self) -> None:
        """End all processes."""
        import ray

        self.kill()
        for rank in self._ranks:
            ray.kill(rank)


class _RankMeter:
    """One rank of a `GroupMeter`: an actor that runs `stop` beside a `measure` that waits for other ranks."""

    def __init__(self, job: ProbeJob, rank: int, world_size: int, make_meter: MakeMeter) -> None:
        self._job, self._rank, self._world_size, self._make = job, rank, world_size, make_meter
        self._meter: ProbingProcess | None = None

    def address(self) -> str:
        """A free port on this node for the ranks to meet at."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, address: str) -> dict[str, float]:
        """Start the process, which meets those of the other ranks at `address`; what its parts took."""
        self._meter = self._make(self._job, ProbeGroup(self._rank, self._world_size, address))
        self._meter.start()
        return self._meter.seconds

    def measure(self, batch_size: int, edges: Edges, num_steps: int, fresh: bool) -> Probe:
        """See `Meter`."""
        return self._meter.measure(batch_size, edges, num_steps, fresh=fresh)

    def stop(self) -> None:
        """End the process; a `measure` that waits for it is answered that the batch does not fit."""
        meter, self._meter = self._meter, None
        if meter is not None:
            meter.kill()


def _rank_actor(job: ProbeJob, rank: int, world_size: int, make_meter: MakeMeter) -> Any:
    """The actor of one rank, in its bundle of this trial's placement group; the first bundle is the trial's own."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = PlacementGroupSchedulingStrategy(ray.util.get_current_placement_group(), rank + 1)
    options = {"num_cpus": PROBER_CPUS, "num_gpus": 1, "max_concurrency": 2, "scheduling_strategy": bundle}
    return ray.remote(**options)(_RankMeter).remote(job, rank, world_size, make_meter)


# --- trials

PROBER_CPUS = 0.5  # it waits for the process beside it


def _probe(parameters: dict[str, Any], make_meter: MakeMeter) -> None:
    """One trial: probe on a GPU until the coordinator has nothing left to do."""
    import ray
    from ray import tune

    job, world_size = parameters["job"], parameters["world_size"]
    coordinator = ray.get_actor(parameters["coordinator"])
    if world_size > 1:
        meter: ProbingProcess = GroupMeter(job, world_size, make_meter)
    else:
        meter = make_meter(job, None)

    def take(prober: str) -> Task:
        return ray.get(coordinator.take.remote(prober))

    def tell(prober: str, answer: Answer) -> None:
        ray.get(coordinator.tell.remote(prober, answer))

    prober = f"prober {parameters['number']}"
    try:
        meter.start()
        ray.get(coordinator.started.remote(meter.seconds))
        run_prober(prober, take, tell, meter, job, coordinator.soaked.remote)
        ray.get(coordinator.ended.remote(meter.num_starts))
    finally:
        meter.close()
    tune.report({"number": parameters["number"]})


def probe_all(
    job: ProbeJob,
    placements: Sequence[Placement],
    kept: Path,
    data: Placement,
    on_progress: Progress,
    *,
    world_size: int = 1,
    make_meter: MakeMeter = step_meter,
    gpus: float = 1.0,
) -> ProbeOutcome:
    """All batch sizes of a job, from a trial on each of `placements`: one for every GPU, or one for each group of
    `world_size`. The coordinator runs on a node of `data`.

    `kept` is a file of answers: those of an equal job that was stopped are taken over, and new ones are added. Raises
    `ProfileError` where a prober fails.
    """
    import ray

    answers = read_answers(kept, job)
    name = f"raytrain-probes-{job.id}-{secrets.token_hex(4)}"
    actor = ray.remote(ProbeCoordinator).options(name=name, **data.remote_options(cpus=0))
    coordinator = actor.remote(job, answers)

    def look() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            on_progress(*ray.get(coordinator.progress.remote()))
            if news := ray.get(coordinator.take_news.remote()):
                answers.extend(news)
                _write_answers(kept, job, answers)

    space = {"job": job, "coordinator": name, "world_size": world_size}
    try:
        with repeating(look, 0.5):
            _run_trials(space, [_resources(placement, world_size, gpus) for placement in placements], make_meter)
        return ray.get(coordinator.outcome.remote())
    finally:
        ray.kill(coordinator)


def _resources(placement: Placement, world_size: int, gpus: float) -> Any:
    """What Tune reserves for a trial: a GPU, or a small bundle of its own and the GPUs of all ranks."""
    if world_size == 1:
        return placement.trial_resources(PROBER_CPUS, gpus)
    return placement.group_resources(world_size, PROBER_CPUS, gpus)


def _run_trials(space: dict[str, Any], resources: Sequence[Any], make_meter: MakeMeter) -> None:
    from ray import tune

    trainable = tune.with_resources(
        partial(_probe, make_meter=make_meter), lambda parameters: resources[parameters["number"]]
    )
    with tempfile.TemporaryDirectory(prefix="raytrain-tune-") as folder:
        tuner = tune.Tuner(
            trainable,
            param_space={**space, "number": tune.grid_search(list(range(len(resources))))},
            run_config=tune.RunConfig(
                name="probes", storage_path=folder, verbose=0, failure_config=tune.FailureConfig(max_failures=1)
            ),
        )
        with contextlib.redirect_stdout(None):
            grid = tuner.fit()
    for result in grid:
        if result.error is not None:
            raise ProfileError(
                "a process that probes batch sizes failed",
                why=last_line(result.error),
                remedy="look at the node's GPU and memory with `raytrain doctor`, then run oomptimize again",
            )


# --- answers on disk


@dataclass(frozen=True)
class ProbesNote:
    """What `batch_probes.json` keeps: the answers of each job, by the job's id."""

    jobs: dict[str, list[AnswerNote]]


def read_answers(path: Path, job: ProbeJob) -> list[Answer]:
    """The answers that a stopped process left for an equal job, none where there are none that can be read."""
    notes = _read_jobs(path).get(job.id, [])
    try:
        answers = answers_from_json(notes)
        ProbeCoordinator(job, answers)  # which learns from them, where they are answers to this job
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError):
        return []
    return answers


def _write_answers(path: Path, job: ProbeJob, answers: list[Answer]) -> None:
    jobs = {**_read_jobs(path), job.id: answers_to_json(answers)}
    atomic_write_bytes(path, canonical_json({"jobs": jobs}))


def _read_jobs(path: Path) -> dict[str, Any]:
    """Answers by job, none where they can't be read."""
    note = read_state(path, ProbesNote)
    return note["jobs"] if note else {}
