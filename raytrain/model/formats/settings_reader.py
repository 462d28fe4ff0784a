"""Reads the settings of a foreign file by dotted path, and collects all problems.

read = SettingsReader({"encoder": {"n_layers": 17}})
read.number("encoder.n_layers", limit=512)          # 17
read.number("encoder.d_model", limit=65_536)        # 1, and read.problems has the reason
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

_MAX_COUNT = 10_000


class SettingsReader:
    """Invalid values are recorded in `problems`, and a harmless default is returned instead."""

    def __init__(self, raw: Mapping[str, object]) -> None:
        self.raw = raw
        self.problems: list[str] = []

    def get(self, dotted: str, default: object = None) -> Any:
        """The value at a path like `encoder.n_layers`, `default` if there is none."""
        node: Any = self.raw
        for part in dotted.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = node[part]
        return node

    def expect(self, name: str, value: object, *allowed: object) -> None:
        """Record a problem unless the value is allowed."""
        if value not in allowed:
            self.problems.append(f"{name} is {reprlib.repr(value)} instead of {allowed[0]!r}")

    def number(self, dotted: str, limit: int, default: object = None) -> int:
        """A whole number in 1 … limit; malicious sizes would take all memory before any weight is read."""
        return self._whole(dotted, self.get(dotted, default), 1, limit, 1)

    def count(self, dotted: str, default: int) -> int:
        """A whole number in 0 … 10 000."""
        return self._whole(dotted, self.get(dotted, default), 0, _MAX_COUNT, default)

    def fraction(self, dotted: str, default: float) -> float:
        """A number in [0, 1)."""
        value = self.get(dotted, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            self.problems.append(f"{dotted} is {reprlib.repr(value)} instead of a number in [0, 1)")
            return default
        return float(value)

    def _whole(self, dotted: str, value: object, low: int, high: int, default: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.problems.append(f"{dotted} is {reprlib.repr(value)} instead of a whole number from {low} to {high}")
            return default
        return value
