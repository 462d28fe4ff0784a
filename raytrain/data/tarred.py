"""NeMo's tarred sets: `manifest_0.json` names the members of `audio_0.tar`, and so on.

Several rows may be spans of one member; NeMo then calls them `name-sub1.wav`, `name-sub2.wav` where the tar holds
`name.wav`.
"""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence

from raytrain.data.corpus import Chunk, Corpus
from raytrain.data.lines import WHOLE, read_lines
from raytrain.data.storage import StorageReadError, expand, file_sizes, is_uri, open_file
from raytrain.errors import ManifestError

_SPAN = re.compile(r"-sub\d+(?=(\.\w+)?$)")
_NO_AUDIO = (".json", ".nodata", ".nometa")  # what Lhotse puts beside its audio
_BUFFER = 4 << 20


def make_chunks(corpus: Corpus, paths: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    """One chunk for each manifest and its tar. Raises `ManifestError` where they differ in number."""
    patterns = (corpus.audio,) if isinstance(corpus.audio, str) else corpus.audio or ()
    tars = [one for pattern in patterns for one in expand(pattern)]
    if len(tars) != len(paths):
        raise ManifestError(
            f"corpus {corpus.name}: manifests and tars differ in number",
            got=f"{len(paths)} manifests, {len(tars)} tars",
            allowed="one manifest for each tar, in the same order",
        )
    file_sizes([*paths, *tars])  # a missing one fails here, not on a worker
    for path, tar in zip(paths, tars, strict=True):
        yield Chunk(path, 0, WHOLE, audio=tar, first_line=1)


read = read_lines


class TarIndex:
    """Where each member's bytes lie in an uncompressed tar, by its headers. Raises `StorageReadError`."""

    def __init__(self, path: str) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        self._stems: dict[str, tuple[int, int]] = {}
        try:
            with open_file(path) as file:
                # A request for each header would cost more than to read what lies between them.
                buffered = io.BufferedReader(file, _BUFFER) if is_uri(path) else file
                with tarfile.open(fileobj=buffered, mode="r:") as tar:
                    for member in tar:
                        if member.isfile() and not member.issparse():
                            self._add(member.name.removeprefix("./"), (member.offset_data, member.size))
        except (tarfile.TarError, OSError) as error:
            raise StorageReadError(
                f"{path} is no tar that can be read by range",
                why=str(error),
                remedy="unpack it, or make an uncompressed tar",
            ) from error

    def _add(self, name: str, place: tuple[int, int]) -> None:
        self._places[name] = place
        stem, ending = posixpath.splitext(name)
        if ending not in _NO_AUDIO:
            self._stems[stem] = place

    def find(self, member: str) -> tuple[int, int] | None:
        """(start, size) of a member in bytes, or None. A name without its ending will do (Lhotse Shar)."""
        member = member.removeprefix("./")
        return self._places.get(member) or self._stems.get(member) or self._places.get(_SPAN.sub("", member))
