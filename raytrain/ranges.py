"""Which numbers a setting may have, written beside its type and checked wherever the settings are made.

    @dataclass(frozen=True)
    class Settings:
        workers: Annotated[int | tuple[int, int], Range(1, 64)] = 1
        rate: Annotated[float, Range(0, 1, above=True)] = 0.5

        def __post_init__(self) -> None:
            refuse(range_problems(self))

    Settings(rate=math.nan)      # ValueError: rate must be above 0 and at most 1, got nan

Pydantic, where a configuration is read, names the setting with its section; nothing here needs it.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, without `low` if they must be `above` it, without `high` if `below`.

    Of a list each number must be one of them. What is not a number (None, `auto`) is left to the type.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, number: float) -> bool:
        high = number < self.high if self.below else number <= self.high
        return bool(high and (number > self.low if self.above else number >= self.low))  # NaN is in no range

    def __str__(self) -> str:
        if not self.above and not self.below:
            return f"from {_plain(self.low)} to {_plain(self.high)}"
        low, high = "above" if self.above else "at least", "below" if self.below else "at most"
        return f"{low} {_plain(self.low)} and {high} {_plain(self.high)}"

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, None where nothing is."""
        numbers = value if isinstance(value, list | tuple) else [value]
        wrong = [one for one in numbers if isinstance(one, int | float) and one not in self]
        return f"must be {self}, got {list(value) if numbers is value else value}" if wrong else None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """How pydantic checks a field that is annotated with a range."""
        from pydantic_core import core_schema

        inner = core_schema.no_info_before_validator_function(self._no_truth_value, handler(source))
        return core_schema.no_info_after_validator_function(self._checked, inner)

    def _no_truth_value(self, value: Any) -> Any:
        # Pydantic would read `true` as 1.
        refuse([f"must be a number {self}, got {value}"] if isinstance(value, bool) else [])
        return value

    def _checked(self, value: Any) -> Any:
        refuse([problem] if (problem := self.problem(value)) else [])
        return value


def range_problems(settings: Any) -> list[str]:
    """What is wrong with the numbers of a dataclass whose fields are annotated with ranges."""
    problems = []
    for name, (range, allows_text) in _ranges_of(type(settings)).items():
        value = getattr(settings, name)
        problem = range.problem(value)
        if not problem and not (allows_text and isinstance(value, str)) and not _is_numeric(value):
            problem = f"must be a number {range}, got {value!r}"
        if problem:
            problems.append(f"{name} {problem}")
    return problems


def refuse(problems: Sequence[str]) -> None:
    """Raise one `ValueError` with all problems; nothing where there are none."""
    if problems:
        raise ValueError("; ".join(problems))


@cache
def _ranges_of(kind: type) -> dict[str, tuple[Range, bool]]:
    """The range of each field that has one, and whether it may also be a text."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        parts = list(_parts(hint))
        ranges = [part for part in parts if isinstance(part, Range)]
        if ranges:
            found[name] = (ranges[0], str in parts)
    return found


def _parts(hint: Any) -> Iterable[Any]:
    """A type with all that it is made of and annotated with."""
    yield hint
    yield from getattr(hint, "__metadata__", ())
    for part in typing.get_args(hint):
        yield from _parts(part)


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_numeric, value))
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _plain(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)
