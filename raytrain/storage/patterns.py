"""Patterns of file names: braces as a shell reads them, NeMo's spelling of braces, and `*` and `?` in the last part.

expand("s3://speech/manifest_{0..7}.jsonl")      # eight URIs; _OP_0..7_CL_ is NeMo's spelling of the same
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from raytrain.storage.filesystem import list_entries
from raytrain.storage.locations import StorageReadError

_BRACES = re.compile(r"\{([^{}]*)\}|_OP_(.*?)_CL_")
_NUMBERS = re.compile(r"([+-]?[0-9]+)\.\.([+-]?[0-9]+)(?:\.\.([+-]?[0-9]+))?")
_PADDED = re.compile(r"-?0[0-9]")
_LETTERS = re.compile(r"([a-z])\.\.([a-z])|([A-Z])\.\.([A-Z])")
_MAX_EXPANDED = 1_000_000


def expand(pattern: str) -> list[str]:
    """The paths that a pattern matches: `{0..7}`, `{a,b}`, `_OP_0..7_CL_`, and `*`, `?` in the last part.

    Braces mean what they mean to a shell, but do not nest: `{0..11}` is 0 to 11, `{00..11}` keeps the zeros,
    `{8..0..2}` goes down by 2. The matches of a `*` come in natural order (2 before 10): files, or folders if no file
    matches; names that begin with a dot are skipped. Raises `StorageReadError` if a `*` matches nothing.
    """
    parts, end = [], 0
    for match in _BRACES.finditer(pattern):
        parts += [[pattern[end : match.start()]], _choices(match)]
        end = match.end()
    parts.append([pattern[end:]])
    if math.prod(map(len, parts)) > _MAX_EXPANDED:
        raise _too_many(pattern)
    paths: list[str] = []
    for name in map("".join, itertools.product(*parts)):
        folder, slash, last = name.rpartition("/")
        if not any(mark in last for mark in "*?"):
            paths.append(name)
            continue
        matches = [
            entry
            for entry in list_entries(folder or slash or ".", last)
            if last[0] == "." or "/." not in entry.path[len(folder) :]
        ]
        chosen = [entry.path for entry in matches if entry.is_file] or [entry.path for entry in matches]
        if not chosen:
            raise StorageReadError(
                f"no file matches {name}", remedy="check the pattern and data.root (or $RAYTRAIN_DATA_ROOT)"
            )
        paths += chosen
    return paths


def _too_many(pattern: str) -> StorageReadError:
    return StorageReadError(
        f"{pattern} matches too many files", allowed=f"{_MAX_EXPANDED}", remedy="check the numbers in its braces"
    )


def _choices(match: re.Match[str]) -> Sequence[str]:
    inner = match[1] if match[1] is not None else match[2]
    if letters := _LETTERS.fullmatch(inner):
        first, last = (ord(letter) for letter in letters.groups() if letter)
        return [chr(number) for number in _span(first, last, 1)]
    span = _NUMBERS.fullmatch(inner)
    if not span:
        # As in a shell, {name} is a name.
        return inner.split(",") if "," in inner else [match[0]]
    first, last, step = int(span[1]), int(span[2]), abs(int(span[3] or 1)) or 1
    if abs(last - first) // step >= _MAX_EXPANDED:
        raise _too_many(match.string)
    ends = span[1], span[2]
    width = max(map(len, ends)) if any(map(_PADDED.match, ends)) else 0
    return [f"{number:0{width}d}" for number in _span(first, last, step)]


def _span(first: int, last: int, step: int) -> range:
    return range(first, last + 1, step) if last >= first else range(first, last - 1, -step)
