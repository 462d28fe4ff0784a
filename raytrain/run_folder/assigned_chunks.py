"""Which chunks of a run are already assigned: they have valid notes made from the same inputs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from raytrain.data.assignment import ChunkNote, note_name, read_note
from raytrain.data.assignment.assigner import BAD_AUDIO
from raytrain.data.corpora.types import Chunk
from raytrain.data.probe import MISSING
from raytrain.lengths.plan import BucketPlan
from raytrain.storage.artifacts import atomic_write_bytes
from raytrain.storage.run_store import RunStore

FOLDER = "assignment"


def clear_stale_parts(store: RunStore, key: str) -> None:
    """Remove parts made from other inputs (another plan, tokenizer, manifest), which must not mix with new ones, and
    files that a killed job left unfinished."""
    name, folder = f"{FOLDER}/inputs.key", store.local / FOLDER
    marker = store.refresh(name)
    if not marker.exists() or marker.read_bytes() != key.encode():
        store.clear(FOLDER)
        atomic_write_bytes(marker, key.encode())
        store.share(name)
    if store.is_remote:  # notes of other inputs may remain on this machine
        shutil.rmtree(folder / "parts", ignore_errors=True)
        store.refresh_all(f"{FOLDER}/parts", "*.json")
    for half in folder.glob("*/.*"):
        half.unlink()


def standing_notes(store: RunStore, chunks: Sequence[Chunk], plan: BucketPlan) -> list[ChunkNote | None]:
    """The note of each chunk, or None if the chunk has to be assigned."""
    notes = [standing_note(store.local / FOLDER / note_name(chunk.index), chunk, plan) for chunk in chunks]
    if all(notes):  # all done, yet the stage runs again: unreadable recordings may have been fixed since
        return [None if note and BAD_AUDIO in note.rejected else note for note in notes]
    return notes


def standing_note(path: Path, chunk: Chunk, plan: BucketPlan) -> ChunkNote | None:
    """A chunk's note, or None if it has no matching note or if audio was missing that may be available by now: the
    chunk is then assigned again."""
    note = read_note(path)
    if note is None or (note.chunk, note.corpus) != (chunk.index, chunk.corpus) or MISSING in note.rejected:
        return None
    return note if all(int(bucket) < len(plan.grid.buckets) for bucket in note.rows) else None
