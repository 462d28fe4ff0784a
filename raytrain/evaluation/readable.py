"""When a score of the readable recordings may count for all of them."""

from __future__ import annotations


def are_enough_readable(unreadable: int, rows: int, limit: float) -> bool:
    """Whether a score of the readable rows counts for all `rows`: there are some, and at most the fraction `limit` is
    `unreadable`."""
    return unreadable < rows and unreadable <= limit * rows
