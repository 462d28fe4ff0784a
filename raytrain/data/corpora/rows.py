"""Rows of a corpus, given as mappings with NeMo's field names, checked and turned into utterances.

Readers of other formats rename their fields to NeMo's, so that what a row may say is decided here alone.
`RowParser.parse` says it for one row; `RowParser.block` for thousands at a time, several times faster and with the
same result.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np

from raytrain.data.corpora.types import BadRow, Chunk, Utterance
from raytrain.data.text.slots import slot_token
from raytrain.data.text.tokenizer import is_language
from raytrain.errors import TokenizerError
from raytrain.storage.filesystem import is_uri, parent

REASONS = (
    "bad_json",
    "missing_field",
    "bad_duration",
    "empty_text",
    "bad_text",
    "unknown_language",
    "bad_slot",
    "unsupported_audio",
    "bad_audio",
    "wrong_shard",
    "skipme",
)
Key = TypeVar("Key", bound=Hashable)
# A row as a reader gives it: NeMo's names, or (reason, detail) where it can't be read, or None for a blank line.
RawRow = dict[str, Any] | tuple[str, str] | None
# Field of a manifest row → prompt slot.
_SLOTS = {
    "taskname": "task",
    "task": "task",
    "decodercontext": "decodercontext",
    "emotion": "emotion",
    "itn": "itn",
    "timestamp": "timestamp",
    "diarize": "diarize",
}
# All fields that decide a row's prompt, or that it is left out.
PROMPT_FIELDS = ("_skipme", "source_lang", "lang", "target_lang", "pnc", *_SLOTS)
# About thirty years; what lies beyond is a fault, and would not fit an int64 of milliseconds.
_MAX_SECONDS = 1e9
_MAX_DETAIL = 500
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")  # in a path
_NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")  # what UTF-8 or a tokenizer can't hold
_FILLERS = "\u034f\u115f\u1160\u2800\u3164\uffa0"  # nothing to see, though Unicode calls them printable
_SEEN = re.compile(rf"(?![{_FILLERS}])[\w!-/:-@\[-`{{-~]")  # in almost any text, and then it is not empty


class PromptKey(NamedTuple):
    """What of a row decides its prompt; see `Utterance`."""

    source_lang: str
    target_lang: str
    pnc: bool
    slots: tuple[tuple[str, Any], ...] = ()


@dataclass
class Block:
    """Usable rows of a chunk by columns, and the unusable ones among them.

    `numbers`: (N,) lines in the file; `paths`: N names of the audio as the rows give them; `texts`: N texts as they
    stand; `duration_ms`, `offset_ms`: (N,) int64; row i has the prompt `prompts[prompt_of[i]]`. `num_lines` counts all,
    blank ones too.
    """

    chunk: Chunk
    numbers: np.ndarray
    paths: list[str]
    texts: list[str]
    duration_ms: np.ndarray
    offset_ms: np.ndarray
    prompts: list[PromptKey]
    prompt_of: np.ndarray
    bad: list[BadRow] = field(default_factory=list)
    num_lines: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, kept: np.ndarray) -> Block:
        """The rows where the (N,) mask is true; `bad` as it is."""
        if kept.all():
            return self
        index = np.flatnonzero(kept)
        return Block(
            self.chunk,
            self.numbers[index],
            [self.paths[i] for i in index],
            [self.texts[i] for i in index],
            self.duration_ms[index],
            self.offset_ms[index],
            self.prompts,
            self.prompt_of[index],
            self.bad,
            self.num_lines,
        )

    def without(self, rows: np.ndarray, bad: Sequence[BadRow]) -> Block:
        """The block without the rows where the (N,) mask is true, which are `bad`."""
        kept = self.select(~rows)
        kept.bad = sorted([*self.bad, *bad], key=lambda row: row.line)
        return kept

    def by_prompt(self, keys: Sequence[Key]) -> Iterator[tuple[Key, np.ndarray]]:
        """Each of the `keys`, which prompt i has at place i, and the (N,) mask of the rows with it."""
        for key in dict.fromkeys(keys):
            yield key, np.array([mine == key for mine in keys], bool)[self.prompt_of]

    def utterances(self) -> Iterator[Utterance]:
        """The rows one by one."""
        places = zip(*audio_places(self.chunk, self.paths), strict=True)
        times = zip(self.duration_ms.tolist(), self.offset_ms.tolist(), strict=True)
        rows = zip(places, times, self.texts, self.prompt_of.tolist(), strict=True)
        for (path, member), (duration, offset), text, number in rows:
            source, target, pnc, slots = self.prompts[number]
            yield Utterance(path, offset, duration, " ".join(text.split()), source, target, pnc, slots, member)


def audio_places(chunk: Chunk, paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """(absolute path or URI, member) of each audio; see `Utterance`."""
    if chunk.format in ("nemo_tarred", "lhotse_shar"):
        return [chunk.audio] * len(paths), list(paths)
    folder = (chunk.audio or parent(chunk.path)).rstrip("/") + "/"
    files = [path if path[0] == "/" or is_uri(path) else _below(folder, path) for path in paths]
    if chunk.format != "parquet":
        return files, [""] * len(paths)
    # A number is a row that holds its audio.
    members = [path if path.isdecimal() else "" for path in paths]
    return [chunk.path if member else file for file, member in zip(files, members, strict=True)], members


def _below(folder: str, path: str) -> str:
    if path[0] == "~":
        path = os.path.expanduser(path)
        if path[0] == "/":
            return path
    return folder + path


class RowParser:
    """Checks rows of one chunk."""

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk
        self._resolved: dict[Any, PromptKey | tuple[str, str]] = {}

    def parse(self, row: RawRow) -> Utterance | tuple[str, str]:
        """An utterance, or (reason, detail) of what is wrong with the row."""
        if row.__class__ is tuple:
            return row
        checked = self._check(row)
        if checked.__class__ is tuple:
            return checked
        return next(self._columns([0], [row], [checked]).utterances())

    def block(self, numbers: Sequence[int] | np.ndarray, rows: Sequence[RawRow]) -> Block:
        """All rows by columns; `numbers` are their lines."""
        plain = self._plain_columns(numbers, rows)
        if plain is not None:
            plain.num_lines = len(rows)
            return plain
        good_numbers, good, keys, bad = [], [], [], []
        for number, row in zip(np.asarray(numbers).tolist(), rows, strict=True):
            if row is None:
                continue
            checked = row if row.__class__ is tuple else self._check(row)
            if checked.__class__ is PromptKey:
                good_numbers.append(number)
                good.append(row)
                keys.append(checked)
            else:
                bad.append(BadRow(self._chunk.path, number, *checked))
        block = self._columns(good_numbers, good, keys)
        block.bad, block.num_lines = bad, len(rows)
        return block

    def _plain_columns(self, numbers: Sequence[int] | np.ndarray, rows: Sequence[RawRow]) -> Block | None:
        """`block` for rows that are as most rows are; None where one is not."""
        try:
            paths = list(map(itemgetter("audio_filepath"), rows))
            texts = list(map(itemgetter("text"), rows))
            seconds = list(map(itemgetter("duration"), rows))
            shapes = set(map(tuple, rows))
        except (KeyError, TypeError):
            return None
        fields = set().union(*shapes)
        starts = [row.get("offset") or 0 for row in rows] if "offset" in fields else [0]
        if set(map(type, paths)) | set(map(type, texts)) != {str} or not set(map(type, seconds + starts)) <= {
            int,
            float,
        }:
            return None
        if not self._is_plain_text(paths, texts):
            return None
        present = [name for name in PROMPT_FIELDS if name in fields]
        if len(shapes) == 1 and len(present) > 1:
            values = list(map(itemgetter(*present), rows))
        else:
            values = [tuple([row.get(name) for name in present]) for row in rows]
        try:
            distinct = {one: index for index, one in enumerate(dict.fromkeys(values))}
            prompts = [self._prompt(dict(zip(present, one, strict=True))) for one in distinct]
            if self._chunk.shard is not None and "shard_id" in fields:
                shards = {row.get("shard_id") for row in rows}
                if not all(map(self._is_own_shard, shards)):
                    return None
        except TypeError:  # a list or object where a text belongs
            return None
        if any(key.__class__ is not PromptKey for key in prompts):
            return None
        try:
            duration, start = np.array(seconds, np.float64), np.array(starts, np.float64)
        except OverflowError:  # a whole number beyond all floats
            return None
        if not (
            duration.min() > 0 and duration.max() <= _MAX_SECONDS and start.min() >= 0 and start.max() <= _MAX_SECONDS
        ):
            return None
        duration_ms, offset_ms = _whole_ms(duration, np.ceil), _whole_ms(start, np.floor)
        if not duration_ms.all():
            return None
        prompt_of = np.zeros(len(rows), np.intp)
        if len(prompts) > 1:
            prompt_of = np.fromiter(map(distinct.__getitem__, values), np.intp, len(values))
        return Block(
            self._chunk,
            np.array(numbers, np.int64),
            paths,
            texts,
            duration_ms,
            offset_ms if "offset" in fields else np.zeros(len(rows), np.int64),
            prompts,
            prompt_of,
        )

    @staticmethod
    def _is_plain_text(paths: list[str], texts: list[str]) -> bool:
        """Whether it takes no look at each row to see that all paths and texts are usable."""
        if not all(paths) or not all(texts) or not all(map(str.strip, texts)):
            return False
        joined = "".join(paths)
        if not _is_printable(joined) and _CONTROL.search(joined):
            return False
        joined = "".join(texts)
        if _is_printable(joined) and (joined.isascii() or not any(filler in joined for filler in _FILLERS)):
            return True
        try:
            joined.encode()  # a tenth of the search's time
        except UnicodeEncodeError:
            return False
        return "\0" not in joined and all(map(_SEEN.search, texts))

    def _is_own_shard(self, shard_id: Any) -> bool:
        shard = self._chunk.shard
        return (
            shard is None
            or shard_id is None
            or shard_id == shard
            or (shard_id.__class__ is str and shard_id == str(shard))
        )

    def _columns(self, numbers: Sequence[int], rows: Sequence[dict], keys: Sequence[PromptKey]) -> Block:
        distinct: dict[Any, int] = {}
        prompts: list[PromptKey] = []
        prompt_of = []
        for key in keys:
            try:
                index = distinct.setdefault(key, len(prompts))
            except TypeError:  # a slot that holds a list
                index = len(prompts)
            if index == len(prompts):
                prompts.append(key)
            prompt_of.append(index)
        duration = np.array([row["duration"] for row in rows], np.float64)
        offset = np.array([row.get("offset") or 0 for row in rows], np.float64)
        return Block(
            self._chunk,
            np.array(numbers, np.int64),
            [row["audio_filepath"] for row in rows],
            [row["text"] for row in rows],
            _whole_ms(duration, np.ceil),
            _whole_ms(offset, np.floor),
            prompts,
            np.array(prompt_of, np.intp),
        )

    def _check(self, row: Mapping[str, Any]) -> PromptKey | tuple[str, str]:
        """The one place that says what a usable row is."""
        if row.__class__ is not dict:
            return "bad_json", f"a row must be an object; got {type(row).__name__}"
        if row.get("_skipme"):
            return "skipme", "_skipme is set"
        missing = [name for name in ("audio_filepath", "duration", "text") if row.get(name) is None]
        if missing or not isinstance(row["audio_filepath"], str) or not row["audio_filepath"]:
            return "missing_field", f"needs {', '.join(missing) or 'audio_filepath as text'}"
        if _CONTROL.search(row["audio_filepath"]):
            return "bad_audio", f"audio_filepath with control characters: {_shown(row['audio_filepath'])}"
        duration, offset = row["duration"], row.get("offset") or 0
        if not (is_time(duration) and duration > 0 and is_time(offset) and offset >= 0 and _ceil_ms(duration)):
            return "bad_duration", f"duration {_shown(duration)}, offset {_shown(row.get('offset'))}"
        text = row["text"]
        if not isinstance(text, str) or not any(map(_is_seen, text)):
            return "empty_text", f"text {_shown(text)}"
        if _NO_TEXT.search(text):
            return "bad_text", f"text with a NUL or half a surrogate pair: {_shown(text)}"
        if not self._is_own_shard(row.get("shard_id")):
            return "wrong_shard", f"shard_id {_shown(row['shard_id'])} beside {self._chunk.audio}"
        return self._prompt(row)

    def _prompt(self, row: Mapping[str, Any]) -> PromptKey | tuple[str, str]:
        if row.get("_skipme"):
            return "skipme", "_skipme is set"
        source = row.get("source_lang") or row.get("lang") or self._chunk.language
        target = row.get("target_lang") or self._chunk.target_language or source
        if source is None:
            settings = "data.default_language, or --language"
            return "missing_field", f"needs source_lang or lang, or the corpus' language ({settings})"
        if not (isinstance(source, str) and isinstance(target, str)):
            return "unknown_language", f"{_shown(source)} → {_shown(target)}: a language is a text"
        source, target = (name.removeprefix("<|").removesuffix("|>") for name in (source, target))
        if not (is_language(source) and is_language(target)):
            return "unknown_language", f"{_shown(source)} → {_shown(target)}: a language is a name such as en or pt-BR"
        try:
            pnc = row.get("pnc") is None or slot_token("pnc", row["pnc"]) == "<|pnc|>"
        except TokenizerError as error:
            return "bad_slot", str(error)[:_MAX_DETAIL]
        slots = tuple((slot, row[name]) for name, slot in _SLOTS.items() if row.get(name) is not None)
        return PromptKey(source, target, pnc, slots)


def _is_printable(text: str) -> bool:
    """`str.isprintable`, ten times as fast for a long ASCII text."""
    if not text.isascii():
        return text.isprintable()
    codes = np.frombuffer(text.encode(), np.uint8)
    return not len(codes) or bool(codes.min() >= 32 and codes.max() < 127)


def _is_seen(character: str) -> bool:
    return character.isprintable() and not character.isspace() and character not in _FILLERS


def _shown(value: Any) -> str:
    """A value in a short line, whatever it is."""
    try:
        return repr(value) if isinstance(value, str) and len(value) < 80 else reprlib.repr(value)
    except Exception:  # a number of too many digits
        return f"a {type(value).__name__}"


def is_time(value: Any) -> bool:
    """Whether a value can be seconds."""
    return value.__class__ in (int, float) and abs(value) <= _MAX_SECONDS


def _ceil_ms(seconds: float) -> int:
    return math.ceil(round(seconds * 1e9) / 1e6)


def _whole_ms(seconds: np.ndarray, direction: Any) -> np.ndarray:
    """Whole milliseconds. Float noise (2.3 s read as 2.3000000000000003) must not cost one: to the nanosecond first."""
    return direction(np.rint(seconds * 1e9) / 1e6).astype(np.int64)
