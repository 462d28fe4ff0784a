"""Transcribing batches of recordings on Ray Data: CPU tasks read and decode audio, and a pool of actors holds the
model, on GPUs if there are any.

    pool = find_pool(workers=None, device="auto", device_memory=None)
    sizes = batch_sizes(model_config, settings, pool, max_size=256)
    batches = make_batches(list(enumerate(requests)), sizes, job, pool)
    for batch in recognize(batches, job, pool):
        batch.texts[0]     # {"id": 0, "text": "three seven", "confidence": 0.93}, or {"id": 0, "error": "can't read …"}

A batch is one row of a Ray Data dataset, so Ray Data never splits or merges batches.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from raytrain.cluster.inference_worker import Batch, RecognitionJob, RecognizedBatch, RecognizerActor, read_batch
from raytrain.cluster.mapping import results_of_workers
from raytrain.cluster.pool import Pool
from raytrain.decoding.batching import sorted_batches
from raytrain.decoding.requests import Request
from raytrain.decoding.settings import DecodeSettings
from raytrain.errors import RaytrainError, last_line
from raytrain.model.config import ModelConfig
from raytrain.training.memory.decoding import BatchSizes, DecodeTracer
from raytrain.waiting import report_waits

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

MAX_BATCH = 256
_BATCHES_PER_DATASET = 2048  # per worker; workers restart between datasets
_BATCH_MS = 3_600_000  # of audio: several batches are in host memory at a time, and a GPU needs no more
# The amount of padding that costs about as much as one more batch, given that decoder steps are sequential.
_PADDING_MS = {"cpu": 30_000, "cuda": 600_000}


def batch_sizes(config: ModelConfig, settings: DecodeSettings, pool: Pool, max_size: int) -> BatchSizes:
    """How many utterances each of the pool's workers can decode together."""
    tracer = DecodeTracer(config, settings, device_type="cuda" if pool.cuda else "cpu")
    return BatchSizes(tracer, pool.budget_bytes, max_size)


def make_batches(
    numbered: Sequence[tuple[int, Request]], sizes: BatchSizes, job: RecognitionJob, pool: Pool
) -> list[Batch]:
    """(id, request) pairs as batches of similar lengths, the longest first, so that each worker gets at least one."""
    if not numbered:
        return []
    durations, pieces = zip(*(job.piece(request.duration_ms) for _, request in numbered), strict=True)
    even = -(-len(numbered) // pool.workers)

    def largest(duration_ms: int) -> int:
        return max(1, min(sizes.largest(duration_ms), even, _BATCH_MS // duration_ms))

    batches = []
    for indices in sorted_batches(durations, pieces, largest, _PADDING_MS["cuda" if pool.cuda else "cpu"]):
        ids, requests = zip(*(numbered[index] for index in indices), strict=True)
        batches.append(Batch(ids, requests, sizes.largest(durations[indices[0]])))
    return batches


def recognize(batches: Iterable[Batch], job: RecognitionJob, pool: Pool) -> Iterator[RecognizedBatch]:
    """The texts of batches, in order. Batches are submitted several thousand at a time.

    Raises `RaytrainError` if workers can't load the model, or fail.
    """
    batches = iter(batches)
    while chunk := list(islice(batches, _BATCHES_PER_DATASET * pool.workers)):
        yield from _recognize(chunk, job, pool)


def _recognize(batches: list[Batch], job: RecognitionJob, pool: Pool) -> Iterator[RecognizedBatch]:
    import ray

    rows = report_waits(_dataset(batches, job, pool).iter_rows(), results_of_workers)
    while True:
        try:
            row = next(rows, None)
        except ray.exceptions.RayError as error:
            raise RaytrainError(
                "a worker failed",
                why=last_line(error),
                remedy="check that every node can read the model and has memory for it; finished results are kept",
            ) from error
        if row is None:
            return
        yield pickle.loads(row["result"])  # made by our own workers a moment ago


def _dataset(batches: list[Batch], job: RecognitionJob, pool: Pool) -> Dataset:
    """One row per batch, in order, with its `RecognizedBatch`.

    Workers get one row at a time. Whole blocks (None) would be equivalent, since a block has one row, but Ray Data
    requires a number if workers use GPUs.
    """
    import ray
    from ray.data import ActorPoolStrategy

    def read(table: pa.Table) -> pa.Table:
        return read_batch(pickle.loads(table["batch"][0].as_py()), job)

    rows = [{"batch": pickle.dumps(batch)} for batch in batches]
    return (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            read,
            batch_size=1,
            batch_format="pyarrow",
            **pool.readers.remote_options(pool.reader_cpus),
        )
        .map_batches(
            RecognizerActor,
            fn_constructor_kwargs={"job": job, "cuda": pool.cuda, "threads": pool.threads},
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(pool.workers, len(batches))),
            **pool.models.remote_options(pool.actor_cpus, 1 if pool.cuda else 0),
        )
    )
