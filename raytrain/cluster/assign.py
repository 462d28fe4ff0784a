"""Stage `assign`: every manifest row goes into one bucket, or into `rejected/` with its reason.

A worker takes one byte range, writes one part per bucket, and last a note that the range is done. A restarted
job skips the ranges whose notes stand and were made from the same inputs. No shuffle is needed: the schedule
permutes row numbers when it draws batches.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from raytrain.artifacts import atomic_write_bytes, write_json
from raytrain.data.assignment import INDEX_FORMAT, part_name, write_part
from raytrain.data.manifest import BadRow, ManifestChunk, Utterance
from raytrain.data.prompt import encode_utterance, read_utterances
from raytrain.data.tokenizer import CanaryTokenizer
from raytrain.errors import ArtifactError
from raytrain.lengths.plan import BucketPlan


def encode_row(tokenizer: CanaryTokenizer, row: Utterance, prompt_format: str) -> dict[str, Any]:
    """A manifest row as `data.assignment.ROW_SCHEMA` stores it."""
    encoded = encode_utterance(tokenizer, row, prompt_format)
    return {
        "audio_path": row.audio_path,
        "offset_ms": row.offset_ms,
        "duration_ms": row.duration_ms,
        "text": row.text,
        "language": row.target_lang,
        "prompt_length": encoded.prompt_length,
        "tokens": list(encoded.ids),
    }


def assign_chunk(
    chunk: ManifestChunk,
    tokenizer: CanaryTokenizer,
    plan: BucketPlan,
    folder: Path,
    prompt_format: str,
    language: str | None,
) -> dict[str, Any]:
    """Write the parts of one byte range; returns its note: rows per bucket and rejections by reason."""
    rows, rejected = [], []
    for row in read_utterances(chunk, tokenizer, prompt_format, language):
        if isinstance(row, BadRow):
            rejected.append({"reason": row.reason, "file": row.file, "line": row.line, "detail": row.detail})
        else:
            rows.append(encode_row(tokenizer, row, prompt_format))
    buckets, reasons = plan.place(
        np.array([row["duration_ms"] for row in rows], np.int64),
        np.array([len(row["tokens"]) for row in rows], np.int64),
    )
    by_bucket: dict[int, list[dict]] = {}
    for row, bucket, reason in zip(rows, buckets.tolist(), list(reasons), strict=True):
        if bucket >= 0:
            by_bucket.setdefault(bucket, []).append(row)
        else:
            kept = {key: row[key] for key in ("audio_path", "offset_ms", "duration_ms", "text")}
            rejected.append({"reason": str(reason), **kept, "tokens": len(row["tokens"])})
    for bucket, members in by_bucket.items():
        write_part(folder / part_name(bucket, chunk.index), members)
    if rejected:
        lines = b"".join(orjson.dumps(item) + b"\n" for item in rejected)
        atomic_write_bytes(folder / "rejected" / f"part-{chunk.index:05d}.jsonl", lines)
    return {
        "chunk": chunk.index,
        "rows": {str(bucket): len(members) for bucket, members in sorted(by_bucket.items())},
        "rejected": dict(sorted(Counter(item["reason"] for item in rejected).items())),
    }


def assign_all(
    chunks: list[ManifestChunk],
    tokenizer: CanaryTokenizer,
    plan: BucketPlan,
    folder: Path,
    *,
    key: str,
    prompt_format: str,
    language: str | None,
) -> Iterator[dict[str, Any]]:
    """Run the missing chunks on Ray Data; yields the note of every chunk, finished before or now."""
    import ray

    notes = folder / "parts"
    _clear_other_inputs(folder, key)
    done = [_read_note(notes / f"{chunk.index:05d}.json") for chunk in chunks]
    yield from (note for note in done if note)
    missing = [chunk for chunk, note in zip(chunks, done, strict=True) if not note]
    if not missing:
        return
    shared = ray.put((tokenizer, plan))

    def work(item: dict[str, Any]) -> dict[str, Any]:
        chunk = ManifestChunk(**orjson.loads(item["chunk"]))
        note = assign_chunk(chunk, *ray.get(shared), folder, prompt_format, language)
        # The note comes last: a range without one is written again, over the same file names.
        atomic_write_bytes(notes / f"{chunk.index:05d}.json", orjson.dumps(note))
        return {"note": orjson.dumps(note)}

    items = [{"chunk": orjson.dumps(asdict(chunk))} for chunk in missing]
    blocks = min(len(items), 4 * max(1, int(ray.cluster_resources().get("CPU", 1))))
    for row in ray.data.from_items(items, override_num_blocks=blocks).map(work).iter_rows():
        yield orjson.loads(row["note"])


def write_index(
    folder: Path, notes: list[dict[str, Any]], plan: BucketPlan, num_rows: int, parents: dict[str, str]
) -> str:
    """Write `index.json`; raises `ArtifactError` unless every row is in one bucket or rejected."""
    rejected: Counter = Counter()
    buckets: list[list[dict[str, int]]] = [[] for _ in plan.grid.buckets]
    for note in sorted(notes, key=lambda note: note["chunk"]):
        rejected.update(note["rejected"])
        for bucket, rows in note["rows"].items():
            buckets[int(bucket)].append({"chunk": note["chunk"], "rows": rows})
    assigned = sum(part["rows"] for parts in buckets for part in parts)
    if assigned + rejected.total() != num_rows:
        raise ArtifactError(
            "the assignment does not add up",
            got=f"{assigned} assigned + {rejected.total()} rejected",
            allowed=f"{num_rows} rows, as statistics counted",
            why="the manifests changed in between",
            remedy="run statistics again",
        )
    body = {
        "buckets": buckets,
        "rows": assigned,
        "rejected": dict(sorted(rejected.items())),
        "grid": [[bucket.max_duration_ms, bucket.max_tokens] for bucket in plan.grid.buckets],
    }
    return write_json(folder / "index.json", INDEX_FORMAT, body, parents)


def _clear_other_inputs(folder: Path, key: str) -> None:
    """Parts made from other inputs (another plan, tokenizer, manifest) must not mix with new ones."""
    marker = folder / "inputs.key"
    if folder.exists() and (not marker.exists() or marker.read_text() != key):
        shutil.rmtree(folder)
    atomic_write_bytes(marker, key.encode())


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
