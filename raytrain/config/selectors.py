"""How a configuration names nodes of a cluster: by labels and by custom resources, checked without Ray.

selects("in(a100, h100)", "h100")      # True
check_labels({"role": "!train"})       # []
check_resources({"GPU": 1})            # ["resource GPU is Ray's own; …"]
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"(?:[A-Za-z0-9][A-Za-z0-9.-]{{0,252}}/)?{_NAME}")
_SELECTOR = re.compile(rf"(!?)(?:({_NAME})|in\(({_NAME}(?:, ?{_NAME})*)\))")
_ACCELERATOR = "accelerator_type:"
_BUILT_IN = ("GPU", "TPU", "memory", "object_store_memory")
SMALLEST_SHARE = 1e-4  # of a resource: Ray counts in these


def selects(selector: str, value: str | None) -> bool:
    """Whether a selector selects a node with this value of a label (None without it).

    A selector is `value`, `!value`, `in(value, value)` or `!in(value, value)`; those with `!` also select nodes without
    the label. Raises `ValueError` for what is none of these.
    """
    match = _SELECTOR.fullmatch(selector)
    if match is None:
        raise ValueError(f"{selector!r} is not a selector of labels")
    negated, single, several = match.groups()
    return (value in (single or several).replace(" ", "").split(",")) != bool(negated)


def check_labels(labels: Mapping[str, str]) -> list[str]:
    """What is wrong with label selectors, nothing where they are right."""
    problems = [f"label {key!r} is not a valid name" for key in labels if not _KEY.fullmatch(key)]
    return problems + [
        f"label {key} must be value, !value, in(value, value) or !in(value, value), got {selector!r}"
        for key, selector in labels.items()
        if not _SELECTOR.fullmatch(selector)
    ]


def check_resources(resources: Mapping[str, float], allowed: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with amounts of custom resources, nothing where they are right. `allowed` names those of Ray's own
    that may be among them."""
    problems = []
    for name, amount in resources.items():
        if name.startswith(_ACCELERATOR):
            problems.append(f"resource {name} is Ray's own; set accelerator_type: {name.removeprefix(_ACCELERATOR)}")
        elif name in (*_BUILT_IN, "CPU") and name not in allowed:
            problems.append(f"resource {name} is Ray's own; name one that nodes were started with")
        elif not SMALLEST_SHARE <= amount < float("inf"):
            problems.append(f"resource {name} must be at least {SMALLEST_SHARE}, got {amount:g}")
    return problems


def accelerator_resource(kind: str) -> str:
    """Ray's resource of the nodes with accelerators of a kind."""
    return _ACCELERATOR + kind


def accelerator_of(resources: Mapping[str, float]) -> str | None:
    """The kind of accelerator of a node with these resources, None where it does not tell."""
    kinds = (name for name in resources if name.startswith(_ACCELERATOR))
    return next(kinds, "").removeprefix(_ACCELERATOR) or None
