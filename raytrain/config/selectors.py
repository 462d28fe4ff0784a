"""How a configuration selects nodes of a cluster: by labels and by custom resources, validated without Ray.

selects("in(a100, h100)", "h100")      # True check_labels({"role": "!train"})       # [] check_resources({"GPU": 1})
# ["resource GPU is built into Ray; …"]
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"(?:[A-Za-z0-9][A-Za-z0-9.-]{{0,252}}/)?{_NAME}")
_SELECTOR = re.compile(rf"(!?)(?:({_NAME})|in\(({_NAME}(?:, ?{_NAME})*)\))")
_ACCELERATOR = "accelerator_type:"
_BUILT_IN = ("GPU", "TPU", "memory", "object_store_memory")
SMALLEST_SHARE = 1e-4  # of a resource: Ray's granularity


def selects(selector: str, value: str | None) -> bool:
    """Whether a selector matches a node with this value of a label (None if it lacks the label).

    A selector is `value`, `!value`, `in(value, value)` or `!in(value, value)`; those with `!` also match nodes without
    the label. Raises `ValueError` for anything else.
    """
    match = _SELECTOR.fullmatch(selector)
    if match is None:
        raise ValueError(f"{selector!r} is not a label selector")
    negated, single, several = match.groups()
    return (value in (single or several).replace(" ", "").split(",")) != bool(negated)


def check_labels(labels: Mapping[str, str]) -> list[str]:
    """Problems with label selectors; empty if they are valid."""
    problems = [f"label {key!r} is not a valid name" for key in labels if not _KEY.fullmatch(key)]
    return problems + [
        f"label {key} must be value, !value, in(value, value) or !in(value, value), got {selector!r}"
        for key, selector in labels.items()
        if not _SELECTOR.fullmatch(selector)
    ]


def check_resources(resources: Mapping[str, float], allowed: tuple[str, ...] = ()) -> list[str]:
    """Problems with amounts of custom resources; empty if they are valid. `allowed` lists the built-in Ray resources
    that may be among them."""
    problems = []
    for name, amount in resources.items():
        if name.startswith(_ACCELERATOR):
            problems.append(
                f"resource {name} is built into Ray; set accelerator_type: {name.removeprefix(_ACCELERATOR)}"
            )
        elif name in (*_BUILT_IN, "CPU") and name not in allowed:
            problems.append(f"resource {name} is built into Ray; use a custom resource that nodes were started with")
        elif not SMALLEST_SHARE <= amount < float("inf"):
            problems.append(f"resource {name} must be at least {SMALLEST_SHARE}, got {amount:g}")
    return problems


def accelerator_resource(kind: str) -> str:
    """Ray's resource on nodes with accelerators of a kind."""
    return _ACCELERATOR + kind


def accelerator_of(resources: Mapping[str, float]) -> str | None:
    """The kind of accelerator of a node with these resources, or None if they don't say."""
    kinds = (name for name in resources if name.startswith(_ACCELERATOR))
    return next(kinds, "").removeprefix(_ACCELERATOR) or None
