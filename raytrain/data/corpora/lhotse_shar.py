"""Lhotse Shar: folders with `cuts.000000.jsonl.gz` and the audio of its cuts in `recording.000000.tar`, and so on.

The tar holds the cut's span, as `<cut id>.flac` or with another extension, which the cuts don't state: members are
named after the cut's id (see `tarred.TarIndex`). Further fields, such as features, are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial

from raytrain.data.corpora import lines
from raytrain.data.corpora.lhotse_cuts import cut_row
from raytrain.data.corpora.types import Chunk, Corpus, RawRow
from raytrain.errors import ManifestError
from raytrain.storage.filesystem import file_sizes, list_files
from raytrain.storage.locations import parent

_CUTS = re.compile(r"(?:^|/)cuts(\.[^/]*)?\.jsonl(\.\w+)?$")


def make_chunks(corpus: Corpus, paths: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    """One chunk for each shard of the folders (or files of cuts). Raises `ManifestError` if a tar is missing, or two
    shards would share one."""
    named = [path for path in paths if _CUTS.search(path)]
    file_sizes(named)  # a missing file fails here, not on a worker
    tars = _Tars(corpus)
    for path in paths:
        shards = [path] if path in named else [cuts for cuts in list_files(path, "cuts*.jsonl*") if _CUTS.search(cuts)]
        if not shards:
            raise ManifestError(
                f"corpus {corpus.name}: {path} holds no cuts",
                allowed="cuts.000000.jsonl.gz and so on",
                remedy="name folders of Lhotse Shar",
            )
        for shard in shards:
            yield Chunk(shard, 0, lines.WHOLE, audio=tars.of(shard), first_line=1)


class _Tars:
    """The tars next to a corpus' cuts, or in its folder `audio`, each with the audio of one shard."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._listed: dict[str, set[str]] = {}
        self._shard_of: dict[str, str] = {}

    def of(self, shard: str) -> str:
        """The tar of a file of cuts. Raises `ManifestError` if there is none, or another shard has it."""
        audio = self._corpus.audio
        folder = (audio if isinstance(audio, str) else parent(shard)).rstrip("/")
        if folder not in self._listed:
            self._listed[folder] = set(list_files(folder, "recording*.tar"))
        match = _CUTS.search(shard)
        tar = f"{folder}/recording{match[1] or '' if match else ''}.tar"
        if tar not in self._listed[folder]:
            raise ManifestError(
                f"corpus {self._corpus.name}: {shard} has no tar with its audio",
                allowed=tar,
                remedy="write the cuts with SharWriter and the field recording",
            )
        if tar in self._shard_of:
            raise ManifestError(
                f"corpus {self._corpus.name}: two shards have the same tar",
                got=f"{self._shard_of[tar]} and {shard}, both with {tar}",
                remedy="list each shard once, and make folders whose tars are elsewhere separate corpora",
            )
        self._shard_of[tar] = shard
        return tar


def read(chunk: Chunk) -> Iterator[tuple[int, list[RawRow]]]:
    """Rows of a chunk; see `reading.read_blocks`."""
    return lines.read(chunk, partial(cut_row, in_tar=True))
