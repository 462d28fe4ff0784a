"""Lhotse Shar: folders with `cuts.000000.jsonl.gz` and the audio of its cuts in `recording.000000.tar`, and so on.

The tar holds what the cut spans, as `<cut id>.flac` or with another ending, which the cuts don't tell: members are
named by the cut's id (see `tarred.TarIndex`). Further fields, such as features, are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial

from raytrain.data.corpora.lhotse_cuts import cut_row
from raytrain.data.corpora.lines import WHOLE, read_lines
from raytrain.data.corpora.rows import RawRow
from raytrain.data.corpora.types import Chunk, Corpus
from raytrain.errors import ManifestError
from raytrain.storage.filesystem import file_sizes, list_files, parent

_CUTS = re.compile(r"(?:^|/)cuts(\.[^/]*)?\.jsonl(\.\w+)?$")


def make_chunks(corpus: Corpus, paths: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    """One chunk for each shard of the folders (or files of cuts). Raises `ManifestError` where a tar is missing, or
    would be that of two shards."""
    named = [path for path in paths if _CUTS.search(path)]
    file_sizes(named)  # a missing one fails here, not on a worker
    tars: dict[str, set[str]] = {}
    shard_of: dict[str, str] = {}
    for path in paths:
        shards = [path] if path in named else [one for one in list_files(path, "cuts*.jsonl*") if _CUTS.search(one)]
        if not shards:
            raise ManifestError(
                f"corpus {corpus.name}: {path} holds no cuts",
                allowed="cuts.000000.jsonl.gz and so on",
                remedy="name folders of Lhotse Shar",
            )
        for shard in shards:
            folder = (corpus.audio if isinstance(corpus.audio, str) else parent(shard)).rstrip("/")
            if folder not in tars:
                tars[folder] = set(list_files(folder, "recording*.tar"))
            tar = f"{folder}/recording{_CUTS.search(shard)[1] or ''}.tar"
            if tar not in tars[folder]:
                raise ManifestError(
                    f"corpus {corpus.name}: {shard} has no tar with its audio",
                    allowed=tar,
                    remedy="write the cuts with SharWriter and the field recording",
                )
            if tar in shard_of:
                raise ManifestError(
                    f"corpus {corpus.name}: two shards have the same tar",
                    got=f"{shard_of[tar]} and {shard}, both with {tar}",
                    remedy="list each shard once, and make corpora of their own of folders whose tars lie elsewhere",
                )
            shard_of[tar] = shard
            yield Chunk(shard, 0, WHOLE, audio=tar, first_line=1)


def read(chunk: Chunk) -> Iterator[tuple[int, list[RawRow]]]:
    """Rows of a chunk; see `corpus.read_blocks`."""
    return read_lines(chunk, partial(cut_row, in_tar=True))
