"""Stage `assign`: every row of the corpora goes into one bucket, or into `rejected/` with its reason.

A worker takes one chunk, writes one part for each bucket, and last a note that the chunk is done. A restarted job skips
the chunks whose notes stand and were made from the same inputs. No shuffle is needed: the schedule permutes row numbers
when it draws batches.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from raytrain.cluster.placement import ANYWHERE, Placement
from raytrain.cluster.session import map_on_workers
from raytrain.data.assignment import (
    ROW_SCHEMA,
    PartsWriter,
    note_name,
    read_note,
    row_table,
    write_note,
)
from raytrain.data.audio import PARQUET_ROW
from raytrain.data.corpora.rejected import NUM_EXAMPLES
from raytrain.data.corpora.rows import Block
from raytrain.data.corpora.types import BadRow, Chunk, read_blocks
from raytrain.data.materialize import AudioFinder, make_flacs
from raytrain.data.probe import MISSING, NO_LISTING, AudioListing
from raytrain.data.text.sequences import BlockEncoder
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.errors import ManifestError
from raytrain.lengths.plan import BucketPlan
from raytrain.storage.artifacts import atomic_write, atomic_write_bytes
from raytrain.storage.filesystem import patiently
from raytrain.storage.run_store import DEFAULT_CACHE_BYTES, RunStore

FOLDER = "assignment"
_FLUSH_AT = 32_768  # rows that wait before each bucket's are written: small batches make slow files
_FLUSH_AUDIO_AT = 256  # rows whose audio is in memory together


@dataclass(frozen=True)
class AssignSettings:
    """`sample_rate` is what audio is copied at, None where it is not copied; `cache_size` see `RunSection`; with
    `check_audio` rows whose file is not there are rejected."""

    prompt_format: str
    by_words: bool = True
    sample_rate: int | None = None
    cache_size: int = DEFAULT_CACHE_BYTES
    check_audio: bool = False


class ChunkAssigner:
    """Writes one chunk's parts below `folder`; rows whose audio file `listing` misses are rejected."""

    def __init__(
        self,
        chunk: Chunk,
        encoder: BlockEncoder,
        plan: BucketPlan,
        folder: Path,
        sample_rate: int | None,
        listing: AudioListing = NO_LISTING,
    ) -> None:
        self._chunk, self._encoder, self._plan, self._folder = chunk, encoder, plan, folder
        self._sample_rate, self._listing = sample_rate, listing
        self._audio = AudioFinder(chunk, sampled=sample_rate is None)  # copies have ids of their own
        self._waiting: list[tuple[np.ndarray, np.ndarray, pa.Table]] = []  # buckets, lines, rows
        self._rejected: Counter = Counter()
        self._examples: dict[str, list[dict[str, Any]]] = {}

    def run(self) -> dict[str, Any]:
        """Write all; the chunk's note, see `PartsWriter.note`. To be called once."""
        path = self._folder / "rejected" / f"part-{self._chunk.index:05d}.jsonl"
        flush_at = _FLUSH_AT if self._sample_rate is None else _FLUSH_AUDIO_AT
        with atomic_write(path) as self._rejects, PartsWriter(self._folder, self._chunk.index) as self._parts:
            for block in read_blocks(self._chunk):
                block = self._listing.check(self._encoder.check(block))
                for row in block.bad:
                    self._reject(row)
                if len(block):
                    self._add(block)
                if sum(table.num_rows for _, _, table in self._waiting) >= flush_at:
                    self._flush()
            self._flush()
        if not self._rejected:
            path.unlink()
        sources = self._audio.sample_ids if self._sample_rate is None else {}
        return self._parts.note(self._chunk.corpus, self._rejected, self._examples, sources)

    def share(self, note: dict[str, Any], store: RunStore) -> None:
        """Put the chunk's files where the run folder is."""
        if not store.is_remote:
            return
        home = self._folder.name
        for name, identity in note["files"].items():
            store.put_part(f"{home}/{name}", identity, keep=not name.endswith(".tar"))  # which is read by ranges
        if note["rejected"]:
            store.share(f"{home}/rejected/part-{self._chunk.index:05d}.jsonl")

    def _add(self, block: Block) -> None:
        encoded = self._encoder.encode(block)
        buckets, reasons = self._plan.assign(block.duration_ms, encoded.lengths)
        table, problems = row_table(block, encoded, self._audio)
        if self._sample_rate is None and pc.any(pc.equal(table["audio_size"], PARQUET_ROW)).as_py():
            raise ManifestError(
                f"corpus {self._chunk.corpus} holds audio inside Parquet",
                why="training reads rows in any order, and Parquet gives them by whole groups only",
                remedy="set assign.materialize to true, which copies the audio",
            )
        texts, paths = table["text"], table["audio_path"]
        wrong = np.array([problem is not None for problem in problems], bool)
        for index in np.flatnonzero((buckets < 0) | wrong).tolist():
            length, tokens = int(block.duration_ms[index]), int(encoded.lengths[index])
            if buckets[index] < 0:
                reason, detail = str(reasons[index]), f"{length} ms, {tokens} tokens"
            else:
                reason, detail = "bad_audio", problems[index]
            self._reject(
                BadRow(self._chunk.path, int(block.numbers[index]), reason, detail),
                audio_path=paths[index].as_py(),
                offset_ms=int(block.offset_ms[index]),
                duration_ms=length,
                tokens=tokens,
                text=texts[index].as_py(),
            )
        buckets = np.where(wrong, -1, buckets)
        kept = buckets >= 0
        self._waiting.append((buckets[kept], block.numbers[kept], table.filter(pa.array(kept))))

    def _flush(self) -> None:
        if not self._waiting:
            return
        buckets = np.concatenate([one for one, _, _ in self._waiting])
        lines = np.concatenate([one for _, one, _ in self._waiting])
        table = pa.concat_tables([one for _, _, one in self._waiting])
        self._waiting = []
        if self._sample_rate is not None:
            for start in range(0, len(buckets), _FLUSH_AUDIO_AT):
                rows = slice(start, start + _FLUSH_AUDIO_AT)
                self._flush_audio(buckets[rows], lines[rows], table.slice(start, _FLUSH_AUDIO_AT), self._sample_rate)
            return
        order = np.argsort(buckets, kind="stable")  # rows of a bucket stay in the corpus' order
        table, buckets = table.take(pa.array(order)), buckets[order]
        for bucket, start, stop in _runs(buckets):
            self._parts.write(bucket, table.slice(start, stop - start))

    def _flush_audio(self, buckets: np.ndarray, lines: np.ndarray, table: pa.Table, sample_rate: int) -> None:
        flacs = make_flacs(table, sample_rate)
        for bucket in np.unique(buckets).tolist():
            members = np.flatnonzero(buckets == bucket)
            good = [index for index in members.tolist() if isinstance(flacs[index], bytes)]
            for index in sorted(set(members.tolist()) - set(good)):
                row = table.slice(index, 1).to_pylist()[0]
                place = {key: row[key] for key in ("audio_path", "offset_ms", "duration_ms", "text")}
                self._reject(BadRow(self._chunk.path, int(lines[index]), "bad_audio", str(flacs[index])), **place)
            if good:
                path, starts, sizes = self._parts.write_audio(bucket, [flacs[index] for index in good])
                rows = table.take(pa.array(good))
                for name, values in (
                    ("audio_path", [path] * len(good)),
                    ("audio_start", starts),
                    ("audio_size", sizes),
                    ("offset_ms", [0] * len(good)),
                ):
                    number = ROW_SCHEMA.get_field_index(name)
                    rows = rows.set_column(number, name, pa.array(values, ROW_SCHEMA.field(name).type))
                self._parts.write(bucket, rows)

    def _reject(self, row: BadRow, **values: Any) -> None:
        self._rejected[row.reason] += 1
        examples = self._examples.setdefault(row.reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append({"file": row.file, "line": row.line, "detail": row.detail})
        where = {"reason": row.reason, "corpus": self._chunk.corpus, "file": row.file, "line": row.line}
        self._rejects.write(orjson.dumps({**where, "detail": row.detail, **values}) + b"\n")


def _runs(values: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(value, start, stop) of equal neighbours."""
    edges = np.flatnonzero(np.diff(values)) + 1
    bounds = [0, *edges.tolist(), len(values)]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if stop > start:
            yield int(values[start]), start, stop


def assign_all(
    chunks: list[Chunk],
    tokenizer: CanaryTokenizer,
    plan: BucketPlan,
    store: RunStore,
    settings: AssignSettings,
    *,
    key: str,
    placement: Placement = ANYWHERE,
) -> Iterator[dict[str, Any]]:
    """Run the missing chunks on Ray Data; yields the note of every chunk, finished before or now."""
    import ray

    _clear_other_inputs(store, key)
    done = [standing_note(store.local / FOLDER / note_name(chunk.index), chunk, plan) for chunk in chunks]
    if all(done):  # and yet the stage runs again: recordings that could not be read may have been mended since
        done = [None if "bad_audio" in note["rejected"] else note for note in done if note]
    yield from (note for note in done if note)
    missing = [chunk for chunk, note in zip(chunks, done, strict=True) if not note]
    if not missing:
        return
    shared, location = ray.put((tokenizer, plan)), store.location

    def work(chunks: list[Chunk]) -> list[dict[str, Any]]:
        tokenizer, plan = ray.get(shared)
        encoder = BlockEncoder(tokenizer, settings.prompt_format, by_words=settings.by_words)
        store = RunStore(location, settings.cache_size)
        listing = AudioListing(settings.check_audio)

        def assign(chunk: Chunk) -> dict[str, Any]:
            assigner = ChunkAssigner(chunk, encoder, plan, store.local / FOLDER, settings.sample_rate, listing)
            note = assigner.run()
            assigner.share(note, store)
            write_note(store.place(f"{FOLDER}/{note_name(chunk.index)}"), note)
            return note

        return [patiently(assign, chunk) for chunk in chunks]

    for made in map_on_workers(missing, work, 16, placement):
        yield from made


def _clear_other_inputs(store: RunStore, key: str) -> None:
    """Parts made from other inputs (another plan, tokenizer, manifest) must not mix with new ones, and what a killed
    job had half written goes."""
    name, folder = f"{FOLDER}/inputs.key", store.local / FOLDER
    marker = store.look(name)
    if not marker.exists() or marker.read_bytes() != key.encode():
        store.clear(FOLDER)
        atomic_write_bytes(marker, key.encode())
        store.share(name)
    if store.is_remote:  # notes of other inputs may have stayed on this machine
        shutil.rmtree(folder / "parts", ignore_errors=True)
        store.look_at_all(f"{FOLDER}/parts", "*.json")
    for half in folder.glob("*/.*"):
        half.unlink()


def standing_note(path: Path, chunk: Chunk, plan: BucketPlan) -> dict[str, Any] | None:
    """A chunk's note, None where there is none that is about it: the chunk is done again. So it is where audio was not
    there, which may have come since."""
    note = read_note(path)
    if note is None or (note["chunk"], note["corpus"]) != (chunk.index, chunk.corpus) or MISSING in note["rejected"]:
        return None
    return note if all(int(bucket) < len(plan.grid.buckets) for bucket in note["rows"]) else None
