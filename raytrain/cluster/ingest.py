"""A training worker's batches: read by its own threads or by Ray Data, from the assignment or from a stream.

`RayBatches` makes Ray Data decode and augment the schedule's steps on any free CPUs of the cluster, for GPU hosts with
too few of their own.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import orjson

from raytrain.cluster.placement import Placement, total
from raytrain.cluster.session import quiet_data
from raytrain.config import Config, check_config
from raytrain.data.assignment import Assignment, DamagedPartError
from raytrain.data.batch import LoadedStep, SpeechBatch
from raytrain.data.batch_table import pack_batch, unpack_batch
from raytrain.data.loader import StepReader
from raytrain.data.quarantine import BrokenRecording, Quarantine
from raytrain.data.work import planned_steps, work_of
from raytrain.lengths.schedule import BatchSchedule, StepPlan
from raytrain.run_folder.batches import make_loader, make_schedule, make_step_reader
from raytrain.run_folder.workspace import Workspace
from raytrain.storage.run_store import RunStore
from raytrain.training.run_notes import note_giving_up

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    import pyarrow as pa
    from ray.data import Dataset

_STEPS_PER_DATASET = 2048
_STORE_SHARE = 0.5  # of the object store for queued batches, over all ranks
_DEFAULT_STORE_BYTES = 1 << 30


@dataclass(frozen=True)
class RankInput:
    """What a training rank reads: its `shares` of each step's `num_shares`, starting at the schedule's `state` (from
    the beginning if None). It is one of `world_size` ranks, `local_workers` of which are on its node."""

    batch_sizes: tuple[int, ...]
    state: Mapping[str, Any] | None
    shares: Sequence[int]
    num_shares: int
    rank: int = 0
    world_size: int = 1
    local_workers: int = 1
    pin_memory: bool = False


def open_batches(workspace: Workspace, rank_input: RankInput) -> AbstractContextManager[Iterable[LoadedStep]]:
    """A rank's batches, read as configured; all workers of a Ray Train run must call it."""
    data = workspace.config.data
    if data.workers == "ray":
        return RayBatches(workspace, rank_input)
    work = None
    if data.stream is not None:
        from raytrain.cluster.stream_source import stream_work

        work = stream_work(workspace, rank_input)
    return make_loader(
        workspace,
        rank_input.batch_sizes,
        rank_input.state,
        rank_input.shares,
        rank_input.num_shares,
        rank_input.pin_memory,
        work,
        rank_input.local_workers,
    )


@dataclass(frozen=True)
class DecodeJob:
    """What a task needs to decode shares of steps: the configuration as JSON, and the run folder's path or URI."""

    config: bytes
    location: str
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True)
class ShareNote:
    """A task's notes on a share that it decoded: replaced rows, audio by corpus, and lines for the quarantine file."""

    num_replaced: int
    samples_by_corpus: dict[str, int]
    broken: list[BrokenRecording]


class RayBatches:
    """A rank's shares of each step, in the schedule's order, read by Ray Data on the cluster's free CPUs, which all
    ranks share."""

    def __init__(self, workspace: Workspace, rank_input: RankInput) -> None:
        self._workspace, self._input = workspace, rank_input
        self._schedule = make_schedule(workspace, workspace.assignment(), rank_input.batch_sizes)
        self._quarantine = workspace.quarantine
        self._steps = self._load()

    def __enter__(self) -> RayBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.close()

    def __iter__(self) -> Iterator[LoadedStep]:
        return self._steps

    def _load(self) -> Generator[LoadedStep]:
        schedule, num_shares = self._schedule, self._input.num_shares
        state = schedule.restored(self._input.state) if self._input.state else schedule.initial()
        steps = planned_steps(schedule, state, num_shares)
        while planned := list(islice(steps, _STEPS_PER_DATASET)):
            micro = [(step, share) for step in planned for share in self._input.shares]
            with closing(self._decoded([(step.plan, share) for step, share in micro])) as decoded:
                for (step, _), (batch, note) in zip(micro, decoded, strict=True):
                    self._quarantine.add_lines(note.broken)
                    if self._input.pin_memory:
                        batch = batch.pin_memory()
                    yield LoadedStep(
                        batch, step.plan, step.state, note.num_replaced, step.is_last, note.samples_by_corpus
                    )

    def _decoded(self, micro: list[tuple[StepPlan, int]]) -> Generator[tuple[SpeechBatch, ShareNote]]:
        self._limit_resources()
        batches = self._dataset([_share_plan(plan, share) for plan, share in micro]).iter_batches(
            batch_size=1, batch_format="pyarrow", prefetch_batches=self._workspace.config.train.prefetch_batches
        )
        for table in batches:
            batch, note = unpack_batch(table)
            yield batch, pickle.loads(note)  # made by our own tasks a moment ago

    def _limit_resources(self) -> None:
        """Ranks can't see each other's datasets, so each takes its share of the CPUs and of the object store."""
        import ray
        from ray.data import DataContext, ExecutionResources

        quiet_data()
        store_bytes = ray.cluster_resources().get("object_store_memory", _DEFAULT_STORE_BYTES)
        DataContext.get_current().execution_options.resource_limits = ExecutionResources(
            object_store_memory=store_bytes * _STORE_SHARE / self._input.world_size
        )

    def _dataset(self, shares: list[StepPlan]) -> Dataset:
        import ray

        config, location = self._workspace.config, self._workspace.store.location
        job = DecodeJob(orjson.dumps(config.model_dump(mode="json")), location, self._input.batch_sizes)

        def decode(table: pa.Table) -> pa.Table:
            try:
                return decode_share(pickle.loads(table["share"][0].as_py()), job)
            except DamagedPartError as error:  # which Ray Data would bury in its own error
                note_giving_up(RunStore(location), error)
                raise

        rows = [{"share": pickle.dumps(share)} for share in shares]
        return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            decode,
            batch_size=None,
            batch_format="pyarrow",
            concurrency=max(1, free_cpus(config, self._input.world_size) // self._input.world_size),
            **Placement.data(config.cluster).remote_options(),
        )


def _share_plan(plan: StepPlan, share: int) -> StepPlan:
    """One share of a step as a step of one rank."""
    return StepPlan(plan.bucket, plan.start + sum(plan.sizes[:share]), (plan.sizes[share],), plan.epoch)


def free_cpus(config: Config, world_size: int) -> int:
    """CPUs that training leaves for decoding on the data nodes."""
    data, train = Placement.data(config.cluster), Placement.train(config.cluster)
    nodes = data.nodes()
    shared = {node["NodeID"] for node in nodes}
    elsewhere = total([node for node in train.nodes() if node["NodeID"] not in shared], "CPU")
    left = total(nodes, "CPU") - max(0.0, world_size * train.cpus - elsewhere)
    return min(int(left), sum(map(data.slots, nodes)))


# --- in a task of Ray Data


def decode_share(plan: StepPlan, job: DecodeJob) -> pa.Table:
    """One share of a step as a table of one row. Runs in a Ray Data task, whose process keeps open files for later
    calls."""
    assignment, schedule, reader, quarantine = _opened(job)
    work = work_of(assignment, schedule, plan, 0, schedule.initial(), False)
    loaded = reader.finish(work, reader.start(work))
    note = ShareNote(loaded.num_replaced, loaded.samples_by_corpus, quarantine.take_news())
    return pack_batch(loaded.batch, pickle.dumps(note))


@lru_cache(maxsize=2)
def _opened(job: DecodeJob) -> tuple[Assignment, BatchSchedule, StepReader, Quarantine]:
    workspace = Workspace(check_config(orjson.loads(job.config)), job.location)
    assignment, quarantine = workspace.assignment(), Quarantine(None)
    schedule = make_schedule(workspace, assignment, job.batch_sizes)
    return assignment, schedule, make_step_reader(workspace, assignment, quarantine, num_threads=1), quarantine
