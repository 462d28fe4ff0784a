"""The location of each tar member, so that it can be read by its byte range."""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
import tarfile
from typing import BinaryIO

from raytrain.storage.filesystem import open_file
from raytrain.storage.locations import StorageReadError, is_uri

_SUFFIX = re.compile(r"-sub\d+(?=(\.\w+)?$)")  # NeMo's, for several rows that are spans of one member
_NO_AUDIO = (".json", ".nodata", ".nometa")  # files that Lhotse puts next to its audio
_BUFFER = 4 << 20
_SAMPLED_BYTES = 4096


def _middle(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    """Sampled bytes of a member that are audio: its ends may be a header, a tag or silence."""
    size = min(member.size, _SAMPLED_BYTES)
    file.seek(member.offset_data + (member.size - size) // 2)
    return file.read(size)


class TarIndex:
    """The byte range of each member of an uncompressed tar, from its headers. Raises `StorageReadError`.

    With `sampled`, its `sample_id` covers names, sizes and some bytes of each member: a tar whose audio was replaced
    has a different id, even with the same member positions, and a copy has the same id.
    """

    def __init__(self, path: str, *, sampled: bool = False) -> None:
        digest = hashlib.blake2b(digest_size=8)
        self._spans: dict[str, tuple[int, int]] = {}  # (start, size) by name
        self._stems: dict[str, tuple[int, int]] = {}
        try:
            with open_file(path) as file:
                # A request per header would cost more than reading everything in between.
                buffered = io.BufferedReader(file, _BUFFER) if is_uri(path) else file
                with tarfile.open(fileobj=buffered, mode="r:") as tar:
                    for member in tar:
                        if member.isfile() and not member.issparse():
                            self._add(member.name.removeprefix("./"), (member.offset_data, member.size))
                            if sampled:
                                digest.update(f"{member.name}\0{member.size}\0".encode(errors="surrogateescape"))
                                digest.update(_middle(buffered, member))
        except (tarfile.TarError, OSError) as error:
            raise StorageReadError(
                f"{path} is not a tar that can be read by range",
                why=str(error),
                remedy="unpack it, or make an uncompressed tar",
            ) from error
        self.sample_id = digest.hexdigest() if sampled else ""

    def _add(self, name: str, span: tuple[int, int]) -> None:
        self._spans[name] = span
        stem, ending = posixpath.splitext(name)
        if ending not in _NO_AUDIO:
            self._stems[stem] = span

    def find(self, member: str) -> tuple[int, int] | None:
        """(start, size) of a member in bytes, or None. A name without its extension also matches (Lhotse Shar)."""
        member = member.removeprefix("./")
        return self._spans.get(member) or self._stems.get(member) or self._spans.get(_SUFFIX.sub("", member))
