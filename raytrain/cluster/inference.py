"""Batches of recordings to texts on Ray Data: tasks on CPUs read and decode audio, a pool of actors beside them holds
the model, on GPUs where there are some.

    pool = find_pool(workers=None, device="auto", device_memory=None)
    sizes = batch_sizes(model_config, settings, pool, max_size=256)
    batches = make_batches(list(enumerate(requests)), sizes, job, pool)
    for done in recognise(batches, job, pool):
        done.texts[0]      # {"id": 0, "text": "three seven", "confidence": 0.93}, or {"id": 0, "error": "can't read …"}

A batch is one row of a Ray Data dataset, so that it is neither cut nor put together on the way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import orjson

from raytrain.cluster.gpus import find_gpus, least_bytes, whole_gpus
from raytrain.cluster.ingest import pack_batch, unpack
from raytrain.cluster.nodes import last_line
from raytrain.cluster.placement import ANYWHERE, Placement, total
from raytrain.cluster.session import results_of_workers
from raytrain.config import ClusterSection
from raytrain.data.audio import AudioError, read_audio
from raytrain.data.batch import SpeechBatch
from raytrain.decoding.batching import sorted_batches
from raytrain.decoding.longform import most_windows, windows
from raytrain.decoding.requests import Request
from raytrain.decoding.search import DecodeSettings
from raytrain.errors import ConfigError, DataError, RaytrainError
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.model.device import worker_device
from raytrain.storage.filesystem import is_uri
from raytrain.training.memory.decoding import BatchSizes, DecodeTracer
from raytrain.waiting import told

MAX_BATCH = 256
_GPU_SHARE, _HOST_SHARE = 0.9, 0.5
_BATCHES_PER_DATASET = 2048  # for each worker; between two datasets the workers start anew
_BATCH_MS = 3_600_000  # of audio: several batches pass through the host's memory at a time, and a GPU needs no more
# Padding of a batch that costs about as much as one batch more, whose decoder takes its steps one after the other.
_PADDING_MS = {"cpu": 30_000, "cuda": 600_000}
_REMOTE_READERS = 16


@dataclass(frozen=True)
class Pool:
    """The actors: how many, on GPUs or not, the bytes and the torch threads that each may use, and what of the
    cluster's CPUs an actor and a task that reads audio take. `models` and `readers` are the nodes of both."""

    workers: int
    cuda: bool
    budget_bytes: int
    threads: int
    actor_cpus: float
    reader_cpus: float
    models: Placement = ANYWHERE
    readers: Placement = ANYWHERE


@dataclass(frozen=True)
class Job:
    """What every worker is to do. `load` gives the model and its tokenizer, and must be importable there.

    Recordings longer than `window_s` are cut into windows that share `overlap_s`; without it none is cut. `precision`
    is that of linear layers (`raytrain.decoding.precision`).
    """

    load: Callable[[], tuple[Canary, Any]]
    settings: DecodeSettings
    sample_rate: int
    pad_id: int
    window_s: float | None = None
    overlap_s: float = 0.0
    precision: str = "fp32"

    def piece(self, duration_ms: int) -> tuple[int, int]:
        """(length in ms, number) of the pieces that a recording of `duration_ms` has at most."""
        if self.window_s is None:
            return duration_ms, 1
        window, overlap = round(self.window_s * 1000), round(self.overlap_s * 1000)
        return min(duration_ms, window), most_windows(duration_ms, window, overlap)


class Batch(NamedTuple):
    """Utterances to decode together, by ids, and how many pieces of them may be on the device at a time."""

    ids: tuple[int, ...]
    requests: tuple[Request, ...]
    limit: int


class Recognised(NamedTuple):
    """A batch's texts by id, its audio in seconds, and the seconds that workers spent on its parts."""

    texts: list[dict[str, Any]]
    audio_s: float
    seconds: dict[str, float]
    processes: dict[str, int]  # ids of the process that read the audio and of the one that holds the model


def find_pool(
    workers: int | None, device: str, device_memory: int | None, cluster: ClusterSection | None = None
) -> Pool:
    """The pool that the running Ray has room for: by default a worker for each GPU, or one on CPUs. Workers on GPUs
    take the nodes for training, all else those for data.

    `device` is auto, cpu or cuda; `device_memory` bytes for each worker's batches and model, by default 0.9 of a GPU's
    or, on CPUs, half of what Ray may give of the smallest node's. Raises `ConfigError` for what is not there.
    """
    readers, train = Placement.data(cluster or ClusterSection()), Placement.train(cluster or ClusterSection())
    gpus = sum(map(whole_gpus, train.present())) if device != "cpu" else 0
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not gpus):
        raise ConfigError(
            "there is no such device",
            got=device,
            allowed="auto, cpu, and cuda where Ray has a GPU",
            remedy="use --device cpu, or start Ray on nodes with GPUs",
        )
    cuda = device != "cpu" and gpus > 0
    models = train if cuda else readers
    reading = [node for node in readers.nodes() if node["Resources"].get("CPU")]
    # Reading needs a share of the CPUs: Ray Data hangs without a word where actors take them all. And the two shares
    # must differ, or reading would be put into the actors.
    reader_cpus = 1.0 if any(node["Resources"]["CPU"] >= 2 for node in reading) else 0.5
    nodes = [node for node in models.nodes() if node["Resources"].get("CPU") and (not cuda or total([node], "GPU"))]
    kept = {node["NodeID"] for node in reading}
    # Actors may fill one node after the other, so what a reader needs must stay free on each.
    cpus = sum(max(0.0, node["Resources"]["CPU"] - reader_cpus * (node["NodeID"] in kept)) for node in nodes)
    most = gpus if cuda else max(1, int(cpus / 0.1))
    if models.resources:
        slots = [models.slots(node, 0.1, 1.0 if cuda else 0.0) - (models is readers) for node in nodes]
        most = min(most, sum(slots))
    workers = workers or (gpus if cuda else 1)
    if workers > most or not nodes:
        raise ConfigError(
            "Ray has no room for so many workers",
            got=workers,
            allowed=f"at most {most}",
            remedy="lower --workers, or add nodes",
        )
    actor_cpus = min(0.4, int(cpus / workers * 1000) / 1000)
    beside = -(-workers // len(nodes))  # workers of one node
    if device_memory is None and cuda:
        device_memory = int(_GPU_SHARE * least_bytes(find_gpus(models)))
    elif device_memory is None:
        smallest = min(node["Resources"].get("memory", 2**32) for node in nodes)
        device_memory = int(_HOST_SHARE * smallest / beside)
    threads = max(1, int(min(node["Resources"]["CPU"] for node in nodes)) // beside)
    return Pool(workers, cuda, device_memory, threads, actor_cpus, reader_cpus, models, readers)


def batch_sizes(config: ModelConfig, settings: DecodeSettings, pool: Pool, max_size: int) -> BatchSizes:
    """How many utterances each of the pool's workers can decode together."""
    tracer = DecodeTracer(config, settings, device_type="cuda" if pool.cuda else "cpu")
    return BatchSizes(tracer, pool.budget_bytes, max_size)


def make_batches(numbered: Sequence[tuple[int, Request]], sizes: BatchSizes, job: Job, pool: Pool) -> list[Batch]:
    """(id, request) pairs as batches of like lengths, the longest first, such that each worker gets some."""
    if not numbered:
        return []
    durations, pieces = zip(*(job.piece(request.duration_ms) for _, request in numbered), strict=True)
    even = -(-len(numbered) // pool.workers)

    def largest(duration_ms: int) -> int:
        return max(1, min(sizes.largest(duration_ms), even, _BATCH_MS // duration_ms))

    batches = []
    for places in sorted_batches(durations, pieces, largest, _PADDING_MS["cuda" if pool.cuda else "cpu"]):
        ids, requests = zip(*(numbered[place] for place in places), strict=True)
        batches.append(Batch(ids, requests, sizes.largest(durations[places[0]])))
    return batches


def recognise(batches: Iterable[Batch], job: Job, pool: Pool) -> Iterator[Recognised]:
    """The texts of batches, in their order. They are taken some thousands at a time.

    Raises `RaytrainError` where workers can't load the model, or fail.
    """
    batches = iter(batches)
    while some := list(islice(batches, _BATCHES_PER_DATASET * pool.workers)):
        yield from _recognise(some, job, pool)


# A batch of utterances is one row of the dataset, and workers are handed one row at a time. Whole blocks (None) would
# be the same, as a block has one row, but Ray Data wants a number where workers have GPUs.
_ONE_ROW = {"batch_size": 1, "batch_format": "pyarrow"}


def _recognise(batches: list[Batch], job: Job, pool: Pool) -> Iterator[Recognised]:
    import ray
    from ray.data import ActorPoolStrategy

    def read(table: Any) -> Any:
        return read_batch(table["batch"][0].as_py(), job)

    packed = [orjson.dumps([one.ids, [tuple(request) for request in one.requests], one.limit]) for one in batches]
    data = (
        ray.data.from_items([{"batch": one} for one in packed], override_num_blocks=len(packed))
        .map_batches(read, **_ONE_ROW, **pool.readers.remote_options(pool.reader_cpus))
        .map_batches(
            Listener,
            fn_constructor_kwargs={"job": job, "cuda": pool.cuda, "threads": pool.threads},
            **_ONE_ROW,
            compute=ActorPoolStrategy(size=min(pool.workers, len(batches))),
            **pool.models.remote_options(pool.actor_cpus, 1 if pool.cuda else 0),
        )
    )
    rows = told(data.iter_rows(), results_of_workers)
    while True:
        try:
            row = next(rows, None)
        except ray.exceptions.RayError as error:
            raise RaytrainError(
                "a worker failed",
                why=last_line(error),
                remedy="check that all nodes see the model and have memory for it; what is finished is kept",
            ) from error
        if row is None:
            return
        yield Recognised(**orjson.loads(row["result"]))


# --- on workers


def read_batch(batch: bytes, job: Job) -> Any:
    """A batch's recordings, cut into pieces and collated, as a table of one row for `Listener`."""
    ids, rows, limit = orjson.loads(batch)
    requests = [Request(*row) for row in rows]
    start = time.perf_counter()
    pieces: list[tuple[int, int, int, np.ndarray]] = []
    errors: dict[int, str] = {}
    readers = _REMOTE_READERS if any(is_uri(request.audio_path) for request in requests) else 1
    with ThreadPoolExecutor(readers) as threads:
        for place, audio in enumerate(threads.map(lambda request: _read(request, job), requests)):
            if isinstance(audio, AudioError):
                errors[place] = str(audio)
                continue
            spans = [(0, len(audio))]
            if job.window_s is not None:
                spans = windows(audio, job.sample_rate, window_s=job.window_s, overlap_s=job.overlap_s)
            pieces += [(place, *span, audio[slice(*span)]) for span in spans]
    note = {
        "ids": ids,
        "limit": limit,
        "errors": [errors.get(place) for place in range(len(ids))],
        "seconds": time.perf_counter() - start,
        "process": os.getpid(),
    }
    pieces.sort(key=lambda piece: -len(piece[3]))
    note["pieces"] = [piece[:3] for piece in pieces]
    if not pieces:  # a table needs all its columns
        return pack_batch(SpeechBatch.collate([np.zeros(1, np.float32)], [[job.pad_id]], [1], pad_id=job.pad_id), note)
    prompts = [list(requests[piece[0]].prompt) for piece in pieces]
    audios = [piece[3] for piece in pieces]
    return pack_batch(SpeechBatch.collate(audios, prompts, list(map(len, prompts)), pad_id=job.pad_id), note)


def _read(request: Request, job: Job) -> np.ndarray | AudioError:
    try:
        audio = read_audio(
            request.audio_path,
            start=request.audio_start,
            size=request.audio_size,
            offset_ms=request.offset_ms,
            duration_ms=request.duration_ms,
            sample_rate=job.sample_rate,
        )
    except AudioError as error:
        return error
    except Exception as error:  # whatever a file does to its codec, the batch's other recordings are not to blame
        return AudioError(
            f"can't read audio {request.audio_path}",
            why=repr(error),
            remedy="play or convert this file with ffmpeg; leave out its row if it is broken",
        )
    return audio[: request.duration_ms * job.sample_rate // 1000]


class Listener:
    """A Ray Data actor: holds one model and turns tables of `read_batch` into texts."""

    def __init__(self, job: Job, cuda: bool, threads: int) -> None:
        import torch

        from raytrain.decoding.recognizer import Recognizer

        device = worker_device(cuda).torch
        if device.type == "cpu":
            torch.set_num_threads(threads)
        self._job = job
        self._recogniser = Recognizer(*job.load(), job.settings, device, job.precision)

    def __call__(self, table: Any) -> dict[str, list[bytes]]:
        """`table` has one batch; returns one `Recognised` as JSON."""
        batch, note = unpack(table)
        samples = [0] * len(note["ids"])
        for place, _, end in note["pieces"]:
            samples[place] = max(samples[place], end)
        heard = self._hear(batch, note) if note["pieces"] else {}
        texts = [
            {"id": one, **({"error": error} if error is not None else heard[place])}
            for place, (one, error) in enumerate(zip(note["ids"], note["errors"], strict=True))
        ]
        result = {
            "texts": texts,
            "audio_s": sum(samples) / self._job.sample_rate,
            "seconds": {"decode audio": note["seconds"], **self._recogniser.take_seconds()},
            "processes": {"reader": note["process"], "model": os.getpid()},
        }
        return {"result": [orjson.dumps(result)]}

    def _hear(self, batch: SpeechBatch, note: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Place in the batch → its text and confidence, or the error that there was."""
        from raytrain.decoding.recognizer import confidence, joined

        pieces, rate = note["pieces"], self._job.sample_rate
        own: dict[int, list[int]] = {}
        for number, (place, _, _) in enumerate(pieces):
            own.setdefault(place, []).append(number)
        timed = [len(own[place]) > 1 for place, _, _ in pieces]
        heard = self._recogniser.recognize(batch, [start / rate for _, start, _ in pieces], timed, note["limit"])
        found = {}
        for place, numbers in own.items():
            numbers.sort(key=lambda number: pieces[number][1])
            parts = [heard[number] for number in numbers]
            error = next((part for part in parts if isinstance(part, DataError)), None)
            if error is not None:
                found[place] = {"error": str(error)}
                continue
            tokens = joined([(pieces[number][1] / rate, pieces[number][2] / rate) for number in numbers], parts)
            found[place] = {"text": self._recogniser.text(tokens), "confidence": confidence(tokens)}
        return found
