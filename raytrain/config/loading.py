"""Configuration from YAML plus `section.key=value` overrides, validated strictly and as a whole.

An unknown key is an error, all errors are reported together, and each unknown key comes with the nearest valid one.

    config = load_config(Path("configs/digits.yaml"), ["train.max_steps=100"])
    config.train.max_steps        # 100
"""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raytrain.config.configuration import Config
from raytrain.config.reference import keys_below
from raytrain.errors import ConfigError, system_reason
from raytrain.redaction import redacted
from raytrain.storage.yaml_loading import load_yaml, read_yaml

_LONGEST_SHOWN = 200  # characters of a value in a message
_MOST_PROBLEMS = 50
_NOT_TEXT = "without quotes YAML reads it (like no, on, 1:30, 2024-01-01) as something other than text: quote it"


def load_config(
    path: Path | None, overrides: Sequence[str] | None = None, base: Mapping[str, Any] | None = None
) -> Config:
    """Read YAML, apply overrides, validate. Raises a `ConfigError` that lists every problem at once."""
    values = dict(base or {}) if path is None else _read(path)
    for override in overrides or []:
        values = _override(values, override)
    return check_config(values, source=str(path) if path else "configuration")


def check_config(values: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validate plain values into a `Config`; all problems are reported in one `ConfigError`."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = [_describe(item) for item in error.errors()[:_MOST_PROBLEMS]]
        number = error.error_count()
    listing = "\n  ".join(sorted(map(redacted, problems)))
    if number > len(problems):
        listing += f"\n  … and {number - len(problems)} more"
    raise ConfigError(f"{source} has {number} problem(s)", remedy=f"fix these settings:\n  {listing}")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except OSError as error:
        raise ConfigError(
            f"can't read the configuration {path}", why=system_reason(error), remedy="check the path after --config"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML", why=str(error), remedy="correct the file") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(
            f"{path} must hold sections",
            got=type(values).__name__,
            allowed="a mapping",
            remedy="begin the file with name: and data:",
        )
    return values or {}


def _override(values: dict[str, Any], text: str) -> dict[str, Any]:
    key, equals, raw = text.partition("=")
    *parents, last = key.split(".")
    if not equals or not all(part and part == part.strip() for part in (*parents, last)):
        raise ConfigError(
            "an override must look like section.key=value",
            got=_shown(text),
            remedy="name the section and the key, as in --set train.max_steps=100",
        )
    values = dict(values)
    node = values
    for part in parents:
        child = node.get(part)
        if child is not None and not isinstance(child, dict):
            kind = "a list, which is set as a whole" if isinstance(child, list) else "a value, not a section"
            raise ConfigError(f"{key} can't be set", why=f"{part} is {kind}", remedy=f"set {part}, or edit the file")
        node[part] = dict(child or {})
        node = node[part]
    node[last] = _parsed(key, raw)
    return values


def _parsed(key: str, raw: str) -> object:
    try:
        return load_yaml(raw)
    except ValueError as error:
        raise ConfigError(
            f"{key} can't be set",
            got=_shown(raw),
            why=str(error),
            remedy="write the value as in YAML; quote strings",
        ) from error


def _shown(value: object) -> str:
    """A value for a message, truncated if long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _describe(item: Mapping[str, Any]) -> str:
    """One problem reported by pydantic, as a line that begins with the dotted key."""
    parts = [str(part) for part in item["loc"]]
    key = ".".join(parts)
    match item["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{key}: unknown key; {_hint(parts)}"
        case "missing":
            return f"{key}: missing"
    message, value = _message(item), item.get("input")
    shown = "" if isinstance(value, dict) or "got" in message else f"; got {_shown(value)}"
    text = f"{message[0].lower() + message[1:]}{shown}"
    return f"{key}: {text}" if key else text  # sections that contradict each other have no key


def _message(item: Mapping[str, Any]) -> str:
    value = item.get("input")
    if item["type"] == "literal_error":
        choices = item["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        return f"must be one of {choices}, got {_shown(value)}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "string_type" and isinstance(value, bool | int | float | datetime.date):
        message += f"; {_NOT_TEXT}"
    return message


def _hint(parts: Sequence[str]) -> str:
    """The key closest to an unknown one, or all keys allowed there."""
    names = keys_below(parts[:-1])
    close = difflib.get_close_matches(parts[-1], names, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(names)}"
