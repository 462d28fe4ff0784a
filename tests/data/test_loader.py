"""The loader: its batches equal those of a plain loop over libsndfile, for any number of threads."""

import io
import os
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import soundfile
import soxr
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from raytrain.data.assignment import ROW_SCHEMA, Assignment, PartsWriter, Row, note_name, write_index, write_note
from raytrain.data.loader import BatchLoader, StepReader
from raytrain.data.quarantine import Quarantine
from raytrain.data.threads import available_cpus, loader_threads, split_rows
from raytrain.data.work import StepWork, scheduled_work, work_of
from raytrain.lengths import BatchSchedule

RATE, PAD = 16000, 5
EDGES_MS = (1000, 12000)
SIZES = (33, 17)
CUT = {5: 0, 40: 100, 41: 0, 77: 300}  # row: the bytes left of its file
BROKEN = {"005.wav", "040.flac", "041.wav"}  # row 77 still has some samples


def write_row(folder: Path, number: int, rng: np.random.Generator, tar: io.BufferedWriter) -> dict:
    """A recording: FLAC or WAV, one or two channels, five rates, some longer than one read, in a file or a tar; and its
    row, which may begin late, or ask for less or slightly more than there is."""
    container, rate, channels = ("flac", "wav")[number % 2], (RATE, RATE, 8000, 22050, 44100)[number % 5], 1
    duration_ms = 11000 if number in (10, 11) else int(rng.uniform(200, 1500))
    if number % 7 == 0:
        channels = 2
    noise = rng.standard_normal((duration_ms * rate // 1000 - int(rng.integers(9)), channels)) * 0.1
    path = folder / f"{number:03d}.{container}"
    soundfile.write(path, noise, rate)
    sound = path.read_bytes()
    if number in CUT:
        path.write_bytes(sound[: CUT[number]])
    span = (0, 0)
    if number % 6 == 1:
        span, path = (tar.tell(), len(sound)), folder / "all.tar"
        tar.write(sound)
    offset_ms = 60 if number % 8 == 3 else 0
    wanted_ms = (duration_ms - offset_ms) // (2 if number % 9 == 4 else 1)
    return {
        "audio_path": str(path),
        "audio_start": span[0],
        "audio_size": span[1],
        "offset_ms": offset_ms,
        "duration_ms": wanted_ms,
        "text": "",
        "corpus": "ab"[number % 2],
        "language": "en",
        "prompt_length": 2,
        "tokens": rng.integers(0, 99, rng.integers(4, 30)).tolist(),
    }


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Assignment:
    folder, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(1)
    with open(folder / "all.tar", "wb") as tar:
        rows = [write_row(folder, number, rng, tar) for number in range(120)]
    with PartsWriter(folder / "assignment", 0) as writer:
        for bucket, low in enumerate((0, EDGES_MS[0])):
            members = [row for row in rows if low < row["duration_ms"] <= EDGES_MS[bucket]]
            writer.write(bucket, pa.Table.from_pylist(members, schema=ROW_SCHEMA))
    note = writer.note("all")
    write_note(folder / "assignment" / note_name(0), note)
    grid = [(edge, 64) for edge in EDGES_MS]
    write_index(folder / "assignment", [note], grid, len(rows), {"bucket_plan": "none"})
    return Assignment(folder / "assignment")


def expected_audio(row: Row) -> np.ndarray | None:
    """Samples of a row by libsndfile and soxr alone, None if there are none."""
    try:
        data = Path(row.audio_path).read_bytes()
        if row.audio_size:
            data = data[row.audio_start : row.audio_start + row.audio_size]
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            file.seek(row.offset_ms * file.samplerate // 1000)
            frames = -(-row.duration_ms * file.samplerate // 1000)
            samples, rate = file.read(frames, dtype="float32", always_2d=True), file.samplerate
    except RuntimeError:
        return None
    if not len(samples):
        return None
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    mono = mono if rate == RATE else soxr.resample(mono, rate, RATE)
    return mono[: row.duration_ms * RATE // 1000]


def expected_rows(assignment: Assignment, bucket: int, numbers: list[int]) -> list[tuple[Row, np.ndarray]]:
    """A batch's rows with their audio, each broken row replaced by the next intact row of the bucket."""
    read = []
    for number in numbers:
        row = assignment.row(bucket, number)
        while (audio := expected_audio(row)) is None:
            number = (number + 1) % assignment.rows_per_bucket[bucket]
            row = assignment.row(bucket, number)
        read.append((row, audio))
    return read


def open_reader(assignment: Assignment, quarantine: Quarantine, num_threads: int, **options) -> StepReader:
    return StepReader(
        assignment.edges,
        sample_rate=RATE,
        pad_id=PAD,
        quarantine=quarantine,
        assignment=assignment,
        num_threads=num_threads,
        **options,
    )


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_batches_are_bit_for_bit_those_of_a_plain_loop(mixed, num_threads):
    schedule, quarantine = BatchSchedule(1, mixed.rows_per_bucket, SIZES, num_epochs=2), Quarantine(None)
    work = scheduled_work(mixed, schedule, schedule.initial(), [0, 1], 2)
    planned = list(scheduled_work(mixed, schedule, schedule.initial(), [0, 1], 2))
    num_replaced = 0
    with BatchLoader(work, open_reader(mixed, quarantine, num_threads)) as loader:
        for share, loaded in zip(planned, loader, strict=True):
            rows = expected_rows(mixed, share.plan.bucket, share.numbers)
            batch, width = loaded.batch, max(len(audio) for _, audio in rows)
            assert batch.audio.shape == (len(rows), width) and batch.audio.is_contiguous()
            audio, tokens = np.zeros((len(rows), width), np.float32), np.full(batch.tokens.shape, PAD)
            for number, (row, samples) in enumerate(rows):
                audio[number, : len(samples)], tokens[number, : len(row.tokens)] = samples, row.tokens
            assert batch.audio.numpy().tobytes() == audio.tobytes()
            assert (batch.tokens.numpy() == tokens).all()
            assert batch.audio_lengths.tolist() == [len(samples) for _, samples in rows]
            assert batch.token_lengths.tolist() == [len(row.tokens) for row, _ in rows]
            assert loaded.rows == share.rows
            assert loaded.cpu_seconds > 0 and loaded.read_seconds > 0
            num_replaced += loaded.num_replaced
    names = {Path(line["audio_path"]).name for line in quarantine.take_news()}
    assert names == BROKEN and num_replaced > len(BROKEN)


class Slow(MemoryFileSystem):
    """A store that opens files slowly."""

    protocol = "slow"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("slow://"))

    def _open(self, path, *arguments, **options):
        time.sleep(0.1)
        return super()._open(path, *arguments, **options)


def test_waiting_for_storage_is_distinguished_from_decoding(mixed):
    fsspec.register_implementation("slow", Slow, clobber=True)
    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(RATE), RATE, format="FLAC")
    fsspec.filesystem("slow").pipe("box/a.flac", sound.getvalue())
    rows = [Row("slow://box/a.flac", 0, 1000, "", "en", 1, (1, 2, 3))] * 6
    schedule = BatchSchedule(1, mixed.rows_per_bucket, SIZES)
    plan, state = schedule.step(schedule.initial(), 1)
    reader = open_reader(mixed, Quarantine(None), 2)
    work = StepWork(plan, state, False, rows, range(len(rows)))
    loaded = reader.finish(work, reader.start(work))
    reader.close()
    assert loaded.read_seconds >= 0.3 and loaded.cpu_seconds < loaded.read_seconds / 2


THREADS = [
    ("auto", 16, 1, 15),
    ("auto", 17, 1, 16),
    ("auto", 192, 8, 16),
    ("auto", 96, 8, 11),
    ("auto", 16, 3, 4),
    ("auto", 2, 1, 1),
    ("auto", 2, 2, 1),
    ("auto", 1, 1, 1),
    ("auto", 4, 8, 1),
    (3, 2, 2, 3),
    (40, 2, 2, 40),
]


@pytest.mark.parametrize(("setting", "num_cpus", "num_workers", "expected"), THREADS)
def test_auto_threads_are_a_workers_cpus_less_one(setting, num_cpus, num_workers, expected):
    assert loader_threads(setting, num_cpus, num_workers) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process runs on all CPUs here")
def test_cpus_are_those_that_the_process_may_run_on():
    allowed = os.sched_getaffinity(0)
    assert 1 <= available_cpus() <= len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@given(num_rows=st.integers(1, 3000), num_threads=st.integers(1, 64))
def test_tasks_have_each_row_once_in_order_and_leave_no_thread_without_work(num_rows, num_threads):
    tasks = split_rows(num_rows, num_threads)
    assert [row for task in tasks for row in task] == list(range(num_rows))
    assert all(1 <= len(task) <= 16 for task in tasks)
    assert len(tasks) >= min(num_rows, 4 * num_threads)


def test_a_closed_reader_gives_no_shorter_batch(mixed):
    closed = threading.Event()

    def wait(audio: np.ndarray, key: int, longest: int) -> np.ndarray:
        assert closed.wait(timeout=30)
        return audio

    schedule = BatchSchedule(1, mixed.rows_per_bucket, SIZES)
    plan, state = schedule.step(schedule.initial(), 1)
    work = work_of(mixed, schedule, plan, 0, state, False)
    reader = open_reader(mixed, Quarantine(None), 1, augmenter=wait)
    reading = reader.start(work)
    reader.close()
    closed.set()
    with pytest.raises(CancelledError):
        reader.finish(work, reading)
