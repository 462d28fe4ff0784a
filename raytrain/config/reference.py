"""Every configuration key and its description, as shown by `raytrain config` and docs/configuration.md.

    entries_below("train.max_steps")[0].unit     # "steps"
    nearest("train.max_step")                    # "train.max_steps"

In a key, `*` matches any list entry or any name: `data.train.*.path`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from raytrain.config.configuration import Config
from raytrain.settings import Facts, Setting, facts_of, parts_of

_SIZES = {"EiB": 1 << 60, "PiB": 1 << 50, "TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
_NO_SETTING = Setting("")


@dataclass(frozen=True)
class Entry:
    """One key: its default as a JSON value, unit, allowed values and help text, whether it is required, whether
    training can't resume from a checkpoint with another value (`lineage`), and whether it is a section."""

    key: str
    default: Any
    unit: str
    allowed: str
    help: str
    lineage: bool
    is_required: bool
    is_section: bool

    @property
    def parent(self) -> str:
        """The key of the enclosing section; empty at the top."""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def shown_default(self) -> str:
        """The default as written in YAML."""
        return "required" if self.is_required else self.shown(self.default)

    @property
    def limits(self) -> str:
        """The allowed values, with their unit."""
        unit = "" if self.unit == "bytes" and self.allowed else self.unit
        return " ".join(filter(None, (self.allowed, unit)))

    def shown(self, value: object) -> str:
        """A value of this key as written in YAML."""
        if value is None:
            return "unset"
        if self.unit == "bytes" and isinstance(value, int):
            return _size(value)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class _Field:
    """A field of a settings class. `settings` is the class of the nested settings, if any; with `holds_many` the field
    is a list or mapping of them."""

    facts: Facts
    default: object
    settings: type | None
    holds_many: bool
    is_optional: bool

    @property
    def is_section(self) -> bool:
        return self.settings is not None and not self.holds_many and not self.is_optional


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All keys in configuration order. The keys of a list's entries appear once, at the first such list."""
    return tuple(_walk(Config, "", True, set()))


def entries_below(key: str) -> list[Entry]:
    """The entry of a key and those of all keys below it; empty for an unknown key."""
    return [entry for entry in entries() if entry.key == key or entry.key.startswith(f"{key}.")]


def by_section(chosen: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Entries other than sections, grouped by the enclosing section's key."""
    sections: dict[str, list[Entry]] = {}
    for entry in chosen:
        if not entry.is_section:
            sections.setdefault(entry.parent, []).append(entry)
    return sections


def heading(section: str) -> str:
    """A section's key with its help text."""
    around = next((entry.help for entry in entries() if entry.key == section), "")
    return f"{section}: {around}" if around else section


def nearest(key: str) -> str | None:
    """The key closest to an unknown one, or with the same last part."""
    keys = [entry.key for entry in entries()]
    same_name = [entry.key for entry in entries() if entry.name == key]
    return next(iter(same_name or difflib.get_close_matches(key, keys, n=1)), None)


def keys_below(parts: Sequence[str]) -> list[str]:
    """The names in a section, given the parts of its key in a configuration (`["data", "train", "0"]`)."""
    kind: type | None = Config
    remaining = iter(parts)
    for part in remaining:
        field = _fields(kind).get(part) if kind else None
        if field is None:
            return []
        if field.holds_many:
            next(remaining, None)  # which entry
        kind = field.settings
    return sorted(_fields(kind)) if kind else []


class Values:
    """A configuration's values by key. Keys of list entries, and keys below an unset key, have no value."""

    def __init__(self, config: Config) -> None:
        self._sections = config.model_dump(mode="json")

    def __contains__(self, key: str) -> bool:
        return self._section_of(key) is not None

    def __getitem__(self, key: str) -> object:
        section = self._section_of(key)
        if section is None:
            raise KeyError(key)
        return section[key.rpartition(".")[2]]

    def _section_of(self, key: str) -> dict[str, object] | None:
        """The plain values of the section that contains a key."""
        section: object = self._sections
        *parents, name = key.split(".")
        for part in parents:
            section = section.get(part) if isinstance(section, dict) else None
        return section if isinstance(section, dict) and name in section else None


def _walk(kind: type, prefix: str, lineage: bool, listed: set[type]) -> Iterator[Entry]:
    for name, field in _fields(kind).items():
        entry = _entry(f"{prefix}{name}", field, lineage)
        yield entry
        if field.settings and field.settings not in listed:
            if field.holds_many:
                listed.add(field.settings)
            below = f"{entry.key}.*." if field.holds_many else f"{entry.key}."
            yield from _walk(field.settings, below, entry.lineage, listed)


def _entry(key: str, field: _Field, lineage: bool) -> Entry:
    setting = field.facts.setting or _NO_SETTING
    is_required = field.default is dataclasses.MISSING
    has_default = not is_required and not field.is_section
    return Entry(
        key=key,
        default=TypeAdapter(Any).dump_python(field.default, mode="json", exclude_none=True) if has_default else None,
        unit=setting.unit,
        allowed=_allowed(field.facts, setting.unit),
        help=setting.help,
        lineage=lineage if setting.lineage is None else setting.lineage,
        is_required=is_required,
        is_section=field.is_section,
    )


def _allowed(facts: Facts, unit: str) -> str:
    if facts.range is None:
        return " or ".join(filter(None, (", ".join(facts.choices[:-1]), *facts.choices[-1:])))
    return facts.range.text(_size if unit == "bytes" else _number)


@functools.cache
def _fields(kind: type) -> dict[str, _Field]:
    """The fields of a section or a settings dataclass, by name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {name: _field(hints[name], facts_of(kind)[name], default) for name, default in _defaults(kind).items()}


def _field(hint: object, facts: Facts, default: object) -> _Field:
    parts = list(parts_of(hint))
    classes = [part for part in parts if isinstance(part, type) and _is_settings(part)]
    holds_many = any(typing.get_origin(part) in (list, dict) for part in parts)
    return _Field(facts, default, next(iter(classes), None), holds_many, is_optional=type(None) in parts)


def _is_settings(kind: type) -> bool:
    return issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)


def _defaults(kind: type) -> dict[str, object]:
    """Each field's default, `dataclasses.MISSING` if it is required."""
    if issubclass(kind, BaseModel):
        return {name: _model_default(field) for name, field in kind.model_fields.items()}
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return {field.name: _dataclass_default(field) for field in fields}


def _model_default(field: FieldInfo) -> object:
    return dataclasses.MISSING if field.is_required() else field.get_default(call_default_factory=True)


def _dataclass_default(field: dataclasses.Field[Any]) -> object:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _size(number: float) -> str:
    """Bytes in the largest unit that gives a whole number."""
    name, size = next(((name, size) for name, size in _SIZES.items() if number % size == 0), ("", 1))
    return f"{number // size:.0f}{name}"


def _number(number: float) -> str:
    """A number; powers of ten and two from a million on are written as powers."""
    if isinstance(number, int) and abs(number) >= 10**6:
        for base in (10, 2):
            exponent = round(math.log(abs(number), base))
            if base**exponent == abs(number):
                return f"{'-' if number < 0 else ''}{base}^{exponent}"
    return f"{number:g}" if isinstance(number, float) else str(number)
