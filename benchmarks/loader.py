"""Audio-seconds per second of our loader and of lhotse's K2SpeechRecognitionDataset in a DataLoader, by format.

Both read the same generated recordings in the same batches (buckets of 30 s to 120 s of audio each), decode, and pad;
ours with threads, lhotse's with worker processes, alternating.

With --short: utterances of one second in batches of 512 through schedule, rows, files, decoder and batch, per second of
a CPU's time, with what each part takes; `codec` is just decoding from memory into one array. The minimum of several
rounds counts, since other work on the machine only adds time.

python -m benchmarks.loader --json
python -m benchmarks.loader --short --json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import miniaudio
import numpy as np
import pyarrow as pa
import soundfile
import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script, this file's folder would come first

from benchmarks._record import record
from raytrain.data.assignment import ROW_SCHEMA, Assignment, PartsWriter, note_name, write_index, write_note
from raytrain.data.augment import Augmenter
from raytrain.data.batch import SpeechBatch
from raytrain.data.loader import BatchLoader, StepReader, load_row
from raytrain.data.quarantine import Quarantine
from raytrain.data.work import scheduled_work
from raytrain.lengths import BatchSchedule

RATE = 16000
FORMATS = {
    "wav": ("wav", "PCM_16"),
    "flac": ("flac", "PCM_16"),
    "ogg": ("ogg", "VORBIS"),
    "opus": ("ogg", "OPUS"),
    "mp3": ("mp3", "MPEG_LAYER_III"),
}
EDGES_MS, SIZES = (4000, 10000, 20000), (24, 10, 5)


def write_sounds(
    folder: Path, container: str, subtype: str, rows: int, length_ms: int | None = None
) -> list[tuple[str, int]]:
    """Paths and durations in ms of recordings of band-limited noise, which compresses about as speech does; all of
    `length_ms`, or of 0.8 to 20 s."""
    rng = np.random.default_rng(1)
    recordings = []
    folder.mkdir()
    for number in range(rows):
        duration_ms = int(np.clip(rng.lognormal(8.6, 0.6), 800, 20000)) if number % 3 else int(rng.uniform(4000, 20000))
        duration_ms = length_ms or duration_ms
        noise = rng.standard_normal(duration_ms * RATE // 1000)
        sound = np.convolve(noise, np.hanning(24), "same") * np.abs(np.sin(np.arange(len(noise)) / 4000)) * 0.02
        path = folder / f"{number:05d}.{container}"
        soundfile.write(path, sound, RATE, subtype=subtype, format=container.upper())
        recordings.append((str(path), duration_ms))
    return recordings


def write_assignment(folder: Path, sounds: list[tuple[str, int]]) -> Assignment:
    """The recordings in three buckets."""
    bucket_of = np.searchsorted(EDGES_MS, [duration for _, duration in sounds])
    with PartsWriter(folder, 0) as writer:
        for bucket in range(len(EDGES_MS)):
            rows = [sound for sound, where in zip(sounds, bucket_of, strict=True) if where == bucket]
            values = [
                {
                    "audio_path": path,
                    "audio_start": 0,
                    "audio_size": 0,
                    "offset_ms": 0,
                    "duration_ms": duration,
                    "text": "",
                    "corpus": "all",
                    "language": "en",
                    "prompt_length": 9,
                    "tokens": list(range(20)),
                }
                for path, duration in rows
            ]
            writer.write(bucket, pa.Table.from_pylist(values, schema=ROW_SCHEMA))
    note = writer.note("all")
    write_note(folder / note_name(0), note)
    write_index(folder, [note], [(edge, 64) for edge in EDGES_MS], len(sounds), {"bucket_plan": "none"})
    return Assignment(folder)


def open_loader(
    assignment: Assignment, schedule: BatchSchedule, threads: int, augmenter: Augmenter | None = None
) -> BatchLoader:
    """One rank's loader from the beginning."""
    reader = StepReader(
        assignment.edges,
        sample_rate=RATE,
        pad_id=0,
        quarantine=Quarantine(None),
        assignment=assignment,
        augmenter=augmenter,
        num_threads=threads,
    )
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
    loader = torch.utils.data.DataLoader(dataset, sampler=Batches(), batch_size=None, num_workers=workers, **options)
    for batch in loader:
        seconds += float(batch["supervisions"]["num_samples"].sum()) / RATE
    return seconds / (time.perf_counter() - start)


def same_batches(assignment: Assignment) -> list[list[tuple[str, int]]]:
    """The batches from our schedule, as paths and durations."""
    schedule = BatchSchedule(1, assignment.rows_per_bucket, SIZES, num_epochs=1)
    state, batches = schedule.initial(), []
    while not schedule.is_last(state, 1):
        plan, state = schedule.step(state, 1)
        rows = assignment.rows(plan.bucket, schedule.rows(plan, 0))
        batches.append([(row.audio_path, row.duration_ms) for row in rows])
    return batches


SHORT_MS, SHORT_BATCH = 1000, 512


def short(folder: Path, name: str, rows: int, rounds: int, threads: list[int]) -> dict[str, Any]:
    """Utterances per CPU second and µs of a CPU for each part, for `rows` utterances of `SHORT_MS`."""
    sounds = write_sounds(folder / name, *FORMATS[name], rows, SHORT_MS)
    assignment = write_assignment(folder / f"assignment-{name}", sounds)
    schedule = BatchSchedule(1, assignment.rows_per_bucket, (SHORT_BATCH, 1, 1), num_epochs=1)
    work = list(scheduled_work(assignment, schedule, schedule.initial(), [0], 1))[0]
    encoded = [read_file(row.audio_path) for row in work.rows]
    audios = [load_row(row, RATE) for row in work.rows]
    tokens, lengths = [row.tokens for row in work.rows], [row.prompt_length for row in work.rows]
    parts = {
        "rows": lambda: next(scheduled_work(assignment, schedule, schedule.initial(), [0], 1)),
        "file": partial(each, read_file, [row.audio_path for row in work.rows]),
        "codec": partial(each, decode_only, encoded),
        "load_row": partial(each, lambda row: load_row(row, RATE), work.rows),
        "collate": lambda: SpeechBatch.collate(audios, tokens, lengths, pad_id=0),
    }
    micros = {name: min(cpu_micros(run, SHORT_BATCH) for _ in range(rounds)) for name, run in parts.items()}
    whole = {
        number: min(cpu_micros(partial(epoch, assignment, schedule, number), rows) for _ in range(rounds))
        for number in threads
    }
    return {
        "utterances_per_cpu_second_by_threads": {number: round(1e6 / value) for number, value in whole.items()},
        "utterances_per_cpu_second_of_codec_alone": round(1e6 / micros["codec"]),
        "share_of_codec": round(micros["codec"] / whole[threads[0]], 2),
        "cpu_microseconds": profile_of(micros, whole[threads[0]]),
    }


def profile_of(micros: dict[str, float], whole: float) -> dict[str, float]:
    """What each part adds to the `whole`, derived from the parts' separate times."""
    parts = {
        "schedule and rows": micros["rows"],
        "open and read the file": micros["file"],
        "codec": micros["codec"],
        "around the codec": micros["load_row"] - micros["file"] - micros["codec"],
        "collate": micros["collate"],
        "threads, queue, fresh memory": whole - micros["rows"] - micros["load_row"] - micros["collate"],
        "all": whole,
    }
    return {part: round(value, 1) for part, value in parts.items()}


def each(function: Callable[[Any], Any], items: Iterable[Any]) -> None:
    """Call it with each item, discarding results."""
    for item in items:
        function(item)


def epoch(assignment: Assignment, schedule: BatchSchedule, threads: int) -> None:
    """Read one epoch and discard it."""
    with open_loader(assignment, schedule, threads) as loader:
        for _ in loader:
            pass


def read_file(path: str) -> bytes:
    """A file's bytes in two calls."""
    with open(path, "rb", buffering=0) as file:
        return file.read(1 << 16)


def decode_only(data: bytes) -> None:
    """The minimum cost of decoding: FLAC by the decoder's C functions, WAV as integers to floats."""
    if not data.startswith(b"fLaC"):
        np.multiply(np.frombuffer(data, np.int16)[-len(_DECODED) :], 2**-15, out=_DECODED)
        return
    lib, ffi = miniaudio.lib, miniaudio.ffi
    flac = lib.ma_dr_flac_open_memory(data, len(data), ffi.NULL)
    read = lib.ma_dr_flac_read_pcm_frames_f32(flac, len(_DECODED), ffi.from_buffer("float[]", _DECODED))
    lib.ma_dr_flac_close(flac)
    assert read == len(_DECODED)


_DECODED = np.empty(SHORT_MS * RATE // 1000, np.float32)


def cpu_micros(run: Callable[[], Any], utterances: int) -> float:
    """Microseconds of CPU time of this process for each of the utterances that a call reads."""
    started = time.process_time()
    run()
    return (time.process_time() - started) / utterances * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--short", action="store_true", help="utterances of one second instead, without lhotse")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.short:
        main_short(arguments)
        return
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
                    "audio_seconds_per_second": round(mine),
                    "lhotse_audio_seconds_per_second": round(theirs),
                    "times_lhotse": round(statistics.median(a / b for a, b in speeds), 2),
                }
    result["least_times_lhotse"] = min(row["times_lhotse"] for row in result["by_format"].values())
    record("loader", result, as_json=arguments.json)


def main_short(arguments: argparse.Namespace) -> None:
    """`--short`."""
    torch.set_num_threads(1)  # idle threads of a pool would spin
    rows = max(arguments.rows, 4 * SHORT_BATCH)
    result: dict[str, Any] = {
        "rows": rows,
        "utterance_seconds": SHORT_MS / 1000,
        "batch_size": SHORT_BATCH,
        "rounds": arguments.rounds,
        "by_format": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in ("flac", "wav"):
            result["by_format"][name] = short(Path(folder), name, rows, arguments.rounds, arguments.workers)
    record("loader_short", result, as_json=arguments.json)


if __name__ == "__main__":
    main()
