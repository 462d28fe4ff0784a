"""The schedule compared with lhotse's DynamicBucketingSampler on the same rows, edges and batch sizes, and at 10⁹ rows.

python -m benchmarks.schedule --manifest manifest.jsonl --json      # a NeMo manifest
python -m benchmarks.schedule --json                                # a drawn mix of lengths instead

Rank 0 of 8 on both sides; lhotse's ranks each read all cuts and keep their own. Both return whole rows (audio path,
span, text), ours also with tokens. Lhotse reads cuts lazily from JSONL, as for a set that does not fit into memory.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script, this file's folder would come first

from benchmarks._models import config_of
from benchmarks._record import record
from benchmarks.padding import draw_lengths
from raytrain.data.assignment import ROW_SCHEMA, Assignment, PartsWriter, note_name, write_index, write_note
from raytrain.lengths import BatchSchedule, BucketSettings, LengthHistogram, ScheduleState, make_plan
from raytrain.lengths.simulate import simulate
from raytrain.model.cost import cost_of

RANKS = 8
BATCH_SECONDS = 600.0
PROMPT = 9


def read_rows(manifest: Path | None, count: int) -> tuple[np.ndarray, list[str]]:
    """Durations in ms and texts."""
    if manifest is None:
        durations, tokens = draw_lengths(count, seed=1)
        words = [
            "the",
            "of",
            "and",
            "to",
            "in",
            "a",
            "is",
            "that",
            "for",
            "it",
            "as",
            "was",
            "with",
            "be",
            "by",
            "on",
            "not",
            "he",
        ]
        return durations, [" ".join(itertools.islice(itertools.cycle(words), int(n))) for n in tokens]
    durations, texts = [], []
    with open(manifest, "rb") as file:
        for line in itertools.islice(file, count):
            row = orjson.loads(line)
            durations.append(int(np.ceil(round(row["duration"] * 1000, 6))))
            texts.append(row["text"])
    return np.array(durations), texts


def write_assignment(folder: Path, edges: list[int], durations: np.ndarray, texts: list[str]) -> Assignment:
    """Rows in their buckets on disk, in chunks of 100 000 as in `assign`; here a token is a word."""
    place = np.searchsorted(edges, durations)
    chunk_size = 100_000
    chunks = range(-(-len(texts) // chunk_size))
    notes = []
    for chunk in chunks:
        with PartsWriter(folder, chunk) as writer:
            rows = np.arange(chunk * chunk_size, min((chunk + 1) * chunk_size, len(texts)))
            for bucket in range(len(edges)):
                mine = rows[place[rows] == bucket].tolist()
                if mine:
                    writer.write(bucket, _table(mine, durations, texts))
        notes.append(writer.note("all"))
        write_note(folder / note_name(chunk), notes[-1])
    write_index(folder, notes, [(edge, 4096) for edge in edges], len(texts), {"bucket_plan": "none"})
    return Assignment(folder)


def _table(rows: list[int], durations: np.ndarray, texts: list[str]) -> pa.Table:
    zeros = np.zeros(len(rows), np.int64)
    lengths = [len(texts[row].split()) + PROMPT + 1 for row in rows]
    ends = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.Table.from_arrays(
        [
            pa.array([_audio(row) for row in rows]),
            pa.array(zeros),
            pa.array(zeros),
            pa.array(zeros),
            pa.array(durations[rows]),
            pa.array([texts[row] for row in rows]),
            pa.array(["all"] * len(rows)),
            pa.array(["en"] * len(rows)),
            pa.array(np.full(len(rows), PROMPT, np.int32)),
            pa.ListArray.from_arrays(pa.array(ends), pa.array(np.ones(ends[-1], np.int32))),
        ],
        schema=ROW_SCHEMA,
    )


def _audio(row: int) -> str:
    return f"/data/audio/{row // 10000}/{row}.wav"


def write_cuts(path: Path, durations: np.ndarray, texts: list[str]) -> None:
    """The same rows as lhotse cuts, one JSON line each."""
    with open(path, "wb") as file:
        for row, (duration, text) in enumerate(zip((durations / 1000).tolist(), texts, strict=True)):
            name = f"r{row}"
            recording = {
                "id": name,
                "sources": [{"type": "file", "channels": [0], "source": _audio(row)}],
                "sampling_rate": 16000,
                "num_samples": int(duration * 16000),
                "duration": duration,
                "channel_ids": [0],
            }
            supervision = {"id": name, "recording_id": name, "start": 0.0, "duration": duration, "text": text}
            cut = {
                "id": name,
                "start": 0.0,
                "duration": duration,
                "channel": 0,
                "supervisions": [supervision],
                "recording": recording,
                "type": "MonoCut",
            }
            file.write(orjson.dumps(cut) + b"\n")


# --- ours


def ours(assignment: Assignment, edges: list[int], sizes: list[int], steps: int) -> dict[str, Any]:
    """Batches of rank 0 of `RANKS`, resume, and a simulation of all ranks."""
    schedule = BatchSchedule(1, assignment.rows_per_bucket, sizes)
    state, first, numbered = schedule.initial(), 0.0, 0.0
    begun = time.perf_counter()
    for step in range(steps):
        start = time.perf_counter()
        plan, state = schedule.step(state, RANKS)
        numbers = schedule.rows(plan, 0)
        numbered += time.perf_counter() - start
        assignment.rows(plan.bucket, numbers)
        if step == 0:
            first = time.perf_counter() - begun
    seconds = time.perf_counter() - begun
    plan, _ = schedule.step(state, RANKS)
    expected = schedule.rows(plan, 3).tolist()
    kept = orjson.dumps(state.to_dict())
    start = time.perf_counter()
    fresh = BatchSchedule(1, Assignment(assignment.folder).rows_per_bucket, sizes)
    plan, _ = fresh.step(ScheduleState.from_dict(orjson.loads(kept)), RANKS)
    numbers = fresh.rows(plan, 3)
    Assignment(assignment.folder).rows(plan.bucket, numbers)
    resume = time.perf_counter() - start
    assert numbers.tolist() == expected, "a resumed schedule returns different rows"
    lengths = [assignment.lengths(bucket) for bucket in range(len(edges))]
    seen = simulate(schedule, lengths, RANKS, 1000)
    return {
        "batches_per_second": round(steps / seconds, 1),
        "batches_per_second_of_row_numbers": round(steps / numbered, 1),
        "first_batch_seconds": round(first, 4),
        "resume_seconds": round(resume, 4),
        "steps_before_resume": steps,
        "bucket_agreement": seen.bucket_agreement,
        "audio_padding": round(seen.audio_padding, 4),
        "mean_batch": round(seen.mean_batch, 1),
    }


def at_scale(rows: int, buckets: int, steps: int) -> dict[str, Any]:
    """First batch, steps per second and memory with many rows; only row numbers, since the rows would not fit."""
    before = _resident_mib()
    shares = np.random.default_rng(1).dirichlet(np.ones(buckets))
    counts = [int(share * rows) + 1 for share in shares]
    sizes = [int(BATCH_SECONDS / second) for second in np.linspace(2, 40, buckets)]
    start = time.perf_counter()
    schedule = BatchSchedule(1, counts, sizes)
    state = schedule.initial()
    plan, state = schedule.step(state, RANKS)
    schedule.rows(plan, 0)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(steps):
        plan, state = schedule.step(state, RANKS)
        schedule.rows(plan, 0)
    seconds = time.perf_counter() - start
    gc.collect()
    return {
        f"first_batch_seconds_{rows:.0e}_rows": round(first, 4),
        f"steps_per_second_{rows:.0e}_rows": round(steps / seconds, 1),
        f"added_rss_mib_{rows:.0e}_rows": round(_resident_mib() - before, 1),
    }


# --- lhotse


def lhotse_rank(cuts: Path, edges: list[int], sizes: list[int], rank: int, ranks: int, steps: int) -> dict[str, Any]:
    """Buckets of `steps` batches of one rank, seconds to the first batch, and batches per second of the others."""
    from lhotse.dataset.sampling.dynamic_bucketing import FixedBucketBatchSizeConstraint

    seconds = [edge / 1000 for edge in edges]
    start = time.perf_counter()
    constraint = FixedBucketBatchSizeConstraint(max_seq_len_buckets=seconds, batch_sizes=sizes)
    batches = iter(_sampler(cuts, seconds, rank, ranks, constraint=constraint))
    buckets, padded, real, first = [], 0.0, 0.0, 0.0
    for step in range(steps):
        durations = [cut.duration for cut in next(batches)]
        buckets.append(int(np.searchsorted(edges, round(max(durations) * 1000))))
        padded += max(durations) * len(durations)
        real += sum(durations)
        if step == 0:
            first = time.perf_counter() - start
    spent = time.perf_counter() - start - first
    return {
        "buckets": buckets,
        "first": first,
        "batches_per_second": (steps - 1) / spent,
        "padding": 1 - real / padded,
    }


def _sampler(cuts: Path, seconds: list[float], rank: int, ranks: int, **limits: Any) -> Any:
    from lhotse import CutSet
    from lhotse.dataset import DynamicBucketingSampler

    return DynamicBucketingSampler(
        CutSet.from_jsonl_lazy(cuts),
        duration_bins=seconds[:-1],
        num_buckets=None,
        shuffle=True,
        seed=0,
        rank=rank,
        world_size=ranks,
        **limits,
    )


def lhotse_resume(cuts: Path, edges: list[int], steps: int) -> float:
    """Seconds to the next batch from a state after `steps` batches of one rank of all.

    In lhotse a sampler with batch sizes per bucket has no state, so this one limits seconds per batch.
    """
    seconds = [edge / 1000 for edge in edges]
    sampler = _sampler(cuts, seconds, 0, RANKS, max_duration=BATCH_SECONDS)
    for _ in itertools.islice(sampler, steps):
        pass
    state = sampler.state_dict()
    start = time.perf_counter()
    resumed = _sampler(cuts, seconds, 0, RANKS, max_duration=BATCH_SECONDS)
    resumed.load_state_dict(state)
    next(iter(resumed))
    return time.perf_counter() - start


def lhotse(cuts: Path, edges: list[int], sizes: list[int], steps: int) -> dict[str, Any]:
    """All ranks, one after the other, and a single rank, which has no other ranks' batches to skip."""
    alone = lhotse_rank(cuts, edges, sizes, 0, 1, steps)
    ranks = [lhotse_rank(cuts, edges, sizes, rank, RANKS, steps) for rank in range(RANKS)]
    together = list(zip(*(rank["buckets"] for rank in ranks), strict=True))
    agreed = [len(set(buckets)) == 1 for buckets in together]
    return {
        "lhotse_batches_per_second": round(ranks[0]["batches_per_second"], 1),
        "lhotse_batches_per_second_alone": round(alone["batches_per_second"], 1),
        "lhotse_first_batch_seconds": round(alone["first"], 3),
        "lhotse_resume_seconds": round(lhotse_resume(cuts, edges, steps), 3),
        "lhotse_steps_before_resume": steps,
        "lhotse_bucket_agreement": round(float(np.mean(agreed)), 4),
        "lhotse_bucket_agreement_last_third": round(float(np.mean(agreed[-(steps // 3) :])), 4),
        "lhotse_audio_padding": round(float(np.mean([rank["padding"] for rank in ranks])), 4),
    }


def _resident_mib() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, help="NeMo JSONL")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--steps", type=int, default=10_000, help="batches of ours")
    parser.add_argument("--lhotse-steps", type=int, default=300, help="batches of each of lhotse's ranks")
    parser.add_argument("--scale-rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.scale_rows:  # in a separate process, to measure its memory
        print(orjson.dumps(at_scale(arguments.scale_rows, 60, arguments.steps)).decode())
        return
    durations, texts = read_rows(arguments.manifest, arguments.rows)
    histogram = LengthHistogram.from_lengths(durations, np.full(len(durations), PROMPT + 1))
    plan = make_plan(
        histogram, BucketSettings(30, 1, max_tokens=4096, tps_sigma=None), "", cost_of(config_of("canary-1b"))
    )
    edges = [bucket.max_duration_ms for bucket in plan.grid.buckets]
    sizes = [max(1, int(BATCH_SECONDS * 1000 / edge)) for edge in edges]
    inside = np.flatnonzero(durations <= edges[-1])
    durations, texts = durations[inside], [texts[row] for row in inside.tolist()]
    result: dict[str, Any] = {"rows": len(texts), "buckets": len(edges), "ranks": RANKS}
    with tempfile.TemporaryDirectory() as folder:
        assignment = write_assignment(Path(folder) / "assignment", edges, durations, texts)
        result |= ours(assignment, edges, sizes, arguments.steps)
        write_cuts(Path(folder) / "cuts.jsonl", durations, texts)
        del texts
        result |= lhotse(Path(folder) / "cuts.jsonl", edges, sizes, arguments.lhotse_steps)
    for rows in (10**6, 10**9):
        command = [sys.executable, __file__, "--scale-rows", str(rows), "--steps", str(arguments.steps)]
        done = subprocess.run(command, capture_output=True, check=True, env={**os.environ})
        result |= orjson.loads(done.stdout)
    result["rss_mib"] = result["added_rss_mib_1e+09_rows"]
    speed, alone = result["batches_per_second"], result["lhotse_batches_per_second_alone"]
    result["times_lhotse"] = round(speed / result["lhotse_batches_per_second"], 1)
    result["times_lhotse_alone"] = round(speed / alone, 1)
    result["row_numbers_times_lhotse_alone"] = round(result["batches_per_second_of_row_numbers"] / alone, 1)
    record("schedule", result, as_json=arguments.json)


if __name__ == "__main__":
    main()
