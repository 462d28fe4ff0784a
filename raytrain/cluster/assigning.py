"""Assigning rows to buckets on Ray Data.

A worker takes one chunk, writes one part per bucket, and finally writes a note that the chunk is done. A restarted job
skips chunks that have a valid note made from the same inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

from raytrain.cluster.mapping import map_on_workers
from raytrain.cluster.placement import ANYWHERE, Placement
from raytrain.data.assignment import ChunkNote, note_name, write_note
from raytrain.data.assignment.assigner import AssignSettings, ChunkAssigner
from raytrain.data.corpora.types import Chunk
from raytrain.data.probe import AudioListing
from raytrain.data.sequences import BlockEncoder
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.lengths.plan import BucketPlan
from raytrain.run_folder.assigned_chunks import FOLDER, clear_stale_parts, standing_notes
from raytrain.storage.patience import patiently
from raytrain.storage.run_store import RunStore


def assign_all(
    chunks: list[Chunk],
    tokenizer: CanaryTokenizer,
    plan: BucketPlan,
    store: RunStore,
    settings: AssignSettings,
    *,
    key: str,
    placement: Placement = ANYWHERE,
) -> Iterator[ChunkNote]:
    """Run the missing chunks on Ray Data; yields every chunk's note, including those of chunks finished earlier."""
    import ray

    clear_stale_parts(store, key)
    notes = standing_notes(store, chunks, plan)
    yield from (note for note in notes if note)
    missing = [chunk for chunk, note in zip(chunks, notes, strict=True) if not note]
    if not missing:
        return
    shared, location = ray.put((tokenizer, plan)), store.location

    def work(chunks: list[Chunk]) -> list[ChunkNote]:
        tokenizer, plan = ray.get(shared)
        encoder = BlockEncoder(tokenizer, settings.prompt_format, by_words=settings.by_words)
        store = RunStore(location, settings.cache_size)
        listing = AudioListing(settings.check_audio)

        def assign(chunk: Chunk) -> ChunkNote:
            assigner = ChunkAssigner(chunk, encoder, plan, store.local / FOLDER, settings.sample_rate, listing)
            note = assigner.run()
            assigner.share(note, store)
            write_note(store.location_of(f"{FOLDER}/{note_name(chunk.index)}"), note)
            return note

        return [patiently(assign, chunk) for chunk in chunks]

    for made in map_on_workers(missing, work, 16, placement):
        yield from made
