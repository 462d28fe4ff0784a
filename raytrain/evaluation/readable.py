"""When a score of the readable recordings may stand for all of them."""

from __future__ import annotations


def are_enough_readable(unreadable: int, rows: int, limit: float) -> bool:
    """Whether a score of the readable rows is that of all `rows`: there are any, and no more than the share `limit` of
    all is `unreadable`."""
    return unreadable < rows and unreadable <= limit * rows
