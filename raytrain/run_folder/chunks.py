"""How a split's corpora are cut into chunks, and what their rows depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from raytrain.config import Config
from raytrain.data.corpora.reading import DEFAULT_CHUNK_BYTES, plan_chunks
from raytrain.data.corpora.types import Chunk
from raytrain.run_folder.documents import CHUNKS_FORMAT
from raytrain.run_folder.workspace import Workspace
from raytrain.storage.artifacts import file_id
from raytrain.storage.filesystem import fingerprints
from raytrain.storage.locations import is_uri
from raytrain.storage.run_files import CHUNKS

MAX_CHUNKS = 4096
_HASHED_BYTES = 64 << 20


def chunks_of(config: Config, split: str) -> list[Chunk]:
    """Chunks of one split's corpora. Raises `ManifestError` for a missing file."""
    corpora = config.data.corpora(split)
    size = config.data.chunk_bytes or DEFAULT_CHUNK_BYTES
    chunks = plan_chunks(corpora, size)
    if config.data.chunk_bytes is None and len(chunks) > MAX_CHUNKS:
        # Each chunk produces a file in every bucket and a note on the driver.
        chunks = plan_chunks(corpora, size * -(-len(chunks) // MAX_CHUNKS))
    return chunks


def numbered_chunks(workspace: Workspace, chunks: list[Chunk]) -> list[Chunk]:
    """The chunks with the `first_line` that statistics counted; unchanged if statistics used different chunks."""
    counted = workspace.read(CHUNKS, CHUNKS_FORMAT, list[Chunk]).body
    return counted if _without_lines(counted) == _without_lines(chunks) else chunks


def _without_lines(chunks: Sequence[Chunk]) -> list[Chunk]:
    return [replace(chunk, first_line=0) for chunk in chunks]


def split_inputs(config: Config, split: str) -> dict[str, Any]:
    """What a split's rows depend on, as JSON values. The folder counts: rows hold absolute audio paths."""
    corpora = [
        asdict(replace(corpus, weight=1.0)) for corpus in config.data.corpora(split)
    ]  # weights don't affect rows
    chunks = chunks_of(config, split)
    manifests = sorted({chunk.path for chunk in chunks})
    sources = sorted({chunk.audio for chunk in chunks} - {"", *manifests})
    stamps = [*zip(manifests, fingerprints(manifests), strict=True), *zip(sources, fingerprints(sources), strict=True)]
    # A small manifest is compared by content, anything else by size and modification time.
    small = {
        name for name, stamp in stamps[: len(manifests)] if stamp and not is_uri(name) and stamp[0] <= _HASHED_BYTES
    }
    return {
        "corpora": corpora,
        "files": [[name, file_id(Path(name)) if name in small else stamp] for name, stamp in stamps],
    }
