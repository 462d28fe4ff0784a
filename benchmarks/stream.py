"""Time to the first batch with an assignment and on a stream, compared with lhotse's on the same Shar folder.

python -m benchmarks.stream --json

All read generated recordings in the same buckets and batch sizes, with audio; each in a separate process, whose peak
resident memory is also given. Lhotse's sampler runs in a DataLoader's worker process, as its documentation shows for
Shar.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import soundfile

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script, this file's folder would come first

from benchmarks._record import record
from raytrain.data.assignment import Assignment, note_name, write_index, write_note
from raytrain.data.assignment.assigner import ChunkAssigner
from raytrain.data.corpora.reading import plan_chunks
from raytrain.data.corpora.types import Corpus
from raytrain.data.loader import BatchLoader, StepReader
from raytrain.data.quarantine import Quarantine
from raytrain.data.sequences import BlockEncoder
from raytrain.data.text.tokenizer import train_tokenizer
from raytrain.data.work import StepWork, scheduled_work
from raytrain.lengths import BatchSchedule, BucketPlan, BucketSettings, LengthHistogram, make_plan

RATE, SHARD = 16000, 500
BATCH_SECONDS, BUCKETS, BUFFER = 100.0, 10, 20_000
TEXT = "the quick brown fox jumps over the lazy dog"


def write_shar(folder: Path, rows: int) -> None:
    """Rows of 60 recordings of 0.5 to 4 s in Shar folders."""
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

    rng, recordings = np.random.default_rng(1), []
    sounds = folder / "sounds"
    sounds.mkdir()
    for number in range(60):
        samples = rng.standard_normal(int(rng.uniform(0.5, 4) * RATE)) * 0.05
        soundfile.write(sounds / f"{number}.wav", samples, RATE)
        recordings.append(Recording.from_file(sounds / f"{number}.wav"))

    def cut(row: int) -> MonoCut:
        recording = recordings[int(rng.integers(60))]
        supervision = SupervisionSegment(f"r{row}", recording.id, 0, recording.duration, text=TEXT, language="en")
        return MonoCut(f"r{row}", 0, recording.duration, 0, [supervision], recording=recording)

    cuts = CutSet.from_cuts(cut(row) for row in range(rows))
    (folder / "shar").mkdir()
    cuts.to_shar(folder / "shar", fields={"recording": "wav"}, shard_size=SHARD)


def parts(folder: Path) -> tuple[list[Any], BlockEncoder, BucketPlan, list[int], int]:
    """Chunks, encoder, plan, batch sizes, padding token."""
    tokenizer = train_tokenizer({"en": [TEXT]}, 30)
    chunks = plan_chunks([Corpus("all", str(folder / "shar"), language="en")])
    durations = np.arange(500, 4001, 10)
    histogram = LengthHistogram.from_lengths(durations, np.full(len(durations), 60))
    settings = BucketSettings(BUCKETS, 1, policy="equal_mass", max_duration_ms=5000, tps_sigma=None)
    plan = make_plan(histogram, settings, "", None)
    sizes = [int(BATCH_SECONDS * 1000 / bucket.max_duration_ms) for bucket in plan.grid.buckets]
    return chunks, BlockEncoder(tokenizer, "canary2"), plan, sizes, tokenizer.pad_id


def loader_of(work: Any, plan: BucketPlan, pad_id: int, assignment: Assignment | None = None) -> BatchLoader:
    """Batches of `work`, read by two threads."""
    edges = [(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets]
    reader = StepReader(
        edges, sample_rate=RATE, pad_id=pad_id, quarantine=Quarantine(None), assignment=assignment, num_threads=2
    )
    return BatchLoader(work, reader)


def timed(loader: Any, steps: int, start: float, seconds_of: Any) -> dict[str, Any]:
    """Seconds to the first batch, and seconds of audio per second in the others."""
    first, audio = 0.0, 0.0
    for number, batch in enumerate(itertools.islice(loader, steps)):
        if not number:
            first = time.perf_counter() - start
        else:
            audio += seconds_of(batch)
    spent = time.perf_counter() - start - first
    return {"first_batch_seconds": round(first, 3), "audio_seconds_per_second": round(audio / spent)}


def our_seconds(loaded: Any) -> float:
    """Audio in a `LoadedStep`."""
    return float(loaded.batch.audio_lengths.sum()) / RATE


def assigned(folder: Path, steps: int) -> dict[str, Any]:
    """With an assignment, which is created first, in one process."""
    chunks, encoder, plan, sizes, pad_id = parts(folder)
    out, notes = folder / "assignment", []
    start = time.perf_counter()
    for number, chunk in enumerate(chunks):
        notes.append(ChunkAssigner(chunk, encoder, plan, out, None).run())
        write_note(out / note_name(number), notes[-1])
    making = time.perf_counter() - start
    grid = [(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets]
    num_rows = sum(sum([*note.rows.values(), *note.rejected.values()]) for note in notes)
    write_index(out, notes, grid, num_rows, {"bucket_plan": "none"})
    start = time.perf_counter()
    assignment = Assignment(out)
    schedule = BatchSchedule(1, assignment.rows_per_bucket, sizes)
    work = scheduled_work(assignment, schedule, schedule.initial(), [0], 1)
    with loader_of(work, plan, pad_id, assignment) as loader:
        figures = timed(loader, steps, start, our_seconds)
    state = schedule.initial()
    for _ in range(steps):
        _, state = schedule.step(state, 1)
    start = time.perf_counter()
    with loader_of(scheduled_work(Assignment(out), schedule, state, [0], 1), plan, pad_id, assignment) as loader:
        next(iter(loader))
    return {**figures, "making_it_seconds": round(making, 2), "resume_seconds": round(time.perf_counter() - start, 3)}


def stream(folder: Path, steps: int, concurrent: bool) -> dict[str, Any]:
    """Our stream on the Shar folder."""
    from raytrain.data.stream import StreamSampler, StreamState

    chunks, encoder, plan, sizes, pad_id = parts(folder)

    def work(state: StreamState) -> Any:
        sampler = StreamSampler(chunks, encoder, plan, sizes, 1, 1, buffer_size=BUFFER, concurrent=concurrent)
        return (step.share(0) for step in sampler.steps(state))

    def kept(works: Any) -> Any:
        nonlocal last
        for work in works:
            last = work
            yield work

    last: StepWork | None = None
    start = time.perf_counter()
    with loader_of(kept(work(StreamState())), plan, pad_id) as loader:
        figures = timed(loader, steps, start, our_seconds)
    start = time.perf_counter()
    with loader_of(work(last.state), plan, pad_id) as loader:
        next(iter(loader))
    return {**figures, "resume_seconds": round(time.perf_counter() - start, 3)}


def lhotse(folder: Path, steps: int, concurrent: bool) -> dict[str, Any]:
    """Lhotse's sampler on the same folder, in one worker process. Its constraint of rows by bucket has no state, so
    there is no time to resume."""
    import torch
    from lhotse import CutSet
    from lhotse.dataset import DynamicBucketingSampler, K2SpeechRecognitionDataset
    from lhotse.dataset.input_strategies import AudioSamples
    from lhotse.dataset.iterable_dataset import IterableDatasetWrapper
    from lhotse.dataset.sampling.dynamic_bucketing import FixedBucketBatchSizeConstraint

    _, _, plan, sizes, _ = parts(folder)
    edges = [bucket.max_duration_ms / 1000 for bucket in plan.grid.buckets]
    start = time.perf_counter()
    sampler = DynamicBucketingSampler(
        CutSet.from_shar(in_dir=folder / "shar", shuffle_shards=True).repeat(),
        constraint=FixedBucketBatchSizeConstraint(max_seq_len_buckets=edges, batch_sizes=sizes),
        duration_bins=edges[:-1],
        num_buckets=None,
        shuffle=True,
        buffer_size=BUFFER,
        rank=0,
        world_size=1,
        concurrent=concurrent,
    )
    dataset = IterableDatasetWrapper(K2SpeechRecognitionDataset(input_strategy=AudioSamples()), sampler)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=4)
    figures = timed(loader, steps, start, lambda batch: float(batch["supervisions"]["num_samples"].sum()) / RATE)
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {**figures, "worker_mib": round(workers)}


PARTS = {
    "assigned": assigned,
    "stream": lambda folder, steps: stream(folder, steps, concurrent=False),
    "stream_concurrent": lambda folder, steps: stream(folder, steps, concurrent=True),
    "lhotse": lambda folder, steps: lhotse(folder, steps, concurrent=False),
    "lhotse_concurrent": lambda folder, steps: lhotse(folder, steps, concurrent=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        figures = PARTS[arguments.part](arguments.folder, arguments.steps)
        figures["resident_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        print(orjson.dumps(figures).decode(), flush=True)
        return
    result: dict[str, Any] = {"rows": arguments.rows, "steps": arguments.steps, "buffer_size": BUFFER}
    with tempfile.TemporaryDirectory() as folder:
        write_shar(Path(folder), arguments.rows)
        for name in PARTS:
            command = [sys.executable, __file__, "--part", name, "--folder", folder, "--steps", str(arguments.steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            result[name] = orjson.loads(done.stdout.splitlines()[-1])
    record("stream", result, as_json=arguments.json)


if __name__ == "__main__":
    main()
