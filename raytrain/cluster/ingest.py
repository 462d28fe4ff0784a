"""Other ways to a training worker's batches than threads beside it.

`RayBatches` has Ray Data decode and augment the schedule's steps on whatever CPUs of the cluster are free, for GPU
hosts with too few of them. `StreamSource` is an actor that runs the sampler of a stream for all ranks.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from raytrain.cluster.placement import Placement, total
from raytrain.cluster.session import quiet_data
from raytrain.config import Config, check_config
from raytrain.data.assignment import Assignment, DamagedPartError
from raytrain.data.batch import LoadedStep, SpeechBatch
from raytrain.data.loader import StepReader
from raytrain.data.quarantine import BrokenRecording, Quarantine
from raytrain.data.work import StepWork, work_of
from raytrain.errors import RaytrainError
from raytrain.lengths.schedule import BatchSchedule, ScheduleState, StepPlan
from raytrain.run_folder.batches import make_schedule, make_step_reader, make_stream
from raytrain.run_folder.workspace import Workspace
from raytrain.storage.run_store import RunStore

_STEPS_PER_DATASET = 2048
_STORE_SHARE = 0.5  # of the object store for batches that wait, all ranks together
_STREAM_AHEAD = 8  # steps that a stream's sampler is ahead of the ranks


# --- decoding on Ray Data


class RayBatches:
    """A worker's shares of each step from `state` on, in the schedule's order, read by Ray Data on the cluster's free
    CPUs, which it shares with `world_size - 1` other workers."""

    def __init__(
        self,
        workspace: Workspace,
        batch_sizes: tuple[int, ...],
        state: dict[str, Any] | None,
        shares: Sequence[int],
        num_shares: int,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self._workspace, self._batch_sizes = workspace, batch_sizes
        self._schedule = make_schedule(workspace, workspace.assignment(), batch_sizes)
        self._state = self._schedule.restored(state) if state else self._schedule.initial()
        self._shares, self._num_shares = shares, num_shares
        self._world_size, self._pin_memory = world_size, pin_memory
        self._quarantine = workspace.quarantine
        self._steps = self._load()

    def __enter__(self) -> RayBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.close()

    def __iter__(self) -> Iterator[LoadedStep]:
        return self._steps

    def _load(self) -> Iterator[LoadedStep]:
        for planned in self._planned():
            micro = [(one, share) for one in planned for share in self._shares]
            with closing(self._decoded([(plan, share) for (plan, _, _), share in micro])) as decoded:
                for ((plan, state, is_last), _), (batch, note) in zip(micro, decoded, strict=True):
                    self._quarantine.add_lines(note["broken"])
                    if self._pin_memory:
                        batch = batch.pin_memory()
                    yield LoadedStep(batch, plan, state, note["replaced"], is_last, note["samples_by_corpus"])

    def _planned(self) -> Iterator[list[tuple[StepPlan, ScheduleState, bool]]]:
        state, is_last = self._state, self._schedule.is_last(self._state, self._num_shares)
        while not is_last:
            planned = []
            while not is_last and len(planned) < _STEPS_PER_DATASET:
                plan, state = self._schedule.step(state, self._num_shares)
                is_last = self._schedule.is_last(state, self._num_shares)
                planned.append((plan, state, is_last))
            yield planned

    def _decoded(self, micro: list[tuple[StepPlan, int]]) -> Iterator[tuple[SpeechBatch, dict[str, Any]]]:
        import ray
        from ray.data import DataContext, ExecutionResources

        quiet_data()
        context = DataContext.get_current()
        store = ray.cluster_resources().get("object_store_memory", 1 << 30)
        # Ranks do not know of each other's datasets: each takes its part of the CPUs and of the store.
        context.execution_options.resource_limits = ExecutionResources(
            object_store_memory=store * _STORE_SHARE / self._world_size
        )
        job = (orjson.dumps(self._workspace.config.model_dump(mode="json")), self._workspace.store.location)
        sizes = self._batch_sizes

        def decode(table: Any) -> Any:
            try:
                return decode_step(table.to_pylist()[0], *job, sizes)
            except DamagedPartError as error:  # which Ray Data would lose in its own
                from raytrain.cluster.trainer import note_the_end

                note_the_end(RunStore(job[1]), error)
                raise

        shares = [
            {
                "bucket": plan.bucket,
                "start": plan.start + sum(plan.sizes[:share]),
                "size": plan.sizes[share],
                "epoch": plan.epoch,
            }
            for plan, share in micro
        ]
        data = ray.data.from_items(shares, override_num_blocks=len(shares)).map_batches(
            decode,
            batch_size=None,
            batch_format="pyarrow",
            **Placement.data(self._workspace.config.cluster).remote_options(),
            concurrency=max(1, free_cpus(self._workspace.config, self._world_size) // self._world_size),
        )
        batches = data.iter_batches(
            batch_size=1, batch_format="pyarrow", prefetch_batches=self._workspace.config.train.prefetch_batches
        )
        for table in batches:
            yield unpack(table)


def free_cpus(config: Config, world_size: int) -> int:
    """CPUs that training leaves to decoding on the nodes that are for it."""
    data, train = Placement.data(config.cluster), Placement.train(config.cluster)
    nodes = data.nodes()
    shared = {node["NodeID"] for node in nodes}
    elsewhere = total([node for node in train.nodes() if node["NodeID"] not in shared], "CPU")
    left = total(nodes, "CPU") - max(0.0, world_size * train.cpus - elsewhere)
    return min(int(left), sum(map(data.slots, nodes)))


def decode_step(share: dict[str, int], config: bytes, location: str, batch_sizes: tuple[int, ...]) -> Any:
    """One share of a step as a table of one row. Runs in a Ray Data task, whose process keeps what it opened."""
    assignment, schedule, reader, quarantine = _opened(config, location, batch_sizes)
    plan = StepPlan(share["bucket"], share["start"], (share["size"],), share["epoch"])
    work = work_of(assignment, schedule, plan, 0, schedule.initial(), False)
    return pack(reader.finish(work, reader.start(work)), quarantine.take_news())


@lru_cache(maxsize=2)
def _opened(
    config: bytes, location: str, batch_sizes: tuple[int, ...]
) -> tuple[Assignment, BatchSchedule, StepReader, Quarantine]:
    workspace = Workspace(check_config(orjson.loads(config)), location)
    assignment, quarantine = workspace.assignment(), Quarantine(None)
    schedule = make_schedule(workspace, assignment, batch_sizes)
    return assignment, schedule, make_step_reader(workspace, assignment, quarantine, num_threads=1), quarantine


def pack(loaded: LoadedStep, broken: list[BrokenRecording]) -> Any:
    """A loaded step as an Arrow table of one row."""
    note = {
        "replaced": loaded.num_replaced,
        "samples_by_corpus": loaded.samples_by_corpus,
        "broken": broken,
    }
    return pack_batch(loaded.batch, note)


def pack_batch(batch: SpeechBatch, note: dict[str, Any]) -> Any:
    """A batch and a note (JSON values) as an Arrow table of one row, tensors as bytes."""
    import pyarrow as pa

    note = {**note, "shapes": [list(tensor.shape) for tensor in batch.tensors()]}
    columns = [pa.array([tensor.numpy().tobytes()], pa.large_binary()) for tensor in batch.tensors()]
    names = [f"tensor_{number}" for number in range(len(columns))]
    return pa.table([*columns, pa.array([orjson.dumps(note)], pa.binary())], names=[*names, "note"])


def unpack(table: Any) -> tuple[SpeechBatch, dict[str, Any]]:
    """The inverse of `pack_batch`: the batch, and the note."""
    import torch

    note = orjson.loads(table["note"][0].as_py())
    tensors = []
    for number, shape in enumerate(note["shapes"]):
        kind = np.float32 if number == 0 else np.int64
        values = np.frombuffer(table[f"tensor_{number}"][0].as_buffer(), kind)
        tensors.append(torch.from_numpy(values.copy()).view(shape))  # the store's memory can't be written
    return SpeechBatch(*tensors), note


# --- streams


class StreamSource:
    """An actor that runs a stream's sampler for all workers and keeps the steps that some of them has not taken yet."""

    def __init__(
        self,
        config: dict[str, Any],
        location: str,
        batch_sizes: tuple[int, ...],
        num_shares: int,
        world_size: int,
        state: dict[str, Any] | None,
    ) -> None:
        from raytrain.data.stream import StreamState

        workspace = Workspace(check_config(config), location)
        start = StreamState.from_dict(state) if state else StreamState()
        self._steps = make_stream(workspace, batch_sizes, num_shares).steps(start)
        self._kept: dict[int, Any] = {}
        self._asked = [0] * world_size
        self._made, self._end = 0, None
        self._changed = threading.Condition()
        threading.Thread(target=self._produce, name="stream", daemon=True).start()

    def take(self, rank: int, shares: Sequence[int], index: int) -> list[StepWork] | RaytrainError:
        """A worker's shares of step `index`, none after the last step, or what ended the stream."""
        with self._changed:
            self._asked[rank] = index
            for old in [number for number in self._kept if number < min(self._asked)]:
                del self._kept[old]
            self._changed.notify_all()
            self._changed.wait_for(lambda: index in self._kept or self._end is not None)
            if index in self._kept:
                return [self._kept[index].share(share) for share in shares]
            return self._end if isinstance(self._end, RaytrainError) else []

    def _produce(self) -> None:
        end: Any = "end"
        try:
            for step in self._steps:
                with self._changed:
                    self._changed.wait_for(lambda: self._made < max(self._asked) + _STREAM_AHEAD)
                    self._kept[self._made] = step
                    self._made += 1
                    self._changed.notify_all()
        except RaytrainError as error:
            end = error
        except Exception as error:
            end = RaytrainError(
                "reading the corpora failed",
                why=repr(error),
                remedy="run `raytrain doctor`: every node must reach the manifests and the audio",
            )
        with self._changed:
            self._end = end
            self._changed.notify_all()


def stream_work(
    workspace: Workspace,
    batch_sizes: tuple[int, ...],
    state: dict[str, Any] | None,
    shares: Sequence[int],
    num_shares: int,
    rank: int,
    world_size: int,
) -> Iterator[StepWork]:
    """A worker's shares of a stream's steps; to be called by all workers of a Ray Train run. Rank 0 starts the
    source."""
    import ray
    from ray.train.collective import broadcast_from_rank_zero

    source = None
    if rank == 0:
        # Every worker waits in a call of its own. It takes no CPU of its own, or a small cluster could not start it.
        place = Placement.data(workspace.config.cluster).remote_options(cpus=0)
        actor = ray.remote(max_concurrency=world_size + 1, **place)(StreamSource)
        config = workspace.config.model_dump(mode="json")
        source = actor.remote(config, workspace.store.location, batch_sizes, num_shares, world_size, state)
    return _shares(broadcast_from_rank_zero(source), rank, shares)


def _shares(source: Any, rank: int, shares: Sequence[int]) -> Iterator[StepWork]:
    import ray

    next_work = source.take.remote(rank, shares, 0)
    for index in itertools.count(1):
        work = ray.get(next_work)
        if isinstance(work, RaytrainError):
            raise work
        if not work:
            return
        next_work = source.take.remote(rank, shares, index)
        yield from work
