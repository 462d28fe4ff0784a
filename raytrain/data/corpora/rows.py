"""Rows of a corpus, given as mappings with NeMo's field names, checked and turned into utterances.

Readers of other formats rename their fields to NeMo's, so that all validation is here. `RowParser.parse` validates one
row; `RowParser.block` for thousands at a time, several times faster and with the same result.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from raytrain.data.corpora.blocks import Block
from raytrain.data.corpora.columns import CONTROL, FILLERS, MAX_SECONDS, Columns, whole_ms
from raytrain.data.corpora.types import BadRow, Chunk, Fields, Problem, RawRow, Utterance
from raytrain.data.text.slots import PromptKey, slot_token
from raytrain.data.text.tokenizer import is_language
from raytrain.errors import TokenizerError

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
# All fields that determine a row's prompt, or whether it is left out.
PROMPT_FIELDS = ("_skipme", "source_lang", "lang", "target_lang", "pnc", *_SLOTS)
MAX_DETAIL = 500  # characters: a row may hold anything
_NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")  # characters that UTF-8 or a tokenizer can't represent


class RowParser:
    """Checks rows of one chunk."""

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk

    def parse(self, row: RawRow) -> Utterance | Problem:
        """An utterance, or the row's problem as (reason, detail)."""
        if isinstance(row, tuple):
            return row
        key = self._check(row)
        if not isinstance(key, PromptKey):
            return key
        assert isinstance(row, dict)  # other types were rejected above
        return next(self._checked_block([0], [row], [key]).utterances())

    def block(self, numbers: Sequence[int] | np.ndarray, rows: Sequence[RawRow]) -> Block:
        """All rows by columns; `numbers` are their lines."""
        block = self._plain_block(numbers, rows)
        if block is None:
            block = self._block_row_by_row(numbers, rows)
        block.num_lines = len(rows)
        return block

    def _plain_block(self, numbers: Sequence[int] | np.ndarray, rows: Sequence[RawRow]) -> Block | None:
        """`block` for ordinary rows; None if one is not."""
        columns = Columns.of(rows)
        times = columns.times_ms() if columns is not None else None
        if columns is None or times is None:
            return None
        try:
            combinations, prompt_of = columns.distinct([name for name in PROMPT_FIELDS if name in columns.names])
            prompts = [self._prompt(combination) for combination in combinations]
            is_whole_shard = self._chunk.shard is None or all(map(self._is_in_shard, columns.values("shard_id")))
        except TypeError:  # a list or object where a text belongs
            return None
        keys = [key for key in prompts if isinstance(key, PromptKey)]
        if not is_whole_shard or len(keys) < len(prompts):
            return None
        lines = np.array(numbers, np.int64)
        return Block(self._chunk, lines, columns.paths, columns.texts, *times, keys, prompt_of)

    def _block_row_by_row(self, numbers: Sequence[int] | np.ndarray, rows: Sequence[RawRow]) -> Block:
        lines: list[int] = []
        usable: list[Fields] = []
        keys: list[PromptKey] = []
        bad: list[BadRow] = []
        for number, row in zip(np.asarray(numbers).tolist(), rows, strict=True):
            if row is None:
                continue
            checked = row if isinstance(row, tuple) else self._check(row)
            if not isinstance(checked, PromptKey):
                bad.append(BadRow(self._chunk.path, number, *checked))
            elif isinstance(row, dict):
                lines.append(number)
                usable.append(row)
                keys.append(checked)
        block = self._checked_block(lines, usable, keys)
        block.bad = bad
        return block

    def _is_in_shard(self, shard_id: object) -> bool:
        shard = self._chunk.shard
        return (
            shard is None
            or shard_id is None
            or shard_id == shard
            or (shard_id.__class__ is str and shard_id == str(shard))
        )

    def _checked_block(self, numbers: Sequence[int], rows: Sequence[Fields], keys: Sequence[PromptKey]) -> Block:
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
            whole_ms(duration, np.ceil),
            whole_ms(offset, np.floor),
            prompts,
            np.array(prompt_of, np.intp),
        )

    def _check(self, row: object) -> PromptKey | Problem:
        """The requirements on a usable row; all checks except those of its prompt are here."""
        if not isinstance(row, dict):
            return "bad_json", f"a row must be an object; got {type(row).__name__}"
        if row.get("_skipme"):
            return "skipme", "_skipme is set"
        missing = [name for name in ("audio_filepath", "duration", "text") if row.get(name) is None]
        if missing or not isinstance(row["audio_filepath"], str) or not row["audio_filepath"]:
            return "missing_field", f"needs {', '.join(missing) or 'audio_filepath as text'}"
        if CONTROL.search(row["audio_filepath"]):
            return "bad_audio", f"audio_filepath with control characters: {_shown(row['audio_filepath'])}"
        duration, offset = row["duration"], row.get("offset") or 0
        if not (is_time(duration) and duration > 0 and is_time(offset) and offset >= 0 and _ceil_ms(duration)):
            return "bad_duration", f"duration {_shown(duration)}, offset {_shown(row.get('offset'))}"
        text = row["text"]
        if not isinstance(text, str) or not any(map(_is_visible, text)):
            return "empty_text", f"text {_shown(text)}"
        if _NO_TEXT.search(text):
            return "bad_text", f"text with a NUL or half a surrogate pair: {_shown(text)}"
        if not self._is_in_shard(row.get("shard_id")):
            return "wrong_shard", f"shard_id {_shown(row['shard_id'])} beside {self._chunk.audio}"
        return self._prompt(row)

    def _prompt(self, row: Mapping[str, Any]) -> PromptKey | Problem:
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
            return "bad_slot", str(error)[:MAX_DETAIL]
        slots = tuple((slot, row[name]) for name, slot in _SLOTS.items() if row.get(name) is not None)
        return PromptKey(source, target, pnc, slots)


def _is_visible(character: str) -> bool:
    return character.isprintable() and not character.isspace() and character not in FILLERS


def _shown(value: object) -> str:
    """Any value as one short line."""
    try:
        return repr(value) if isinstance(value, str) and len(value) < 80 else reprlib.repr(value)
    except Exception:  # a number with too many digits
        return f"a {type(value).__name__}"


def is_time(value: object) -> TypeGuard[float]:
    """Whether a value can be seconds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_SECONDS


def _ceil_ms(seconds: float) -> int:
    return math.ceil(round(seconds * 1e9) / 1e6)
