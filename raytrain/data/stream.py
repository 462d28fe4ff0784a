"""Batches without assignment: corpora are read in shuffled order and bucketed in a buffer by lhotse's sampler.

For tars and Shar folders, when training should start at once. `DynamicBucketingSampler` (lhotse, Żelasko et al. 2021)
holds the buffer; the plan gives a row's bucket or the reason to leave it out, and the batch profile gives the rows per
step for all ranks together. One sampler serves all ranks, so they share a bucket at every step and no row is read
twice.

Only an assignment offers: immediate resume (here the rows of the epoch so far are read again, without their audio),
memory that does not depend on a buffer, a shuffle wider than the buffer, and, compared with `concurrent`, the same
batches in every run.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from lhotse.dataset import DynamicBucketingSampler
from lhotse.dataset.sampling.base import SamplingConstraint

from raytrain.data.assignment import Row, row_table, rows_of
from raytrain.data.audio import PARQUET_ROW
from raytrain.data.corpora.blocks import Block
from raytrain.data.corpora.reading import read_blocks
from raytrain.data.corpora.rejected import RejectedRows
from raytrain.data.corpora.types import TAR_FORMATS, BadRow, Chunk
from raytrain.data.locator import AudioLocator, Locator, WholeFileLocator
from raytrain.data.probe import NO_LISTING, AudioListing
from raytrain.data.sequences import BlockEncoder
from raytrain.data.work import StepWork
from raytrain.errors import ManifestError, PlanError
from raytrain.lengths.permutation import key_of
from raytrain.lengths.plan import BucketPlan
from raytrain.lengths.schedule import StepPlan
from raytrain.storage.locations import StorageReadError

_NUM_SHOWN = 5
_MAX_TARS = 256  # with cached headers


@dataclass(frozen=True)
class StreamState:
    """A stream's position: its epoch, and the steps taken in it as (rows of a step by bucket, number of steps), one
    entry for each batch profile or number of ranks."""

    epoch: int = 0
    segments: tuple[tuple[tuple[int, ...], int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"epoch": self.epoch, "segments": [[list(sizes), steps] for sizes, steps in self.segments]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamState:
        """The inverse of `to_dict`."""
        try:
            return cls(int(values["epoch"]), tuple((tuple(sizes), int(steps)) for sizes, steps in values["segments"]))
        except KeyError as error:
            raise PlanError(
                "a checkpoint has no stream position",
                why="it was made by training on an assignment",
                remedy="unset data.stream, or give the run another name",
            ) from error

    def after_step(self, sizes: tuple[int, ...]) -> StreamState:
        """The state one step later."""
        if self.segments and self.segments[-1][0] == sizes:
            return StreamState(self.epoch, (*self.segments[:-1], (sizes, self.segments[-1][1] + 1)))
        return StreamState(self.epoch, (*self.segments, (sizes, 1)))


class StreamStep(NamedTuple):
    """The rows of all ranks for one step."""

    plan: StepPlan
    state: StreamState
    is_last: bool
    rows: list[Row]
    keys: list[int]

    def share(self, rank: int) -> StepWork:
        """One rank's part of it."""
        first = sum(self.plan.sizes[:rank])
        mine = slice(first, first + self.plan.sizes[rank])
        return StepWork(self.plan, self.state, self.is_last, self.rows[mine], self.keys[mine])


@dataclass
class StreamSampler:
    """Steps from chunks that are read on the fly.

    `batch_sizes` (per rank) by bucket; `repeats` is how often an epoch repeats each corpus; `buffer_size` is the number
    of rows in lhotse's buffer, at least one step of every bucket, so that one bucket is always full. With `concurrent`
    the buffer fills while the first batches are drawn, which starts sooner; batches then differ between runs, and the
    first may be smaller. `rejected` counts rows that are left out, by reason; those whose audio file `listing` misses
    are among them.
    """

    chunks: Sequence[Chunk]
    encoder: BlockEncoder
    plan: BucketPlan
    batch_sizes: Sequence[int]
    world_size: int
    seed: int
    repeats: Mapping[str, float] = field(default_factory=dict)
    buffer_size: int = 20_000
    concurrent: bool = False
    num_epochs: int | None = None
    rejected: Counter[str] = field(default_factory=Counter)
    listing: AudioListing = NO_LISTING

    def __post_init__(self) -> None:
        self._left_out = RejectedRows()
        self._locators: OrderedDict[int, AudioLocator | None] = OrderedDict()

    def steps(self, state: StreamState) -> Iterator[StreamStep]:
        """Steps from `state` on. Raises `StorageReadError` if a corpus can't be read, and `ManifestError` if an epoch
        has no usable row."""
        if self.num_epochs is None:
            yield from self._endless(state)
            return
        waiting: StreamStep | None = None
        for step in self._endless(state):
            if waiting is not None:
                yield waiting
            waiting = step
        if waiting is not None:
            yield waiting._replace(is_last=True)

    def _endless(self, state: StreamState) -> Iterator[StreamStep]:
        while self.num_epochs is None or state.epoch < self.num_epochs:
            steps = 0
            for step in self._epoch(state):
                steps += 1
                yield step
            if not steps and not state.segments:
                examples = "".join(f"\n  {line}" for line in self._left_out.lines())
                files = ", ".join(dict.fromkeys(chunk.path for chunk in self.chunks[:_NUM_SHOWN]))
                counts = ", ".join(f"{number} {reason}" for reason, number in self.rejected.items())
                raise ManifestError(
                    "the corpora have no row that fits a bucket",
                    got=counts or f"no rows in {files or 'no files'}",
                    remedy="fix these rows, or run statistics and buckets on these corpora, whose limits are those of "
                    f"the bucket plan{':' if examples else ''}{examples}",
                )
            state = StreamState(state.epoch + 1)

    def _epoch(self, state: StreamState) -> Iterator[StreamStep]:
        now = tuple(size * self.world_size for size in self.batch_sizes)
        first = state.segments[0][0] if state.segments else now
        sizes = list(first)
        source = _Source(self, state.epoch)
        sampler = DynamicBucketingSampler(
            source,
            constraint=_RowsPerBucket(sizes),
            duration_bins=list(range(1, len(sizes))),  # only their number matters: rows know their buckets
            num_buckets=None,
            shuffle=True,
            seed=self.seed,
            rank=0,
            world_size=1,
            buffer_size=max(self.buffer_size, sum(first)),
            concurrent=self.concurrent,
        )
        sampler.set_epoch(state.epoch)
        drawn = 0
        batches = iter(sampler)  # this starts it; a second `iter`, as in a `for`, would restart it
        try:
            for past, steps in state.segments:
                sizes[:] = past
                for _ in range(steps):
                    drawn += len(next(batches, ()))
            sizes[:] = now
            while (batch := next(batches, None)) is not None:
                source.raise_error()
                examples: list[_Example] = list(batch)
                state = state.after_step(now)
                yield self._step(examples, drawn, state)
                drawn += len(examples)
            source.raise_error()
        finally:
            sampler.cuts_iter.close()

    def _step(self, examples: list[_Example], start: int, state: StreamState) -> StreamStep:
        rows = [self._located(example) for example in examples]
        keys = [key_of(self.seed, state.epoch, number, 3) for number in range(start, start + len(rows))]
        # At an epoch's end fewer rows than ranks may be left: every rank needs one.
        while len(rows) < self.world_size:
            rows, keys = rows + rows, keys + keys
        if len(examples) < self.world_size:
            rows, keys = rows[: self.world_size], keys[: self.world_size]
        share, extra = divmod(len(rows), self.world_size)
        shares = (share + 1,) * extra + (share,) * (self.world_size - extra)
        return StreamStep(StepPlan(examples[0].bucket, start, shares, state.epoch), state, False, rows, keys)

    def _located(self, example: _Example) -> Row:
        """The row with the location of its audio; a tar's headers are read when a row of it is first drawn."""
        if not example.member:
            return example.row
        index = example.chunk.index
        if index not in self._locators:
            self._locators[index] = AudioLocator(example.chunk)
            if len(self._locators) > _MAX_TARS:
                self._locators.popitem(last=False)
        locator = self._locators[index]
        if locator is not None:
            try:
                (path,), (start,), (size,), (problem,) = locator.locate([example.member])
            except StorageReadError:
                self._locators[index] = None
            else:
                if problem is None:
                    return example.row._replace(audio_path=path, audio_start=start, audio_size=size)
        # The reader will find nothing there, report it, and take another row.
        return example.row._replace(audio_path=f"{example.row.audio_path}/{example.member}")

    def examples(self, epoch: int) -> Iterator[_Example]:
        """Usable rows of an epoch in reading order."""
        chunks = []
        for chunk in self.chunks:
            repeat = self.repeats.get(chunk.corpus, 1.0)
            drawn = key_of(self.seed, epoch, chunk.index, 4) % 2**32 / 2**32
            chunks += [chunk] * (int(repeat) + (drawn < repeat % 1))
        order = np.random.default_rng(key_of(self.seed, epoch, 5)).permutation(len(chunks))
        for index in order.tolist():
            for block in read_blocks(chunks[index]):
                yield from self._of_block(self.listing.check(self.encoder.check(block)), epoch)

    def _of_block(self, block: Block, epoch: int) -> Iterator[_Example]:
        self._reject(block.chunk.corpus, block.bad)
        if not len(block):
            return
        in_tar = block.chunk.format in TAR_FORMATS
        encoded = self.encoder.encode(block)
        buckets, reasons = self.plan.assign(block.duration_ms, encoded.lengths)
        locator: Locator = WholeFileLocator(block.chunk) if in_tar else AudioLocator(block.chunk)
        table, _ = row_table(block, encoded, locator)
        kept = buckets >= 0
        for index in np.flatnonzero(~kept).tolist():
            detail = f"{block.duration_ms[index]} ms, {encoded.lengths[index]} tokens"
            bad_row = BadRow(block.chunk.path, int(block.numbers[index]), str(reasons[index]), detail)
            self._reject(block.chunk.corpus, [bad_row])
        rows = rows_of(table.filter(pa.array(kept)))
        if any(row.audio_size == PARQUET_ROW for row in rows):
            raise ManifestError(
                f"corpus {block.chunk.corpus} holds audio inside Parquet",
                why="a batch takes rows from everywhere in the buffer, but Parquet only reads whole row groups",
                remedy="unset data.stream and set assign.materialize to true, which copies the audio",
            )
        members = [block.paths[index] if in_tar else "" for index in np.flatnonzero(kept).tolist()]
        for row, bucket, member in zip(rows, buckets[kept].tolist(), members, strict=True):
            yield _Example(row, bucket, block.chunk, member)

    def _reject(self, corpus: str, rows: Sequence[BadRow]) -> None:
        for row in rows:
            self.rejected[row.reason] += 1
            self._left_out.add(corpus, row)


@dataclass(slots=True)
class _Example:
    """A row in lhotse's sampler. `member` is its name in a tar, empty if `row` has its location."""

    row: Row
    bucket: int
    chunk: Chunk
    member: str
    dataloading_info: Any = None  # lhotse sets it

    @property
    def duration(self) -> float:
        return self.row.duration_ms / 1000


class _Source:
    """An epoch's rows for lhotse. An error would end its filling thread silently: it is kept for the consumer."""

    def __init__(self, sampler: StreamSampler, epoch: int) -> None:
        self._sampler, self._epoch = sampler, epoch
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[_Example]:
        try:
            yield from self._sampler.examples(self._epoch)
        except Exception as error:
            self._error = error

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


class _RowsPerBucket(SamplingConstraint):  # type: ignore[misc]  # lhotse has no types
    """A batch is full when it has its bucket's number of rows; `sizes` may change between batches."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes, self._bucket, self._count = sizes, 0, 0

    def add(self, example: _Example) -> None:
        self._bucket = example.bucket
        self._count += 1

    def exceeded(self) -> bool:
        return self._count > self._sizes[self._bucket]

    def close_to_exceeding(self) -> bool:
        return self._count >= self._sizes[self._bucket]

    def reset(self) -> None:
        self._count = 0

    def measure_length(self, example: _Example) -> float:
        return example.duration

    def select_bucket(self, buckets: object, example: _Example, example_len: float | None = None) -> int:
        return example.bucket
