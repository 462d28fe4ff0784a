"""The cost of a corpus with a billion utterances: workers' parts are measured on a small corpus, the driver's at full
size.

    python -m benchmarks.scale                                   # docs/scale.md quotes its result
    python -m benchmarks.scale --manifest manifest.jsonl --tokenizer spe.model --json

Measured on a sample, in one process: bytes and processor time per utterance of counting and of assigning, bytes per
assigned row. Measured at full size: the driver adds as many partial counts as a billion utterances produce, plans on
their sum and writes the index of the assignment. The partial counts are those of 64 random chunks, used repeatedly.
"""

from __future__ import annotations

import argparse
import copy
import pickle
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks._record import record
from benchmarks.padding import draw_lengths
from benchmarks.statistics import PeakMemory, make_manifest
from raytrain.data.assignment import ChunkNote, part_name, write_index
from raytrain.data.assignment.assigner import ChunkAssigner
from raytrain.data.corpora.reading import plan_chunks
from raytrain.data.corpora.types import Corpus
from raytrain.data.counts import Counts, HistogramSum, count_chunk
from raytrain.data.sequences import BlockEncoder
from raytrain.data.text.tokenizer import SPECIALS, CanaryTokenizer, train_specials
from raytrain.lengths import BucketSettings, LengthHistogram, make_plan
from raytrain.run_folder.chunks import MAX_CHUNKS

_DISTINCT = 64


def measure_worker(manifest: Path, model: Path, folder: Path) -> dict[str, float]:
    """Processor time and bytes per utterance of the two jobs, on one chunk after a warm-up."""
    tokenizer = CanaryTokenizer({SPECIALS: train_specials(["en"]), "en": model.read_bytes()})
    chunks = plan_chunks([Corpus("sample", str(manifest.absolute()), language="en")])
    encoder = BlockEncoder(tokenizer, "canary2")
    warm = count_chunk(chunks[0], encoder)
    start = time.process_time()
    counts = count_chunk(chunks[-2], encoder)
    counting = time.process_time() - start
    rows = counts.num_rows.total()
    plan = make_plan(warm.histogram, BucketSettings(max_tokens=2048), "")
    start = time.process_time()
    ChunkAssigner(chunks[-2], encoder, plan, folder, None).run()
    assigning = time.process_time() - start
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "manifest_bytes": (chunks[-2].end - chunks[-2].start) / rows,
        "count_us": counting / rows * 1e6,
        "assign_us": assigning / rows * 1e6,
        "assignment_bytes": written / rows,
    }


def run_driver(utterances: int, folder: Path) -> dict[str, Any]:
    """The driver's part at full size: add partials, plan, write the index."""
    per_chunk = -(-utterances // MAX_CHUNKS)
    partials = []
    for number in range(_DISTINCT):
        one, histogram = Counts(num_rows=Counter({"all": per_chunk})), HistogramSum()
        histogram.add(LengthHistogram.from_lengths(*draw_lengths(per_chunk, seed=number)))
        one.groups[("all", "en", "en")] = histogram
        partials.append(one)
    with PeakMemory() as memory:
        start, total = time.perf_counter(), Counts()
        for number in range(MAX_CHUNKS):
            partial = copy.copy(partials[number % _DISTINCT])
            partial.lines = {number: per_chunk}
            total.add(partial)
        histogram = total.histogram
        adding = time.perf_counter() - start
        start = time.perf_counter()
        settings = BucketSettings(max_tokens=2048, policy="optimal", num_cells=60)
        plan = make_plan(histogram, settings, "")
        planning = time.perf_counter() - start
        buckets = len(plan.grid.buckets)
        rows = {str(bucket): per_chunk // buckets for bucket in range(buckets)}
        notes = [
            ChunkNote(number, "all", rows, {}, {}, {part_name(int(bucket), number): "0" * 16 for bucket in rows})
            for number in range(MAX_CHUNKS)
        ]
        start = time.perf_counter()
        grid = [(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets]
        write_index(folder, notes, grid, MAX_CHUNKS * sum(rows.values()), {})
        indexing = time.perf_counter() - start
    return {
        "utterances": histogram.total,
        "chunks": MAX_CHUNKS,
        "partial_mib": round(len(pickle.dumps(partials[0])) / 2**20, 2),
        "histogram_cells": len(histogram.cells),
        "adding_seconds": round(adding, 1),
        "planning_seconds": round(planning, 1),
        "index_seconds": round(indexing, 1),
        "index_mib": round((folder / "index.json").stat().st_size / 2**20, 2),
        "assignment_files": MAX_CHUNKS * buckets,
        "driver_growth_mib": round(memory.growth_mib, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, help="NeMo JSONL in English; generated if missing")
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece model of its text")
    parser.add_argument("--utterances", type=int, default=1_000_000_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        manifest, model = arguments.manifest, arguments.tokenizer
        if manifest is None:
            manifest, model = make_manifest(Path(name), 200_000)
        worker = measure_worker(manifest, model, Path(name) / "assignment")
        driver = run_driver(arguments.utterances, Path(name) / "index")
    number = arguments.utterances
    result = {
        "per_utterance": {key: round(value, 2) for key, value in worker.items()},
        "manifest_gib": round(number * worker["manifest_bytes"] / 2**30, 1),
        "bytes_read_gib": round(2 * number * worker["manifest_bytes"] / 2**30, 1),
        "count_cpu_hours": round(number * worker["count_us"] / 3.6e9, 2),
        "assign_cpu_hours": round(number * worker["assign_us"] / 3.6e9, 2),
        "assignment_gib": round(number * worker["assignment_bytes"] / 2**30, 1),
        "driver": driver,
    }
    record("scale", result, as_json=arguments.json)


if __name__ == "__main__":
    main()
