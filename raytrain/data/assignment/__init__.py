"""Assigned rows on disk: one Arrow file for each bucket and chunk, read by row number.

    assignment/bucket=003/part-00000.arrow     rows of bucket 3 from chunk 0, memory-mapped
    assignment/bucket=003/audio-00000.tar      their audio as FLAC, if it was copied
    assignment/rejected/part-00000.jsonl       rows that got no bucket, with their reason
    assignment/parts/00000.json                the note that chunk 0 is done, with the content ids of its files
    assignment/index.json                      rows for each bucket and chunk; the order of a bucket's rows

Row i of a bucket is the i-th over its parts in chunk order, so rows keep the order of the corpora, no matter how they
were split or which machine wrote which part.

The index lists each note's id, and its `rows_id` covers the bytes of every part, and some bytes of each tar that rows
point into; artifacts derived from the rows depend on that id. A process checks a part against its note when it first
opens it; if they differ, it removes the note, so that `assign` redoes the chunk.

Imports corpora and sequences, storage, numpy and pyarrow; nothing here knows about batches. Open `reading` first.
"""

from raytrain.data.assignment.index import INDEX_FORMAT, IndexBody, write_index
from raytrain.data.assignment.notes import (
    NOTE_FORMAT,
    ChunkNote,
    audio_name,
    note_name,
    part_name,
    read_note,
    write_note,
)
from raytrain.data.assignment.parts import PartsWriter
from raytrain.data.assignment.reading import Assignment, DamagedPartError
from raytrain.data.assignment.rows import ROW_SCHEMA, Row, row_table, rows_of

__all__ = [
    "INDEX_FORMAT",
    "NOTE_FORMAT",
    "ROW_SCHEMA",
    "Assignment",
    "ChunkNote",
    "DamagedPartError",
    "IndexBody",
    "PartsWriter",
    "Row",
    "audio_name",
    "note_name",
    "part_name",
    "read_note",
    "row_table",
    "rows_of",
    "write_index",
    "write_note",
]
