"""Prompt slots: their names, defaults, and the special token for each value.

    slot_token("pnc", "yes")        # '<|pnc|>'
    slot_token("emotion", "happy")  # '<|emo:happy|>'

Values may be written as people write them in manifests (yes, no, true, a language's code) or as special tokens.
"""

from __future__ import annotations

import reprlib
import sys
from typing import Any, NamedTuple

from raytrain.errors import TokenizerError

# In NeMo's order; `decodercontext` is text, all further slots are one special token each.
FORMATS = {
    "canary": ("source_lang", "task", "target_lang", "pnc"),
    "canary2": (
        "decodercontext",
        "emotion",
        "source_lang",
        "target_lang",
        "pnc",
        "itn",
        "timestamp",
        "diarize",
    ),
}
DEFAULTS = {
    "decodercontext": "",
    "emotion": "<|emo:undefined|>",
    "pnc": "<|pnc|>",
    "itn": "<|noitn|>",
    "timestamp": "<|notimestamp|>",
    "diarize": "<|nodiarize|>",
}
_SWITCHES = ("pnc", "itn", "timestamp", "diarize")
_EMOTIONS = ("undefined", "neutral", "happy", "sad", "angry")
_TASKS = {
    "asr": "<|transcribe|>",
    "transcribe": "<|transcribe|>",
    "ast": "<|translate|>",
    "s2t_translation": "<|translate|>",
    "translate": "<|translate|>",
}


class PromptKey(NamedTuple):
    """The fields of a row that determine its prompt: languages, punctuation and case, and further slots as (slot,
    value)."""

    source_lang: str
    target_lang: str
    pnc: bool
    slots: tuple[tuple[str, Any], ...] = ()


def check_format(prompt_format: str) -> tuple[str, ...]:
    """The slots of a format. Raises `TokenizerError` for an unknown one."""
    if prompt_format not in FORMATS:
        raise TokenizerError(
            "unknown prompt format",
            got=prompt_format,
            allowed=", ".join(FORMATS),
            remedy="set model.prompt_format to one of these",
        )
    return FORMATS[prompt_format]


def slot_token(slot: str, value: object) -> str:
    """The special token of a slot's value (context: the text). Raises `TokenizerError` that lists what is allowed."""
    if isinstance(value, dict | list | tuple) or (isinstance(value, int) and abs(value) > sys.maxsize):
        raise TokenizerError(  # without the value, which may be too deep or too long to show
            f"the prompt slot {slot} is a text", got=type(value).__name__, allowed="a text", remedy="correct the row"
        )
    if slot == "decodercontext":
        return _context(value)
    text = _spelled(value)
    if slot in ("source_lang", "target_lang"):
        return f"<|{text}|>"
    if slot in _SWITCHES:
        return _switch_token(slot, text, value)
    if slot == "emotion":
        return _emotion_token(text, value)
    if slot == "task":
        return _task_token(text, value)
    allowed = ", ".join(sorted({name for names in FORMATS.values() for name in names}))
    remedy = "name a slot of the model's prompt format"
    raise TokenizerError("unknown prompt slot", got=slot, allowed=allowed, remedy=remedy)


def _switch_token(slot: str, text: str, value: object) -> str:
    if text.lower() in ("yes", "true", "1", slot):
        return f"<|{slot}|>"
    if text.lower() in ("no", "false", "0", f"no{slot}"):
        return f"<|no{slot}|>"
    raise TokenizerError(
        f"unknown value of the prompt slot {slot}",
        got=reprlib.repr(value),
        allowed=f"yes, no, true, false, <|{slot}|>, <|no{slot}|>",
        remedy=f"correct {slot} in the manifest row, or leave it out",
    )


def _emotion_token(text: str, value: object) -> str:
    name = text.lower().removeprefix("emo:")
    if name in _EMOTIONS:
        return f"<|emo:{name}|>"
    raise TokenizerError(
        "unknown value of the prompt slot emotion",
        got=reprlib.repr(value),
        allowed=", ".join(_EMOTIONS),
        remedy="correct emotion in the manifest row, or leave it out",
    )


def _task_token(text: str, value: object) -> str:
    if text.lower() in _TASKS:
        return _TASKS[text.lower()]
    raise TokenizerError(
        "unknown value of the prompt slot task",
        got=reprlib.repr(value),
        allowed=", ".join(_TASKS),
        remedy="correct taskname in the manifest row, or leave it out",
    )


def _spelled(value: object) -> str:
    """A value as text, without the marks of a special token."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 1.0 means the same as 1
    return str(value).strip().removeprefix("<|").removesuffix("|>")


def _context(value: object) -> str:
    if not isinstance(value, str):
        raise TokenizerError(
            "the prompt slot decodercontext is a text",
            got=reprlib.repr(value),
            allowed="any text",
            remedy="write the manifest row's decodercontext as a string",
        )
    return value.strip()
