"""Probing sharded weights: a group of processes, one on each GPU of a trial."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from raytrain.training.memory.coordinator import ProbeJob
from raytrain.training.memory.meter import Edges, Meter, Probe, ProbeGroup, joint_probe

if TYPE_CHECKING:
    from ray import ObjectRef

PROBER_CPUS = 0.5  # it only waits for its child process


class ProbingProcess(Meter, Protocol):
    """A meter that runs in one or more processes: started once, and restarted after a batch that killed it.

    `seconds` holds the duration of each phase of the last start, `num_starts` the number of process starts.
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


class GroupMeter:
    """A meter with one rank per GPU of the trial's placement group; each rank is an actor with a child process.

    A batch fits if it fits on every rank. After a rank fails all processes are restarted: the rest would wait for it
    forever.
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
            address: ObjectRef[str] = self._ranks[0].address.remote()
            self._address = ray.get(address)
            starts: list[ObjectRef[dict[str, float]]] = [rank.start.remote(self._address) for rank in self._ranks]
            self.seconds = ray.get(starts)[0]
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
    """One rank of a `GroupMeter`: an actor that can run `stop` while `measure` waits for other ranks."""

    def __init__(self, job: ProbeJob, rank: int, world_size: int, make_meter: MakeMeter) -> None:
        self._job, self._rank, self._world_size, self._make = job, rank, world_size, make_meter
        self._meter: ProbingProcess | None = None

    def address(self) -> str:
        """The address of a free port on this node, used for the ranks' rendezvous."""
        import ray

        with socket.socket() as listener:
            listener.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{listener.getsockname()[1]}"

    def start(self, address: str) -> dict[str, float]:
        """Start the process, which joins the other ranks at `address`; returns the seconds of each phase."""
        self._meter = self._make(self._job, ProbeGroup(self._rank, self._world_size, address))
        self._meter.start()
        return self._meter.seconds

    def measure(self, batch_size: int, edges: Edges, num_steps: int, fresh: bool) -> Probe:
        """See `Meter`."""
        assert self._meter is not None, "the group starts its ranks before it measures"
        return self._meter.measure(batch_size, edges, num_steps, fresh=fresh)

    def stop(self) -> None:
        """End the process; a pending `measure` then reports that the batch does not fit."""
        meter, self._meter = self._meter, None
        if meter is not None:
            meter.kill()


def _rank_actor(job: ProbeJob, rank: int, world_size: int, make_meter: MakeMeter) -> Any:
    """The actor of one rank, in its bundle of this trial's placement group; the first bundle belongs to the trial."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    assert group is not None, "Tune reserves a placement group for each trial"
    bundle = PlacementGroupSchedulingStrategy(group, rank + 1)
    actor = ray.remote(_RankMeter).options(
        num_cpus=PROBER_CPUS, num_gpus=1, max_concurrency=2, scheduling_strategy=bundle
    )
    return actor.remote(job, rank, world_size, make_meter)
