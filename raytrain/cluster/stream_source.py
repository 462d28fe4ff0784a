"""A stream's sampler, run once for all training workers by a Ray actor."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import ray
from ray.train.collective import broadcast_from_rank_zero

from raytrain.cluster.ingest import RankInput
from raytrain.cluster.placement import Placement
from raytrain.config import Config
from raytrain.data.stream import StreamState, StreamStep
from raytrain.data.work import StepWork
from raytrain.errors import RaytrainError
from raytrain.run_folder.batches import make_stream
from raytrain.run_folder.workspace import Workspace

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_STEPS_AHEAD = 8  # by which the sampler runs ahead of the ranks


class StreamSource:
    """An actor that runs a stream's sampler for all ranks and keeps the steps that not all of them have taken yet."""

    def __init__(self, config: Config, location: str, rank_input: RankInput) -> None:
        workspace = Workspace(config, location)
        start = StreamState.from_dict(rank_input.state) if rank_input.state else StreamState()
        self._steps = make_stream(workspace, rank_input.batch_sizes, rank_input.num_shares).steps(start)
        self._kept: dict[int, StreamStep] = {}
        self._asked = [0] * rank_input.world_size
        self._num_made, self._has_ended = 0, False
        self._error: RaytrainError | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._produce, name="stream", daemon=True).start()

    def take(self, rank: int, shares: Sequence[int], index: int) -> list[StepWork] | RaytrainError:
        """A worker's shares of step `index`; none after the last step, or the error that ended the stream."""
        with self._changed:
            self._asked[rank] = index
            for taken in [number for number in self._kept if number < min(self._asked)]:
                del self._kept[taken]
            self._changed.notify_all()
            self._changed.wait_for(lambda: index in self._kept or self._has_ended)
            if index in self._kept:
                return [self._kept[index].share(share) for share in shares]
            return self._error or []

    def _produce(self) -> None:
        error: RaytrainError | None = None
        try:
            for step in self._steps:
                with self._changed:
                    self._changed.wait_for(lambda: self._num_made < max(self._asked) + _STEPS_AHEAD)
                    self._kept[self._num_made] = step
                    self._num_made += 1
                    self._changed.notify_all()
        except RaytrainError as refusal:
            error = refusal
        except Exception as failure:
            error = RaytrainError(
                "reading the corpora failed",
                why=repr(failure),
                remedy="run `raytrain doctor`: every node must reach the manifests and the audio",
            )
        with self._changed:
            self._error, self._has_ended = error, True
            self._changed.notify_all()


def stream_work(workspace: Workspace, rank_input: RankInput) -> Iterator[StepWork]:
    """A worker's shares of a stream's steps; all workers of a Ray Train run must call it. Rank 0 starts the source."""
    source = None
    if rank_input.rank == 0:
        # Every worker waits in its own call. The actor reserves no CPU, or a small cluster could not start it.
        options = Placement.data(workspace.config.cluster).remote_options(cpus=0)
        actor = ray.remote(StreamSource).options(max_concurrency=rank_input.world_size + 1, **options)
        source = actor.remote(workspace.config, workspace.store.location, rank_input)
    return _shares(broadcast_from_rank_zero(source), rank_input)


def _shares(source: ActorHandle[StreamSource], rank_input: RankInput) -> Iterator[StepWork]:
    rank, shares = rank_input.rank, rank_input.shares
    next_work: ray.ObjectRef[list[StepWork] | RaytrainError] = source.take.remote(rank, shares, 0)
    for index in itertools.count(1):
        work = ray.get(next_work)
        if isinstance(work, RaytrainError):
            raise work
        if not work:
            return
        next_work = source.take.remote(rank, shares, index)
        yield from work
