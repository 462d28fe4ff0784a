"""What sections share: strict validation, and the types of numbers, fractions and memory sizes."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

from raytrain.settings import Range

_SIZE = re.compile(r"^\s*(\d{1,18}(?:\.\d{1,18})?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?\s*$", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


class Section(BaseModel):
    """A section of the configuration: unknown keys are errors, and sections are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def parse_bytes(value: str | int) -> int:
    """`"16GiB"` → 17179869184; whole numbers pass through. KB is 1000 bytes, KiB 1024. Raises `ValueError`."""
    if not isinstance(value, str):
        return value
    match = _SIZE.match(value)
    if not match:
        raise ValueError(f"{value!r} is not a size; write it like 16GiB or 512MiB")
    unit = (match[2] or "B").lower()
    base = 1024 if "ib" in unit else 1000
    return int(float(match[1]) * base ** _POWERS.get(unit[0], 0))


def _without_unit(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else value


AnySize = BeforeValidator(_without_unit)  # also accepts strings
Count = Annotated[int, Range(1, 10**12)]
Bytes = Annotated[int, Range(1 << 20, 1 << 60), AnySize]
BatchSize = Annotated[int, Range(1, 1 << 24)]
Share = Annotated[float, Range(0, 1)]
Amount = Annotated[float, Range(0, 10**15)]
