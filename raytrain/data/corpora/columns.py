"""A fast path that checks ordinary rows by columns, without visiting each row.

`RowParser.block` tries `Columns` first, and checks row by row if it returns None. Both must give the same result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeGuard

import numpy as np

from raytrain.data.corpora.types import Fields, RawRow

# About thirty years; anything beyond is an error, and would not fit an int64 of milliseconds.
MAX_SECONDS = 1e9
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")  # in a path
FILLERS = "\u034f\u115f\u1160\u2800\u3164\uffa0"  # invisible, though Unicode calls them printable
_VISIBLE = re.compile(rf"(?![{FILLERS}])[\w!-/:-@\[-`{{-~]")  # in almost any text, and then it is not empty


@dataclass(frozen=True)
class Columns:
    """Rows that all have a path, a text and a duration of the right types. `names` are all fields that occur;
    `is_uniform` if all rows have the same fields."""

    rows: Sequence[Fields]
    names: frozenset[str]
    is_uniform: bool
    paths: list[str]
    texts: list[str]
    seconds: list[float]
    starts: list[float]

    @classmethod
    def of(cls, rows: Sequence[RawRow]) -> Columns | None:
        """None if a row lacks a field, or has a value of another type or an unusual path or text."""
        if not rows or not _are_objects(rows):
            return None
        try:
            paths = list(map(itemgetter("audio_filepath"), rows))
            texts = list(map(itemgetter("text"), rows))
            seconds = list(map(itemgetter("duration"), rows))
        except KeyError:
            return None
        shapes = set(map(tuple, rows))
        names = frozenset().union(*shapes)
        starts: list[float] = [row.get("offset") or 0 for row in rows] if "offset" in names else [0]
        if set(map(type, paths)) | set(map(type, texts)) != {str} or not set(map(type, seconds + starts)) <= _NUMBERS:
            return None
        if not (_are_plain_paths(paths) and _are_plain_texts(texts)):
            return None
        return cls(rows, names, len(shapes) == 1, paths, texts, seconds, starts)

    def times_ms(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Durations and offsets, (N,) int64 each; None if one is outside the limits."""
        try:
            duration, start = np.array(self.seconds, np.float64), np.array(self.starts, np.float64)
        except OverflowError:  # an integer beyond the float range
            return None
        if not (0 < duration.min() <= duration.max() <= MAX_SECONDS and 0 <= start.min() <= start.max() <= MAX_SECONDS):
            return None
        duration_ms, offset_ms = whole_ms(duration, np.ceil), whole_ms(start, np.floor)
        if not duration_ms.all():
            return None
        return duration_ms, offset_ms if "offset" in self.names else np.zeros(len(self.rows), np.int64)

    def distinct(self, names: Sequence[str]) -> tuple[list[Fields], np.ndarray]:
        """The distinct combinations of values in these fields, and the (N,) index of each row's combination.

        Raises `TypeError` if a value is a list or an object.
        """
        if self.is_uniform and len(names) > 1:
            values = list(map(itemgetter(*names), self.rows))
        else:
            values = [tuple([row.get(name) for name in names]) for row in self.rows]
        index = {value: number for number, value in enumerate(dict.fromkeys(values))}
        combinations = [dict(zip(names, value, strict=True)) for value in index]
        if len(index) == 1:
            return combinations, np.zeros(len(values), np.intp)
        return combinations, np.fromiter(map(index.__getitem__, values), np.intp, len(values))

    def values(self, name: str) -> set[Any]:
        """The distinct values of a field. Raises `TypeError` if one is a list or an object."""
        return {row.get(name) for row in self.rows} if name in self.names else set()


_NUMBERS = {int, float}


def whole_ms(seconds: np.ndarray, direction: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Whole milliseconds. Float noise (2.3 s read as 2.3000000000000003) must not cost one: to the nanosecond first."""
    return direction(np.rint(seconds * 1e9) / 1e6).astype(np.int64)


def _are_objects(rows: Sequence[RawRow]) -> TypeGuard[Sequence[Fields]]:
    return set(map(type, rows)) == {dict}


def _are_plain_paths(paths: list[str]) -> bool:
    joined = "".join(paths)
    return all(paths) and (_is_printable(joined) or not CONTROL.search(joined))


def _are_plain_texts(texts: list[str]) -> bool:
    """Whether all texts are usable, checked in one pass."""
    if not all(texts) or not all(map(str.strip, texts)):
        return False
    joined = "".join(texts)
    if _is_printable(joined) and (joined.isascii() or not any(filler in joined for filler in FILLERS)):
        return True
    try:
        joined.encode()  # takes a tenth of the search's time
    except UnicodeEncodeError:
        return False
    return "\0" not in joined and all(map(_VISIBLE.search, texts))


def _is_printable(text: str) -> bool:
    """`str.isprintable`, ten times as fast for a long ASCII text."""
    if not text.isascii():
        return text.isprintable()
    codes = np.frombuffer(text.encode(), np.uint8)
    return not len(codes) or bool(codes.min() >= 32 and codes.max() < 127)
