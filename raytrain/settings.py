"""A setting's metadata besides its type: a sentence, its unit, and the numbers or choices that it allows.

    @dataclass(frozen=True)
    class Settings:
        rate: Annotated[float, Range(0, 1, above=True), Setting("How much is kept.")] = 0.5
        wait_s: Annotated[float, Range(0, 60), Setting("How long to wait.", unit="s", lineage=False)] = 1.0
        device: Annotated[Literal["cpu", "cuda"], Setting("Where to compute.")] = "cpu"

        def __post_init__(self) -> None:
            refuse(setting_problems(self))

    Settings(rate=math.nan)               # ValueError: rate must be above 0 and at most 1, got nan
    facts_of(Settings)["wait_s"].unit     # "s"

Pydantic, where a configuration is read, names the setting with its section; nothing here needs it. The command
`raytrain config` and docs/configuration.md show these facts.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pydantic_core import CoreSchema


@dataclass(frozen=True)
class Setting:
    """The sentence of a setting or of a section, and the unit of its numbers where it has one.

    `lineage` says whether the setting decides what a model learns, so that training can't be resumed from a checkpoint
    of another value. Unset, it is inherited from the enclosing section, whose default is true.
    """

    help: str
    unit: str = ""
    lineage: bool | None = None


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, without `low` if they must be `above` it, without `high` if `below`.

    Each number of a list must be among them. Values that are not numbers (None, `auto`) are left to the type.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, number: float) -> bool:
        high = number < self.high if self.below else number <= self.high
        return bool(high and (number > self.low if self.above else number >= self.low))  # no range contains NaN

    def __str__(self) -> str:
        return self.text(_plain)

    def text(self, show: Callable[[float], str]) -> str:
        """The range in words, with its limits formatted by `show`."""
        low, high = show(self.low), show(self.high)
        if not self.above and not self.below:
            return f"from {low} to {high}"
        return f"{'above' if self.above else 'at least'} {low} and {'below' if self.below else 'at most'} {high}"

    def problem(self, value: object) -> str | None:
        """The problem with a value, None if there is none."""
        numbers = value if isinstance(value, list | tuple) else [value]
        wrong = [number for number in numbers if isinstance(number, int | float) and number not in self]
        return f"must be {self}, got {list(numbers) if numbers is value else value}" if wrong else None

    def __get_pydantic_core_schema__(self, source: object, handler: Callable[[object], CoreSchema]) -> CoreSchema:
        """How pydantic checks a field that is annotated with a range."""
        from pydantic_core import core_schema

        inner = core_schema.no_info_before_validator_function(self._no_truth_value, handler(source))
        return core_schema.no_info_after_validator_function(self._checked, inner)

    def _no_truth_value(self, value: object) -> object:
        # Pydantic would read `true` as 1.
        refuse([f"must be a number {self}, got {value}"] if isinstance(value, bool) else [])
        return value

    def _checked(self, value: object) -> object:
        refuse([problem] if (problem := self.problem(value)) else [])
        return value


@dataclass(frozen=True)
class Switch:
    """What true and false mean for a setting that now has more choices: they are read as these."""

    on: str
    off: str

    def chosen(self, value: object) -> object:
        """The choice for a truth value; any other value is returned unchanged."""
        return (self.on if value else self.off) if isinstance(value, bool) else value

    def earlier(self, choice: str) -> bool | str:
        """The inverse, for what was stored before there were more choices."""
        return {self.on: True, self.off: False}.get(choice, choice)

    def __get_pydantic_core_schema__(self, source: object, handler: Callable[[object], CoreSchema]) -> CoreSchema:
        """How pydantic reads a field that is annotated with it."""
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self.chosen, handler(source))


@dataclass(frozen=True)
class Facts:
    """The annotations of a field: its setting, its range or its choices, and whether it may be any text."""

    setting: Setting | None
    range: Range | None
    choices: tuple[str, ...]
    allows_text: bool

    @property
    def allowed(self) -> str:
        """The range or the choices, empty if the type says it all."""
        return str(self.range) if self.range else ", ".join(self.choices)

    def problem(self, value: object) -> str | None:
        """The problem with a value, None if there is none."""
        if self.choices and value is not None and value not in self.choices:
            return f"must be one of {self.allowed}, got {value!r}"
        if self.range is None:
            return None
        problem = self.range.problem(value)
        if not problem and not (self.allows_text and isinstance(value, str)) and not _is_numeric(value):
            problem = f"must be a number {self.range}, got {value!r}"
        return problem


def facts_of(kind: type) -> dict[str, Facts]:
    """The facts of each field of a settings class, by name."""
    if kind not in _FACTS:
        hints = typing.get_type_hints(kind, include_extras=True)
        _FACTS[kind] = {name: _facts(hint) for name, hint in hints.items()}
    return _FACTS[kind]


_FACTS: dict[type, dict[str, Facts]] = {}


def setting_problems(settings: object) -> list[str]:
    """The problems with the numbers and choices of a settings dataclass."""
    facts = facts_of(type(settings))
    problems = ((name, fact.problem(getattr(settings, name))) for name, fact in facts.items())
    return [f"{name} {problem}" for name, problem in problems if problem]


def refuse(problems: Sequence[str]) -> None:
    """Raise one `ValueError` with all problems, if there are any."""
    if problems:
        raise ValueError("; ".join(problems))


def _facts(hint: object) -> Facts:
    parts = list(parts_of(hint))
    setting = next((part for part in parts if isinstance(part, Setting)), None)
    range = next((part for part in parts if isinstance(part, Range)), None)
    literals = (typing.get_args(part) for part in parts if typing.get_origin(part) is Literal)
    return Facts(setting, range, next(literals, ()), allows_text=str in parts)


def parts_of(hint: object) -> Iterator[object]:
    """A type with all its arguments and annotations."""
    yield hint
    yield from getattr(hint, "__metadata__", ())
    if typing.get_origin(hint) is not Literal:
        for part in typing.get_args(hint):
            yield from parts_of(part)


def _is_numeric(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_numeric, value))
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _plain(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)
