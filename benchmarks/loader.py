"""Audio-seconds per second of our loader and of lhotse's K2SpeechRecognitionDataset in a DataLoader, by format.

Both read the same generated recordings in the same batches (buckets of 30 s to 120 s of audio each), decode, and pad;
ours with threads, lhotse's with worker processes, the two taking turns.

python -m benchmarks.loader --json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script, this file's folder would come first

from benchmarks._record import record
from raytrain.artifacts import write_json
from raytrain.data.assignment import INDEX_FORMAT, ROW_SCHEMA, Assignment, PartsWriter
from raytrain.data.augment import Augmenter
from raytrain.data.loader import BatchLoader, Quarantine, StepReader, scheduled_work
from raytrain.lengths import BatchSchedule

RATE = 16000
FORMATS = {"wav": ("wav", "PCM_16"), "flac": ("flac", "PCM_16"), "ogg": ("ogg", "VORBIS"), "opus": ("ogg", "OPUS"),
           "mp3": ("mp3", "MPEG_LAYER_III")}  # fmt: skip
EDGES_MS, SIZES = (4000, 10000, 20000), (24, 10, 5)


def write_sounds(folder: Path, container: str, subtype: str, rows: int) -> list[tuple[str, int]]:
    """Paths and durations in ms of recordings of band-limited noise, which compresses about as speech does."""
    rng = np.random.default_rng(1)
    found = []
    folder.mkdir()
    for number in range(rows):
        duration_ms = int(np.clip(rng.lognormal(8.6, 0.6), 800, 20000)) if number % 3 else int(rng.uniform(4000, 20000))
        noise = rng.standard_normal(duration_ms * RATE // 1000)
        sound = np.convolve(noise, np.hanning(24), "same") * np.abs(np.sin(np.arange(len(noise)) / 4000)) * 0.02
        path = folder / f"{number:05d}.{container}"
        soundfile.write(path, sound, RATE, subtype=subtype, format=container.upper())
        found.append((str(path), duration_ms))
    return found


def write_assignment(folder: Path, sounds: list[tuple[str, int]]) -> Assignment:
    """The recordings in three buckets."""
    place = np.searchsorted(EDGES_MS, [duration for _, duration in sounds])
    counts = []
    with PartsWriter(folder, 0) as writer:
        for bucket in range(len(EDGES_MS)):
            rows = [sound for sound, where in zip(sounds, place, strict=True) if where == bucket]
            counts.append([len(rows)])
            values = [
                {"audio_path": path, "audio_start": 0, "audio_size": 0, "offset_ms": 0, "duration_ms": duration,
                 "text": "", "corpus": "all", "language": "en", "prompt_length": 9, "tokens": list(range(20))}
                for path, duration in rows
            ]  # fmt: skip
            writer.write(bucket, pa.Table.from_pylist(values, schema=ROW_SCHEMA))
    body = {"buckets": counts, "corpora": [["all", 1]], "rows": len(sounds), "grid": [[edge, 64] for edge in EDGES_MS]}
    write_json(folder / "index.json", INDEX_FORMAT, body, {"bucket_plan": "none"})
    return Assignment(folder)


def open_loader(
    assignment: Assignment, schedule: BatchSchedule, threads: int, augmenter: Augmenter | None = None
) -> BatchLoader:
    """One rank's loader from the start."""
    reader = StepReader(
        assignment.edges, sample_rate=RATE, pad_id=0, quarantine=Quarantine(None), assignment=assignment,
        augmenter=augmenter, num_threads=threads,
    )  # fmt: skip
    return BatchLoader(scheduled_work(assignment, schedule, schedule.initial(), [0], 1), reader)


def ours(assignment: Assignment, threads: int) -> float:
    """Audio-seconds per second of one epoch."""
    schedule = BatchSchedule(1, assignment.rows_per_bucket, SIZES, num_epochs=1)
    start, seconds = time.perf_counter(), 0.0
    with open_loader(assignment, schedule, threads) as loader:
        for loaded in loader:
            seconds += float(loaded.batch.audio_lengths.sum()) / RATE
    return seconds / (time.perf_counter() - start)


def lhotse(batches: list[list[tuple[str, int]]], workers: int) -> float:
    """The same for lhotse's usual way: cuts → AudioSamples → K2SpeechRecognitionDataset in worker processes."""
    import torch
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
    from lhotse.audio import AudioSource
    from lhotse.dataset import K2SpeechRecognitionDataset
    from lhotse.dataset.input_strategies import AudioSamples

    def cut(path: str, duration_ms: int) -> MonoCut:
        name, seconds = Path(path).name, duration_ms / 1000
        source = AudioSource("file", [0], path)
        recording = Recording(name, [source], RATE, duration_ms * RATE // 1000, seconds)
        supervision = SupervisionSegment(name, name, 0, seconds, text="the text")
        return MonoCut(name, 0, seconds, 0, [supervision], recording=recording)

    class Batches(torch.utils.data.Sampler):
        def __iter__(self) -> Any:
            return iter([CutSet.from_cuts([cut(*sound) for sound in batch]) for batch in batches])

    dataset = K2SpeechRecognitionDataset(input_strategy=AudioSamples())
    start, seconds = time.perf_counter(), 0.0
    options = {"prefetch_factor": 4} if workers else {}
    loader = torch.utils.data.DataLoader(
        dataset, sampler=Batches(), batch_size=None, num_workers=workers, **options
    )  # fmt: skip
    for batch in loader:
        seconds += float(batch["supervisions"]["num_samples"].sum()) / RATE
    return seconds / (time.perf_counter() - start)


def same_batches(assignment: Assignment) -> list[list[tuple[str, int]]]:
    """The batches that our schedule gives, as paths and durations."""
    schedule = BatchSchedule(1, assignment.rows_per_bucket, SIZES, num_epochs=1)
    state, batches = schedule.initial(), []
    while not schedule.is_last(state, 1):
        plan, state = schedule.step(state, 1)
        rows = assignment.rows(plan.bucket, schedule.rows(plan, 0))
        batches.append([(row.audio_path, row.duration_ms) for row in rows])
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"rows": arguments.rows, "by_format": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.formats:
            sounds = write_sounds(Path(folder) / name, *FORMATS[name], arguments.rows)
            assignment = write_assignment(Path(folder) / f"assignment-{name}", sounds)
            batches = same_batches(assignment)
            for workers in arguments.workers:
                speeds = [(ours(assignment, workers), lhotse(batches, workers)) for _ in range(arguments.rounds)]
                mine, theirs = (statistics.median(column) for column in zip(*speeds, strict=True))
                result["by_format"][f"{name}_{workers}"] = {
                    "audio_seconds_per_second": round(mine), "lhotse_audio_seconds_per_second": round(theirs),
                    "times_lhotse": round(statistics.median(a / b for a, b in speeds), 2),
                }  # fmt: skip
    result["least_times_lhotse"] = min(row["times_lhotse"] for row in result["by_format"].values())
    record("loader", result, as_json=arguments.json)


if __name__ == "__main__":
    main()
