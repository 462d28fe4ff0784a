"""Retry a filesystem that can't be reached or can't answer now; what it refuses is an error at once."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from raytrain.errors import DataError, StorageError
from raytrain.waiting import AFTER_SECONDS, INTERVAL_SECONDS, report_wait

P = ParamSpec("P")
T = TypeVar("T")
PATIENCE_VARIABLE = "RAYTRAIN_STORAGE_PATIENCE"
# Messages by which filesystems report that they are unavailable, not that the request is wrong.
_AWAY = re.compile(
    r"NETWORK_CONNECTION|curlCode|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT"
    r"|HTTP status 5\d\d|timed? ?out|connection (?:refused|reset|aborted|closed)|can't connect|couldn't connect"
    r"|temporarily unavailable|name resolution",
    re.IGNORECASE,
)


def is_away(error: BaseException) -> bool:
    """Whether an error means that a filesystem is temporarily unavailable, so that a retry may help."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    return isinstance(error, ConnectionError | TimeoutError) or bool(_AWAY.search(str(error)))


def patiently(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call an idempotent function again until its filesystem is available, or patience is exhausted.

    Raises what the function raises.
    """
    until = time.monotonic() + float(os.environ.get(PATIENCE_VARIABLE) or 120)
    wait, next_message, start = 0.25, AFTER_SECONDS, time.monotonic()
    while True:
        try:
            return function(*arguments, **options)
        except (OSError, DataError, StorageError) as error:
            if not is_away(error) or time.monotonic() + wait > until:
                raise
            if time.monotonic() - start > next_message:
                next_message += INTERVAL_SECONDS
                report_wait(f"storage to answer ({' '.join(str(error).split())[:200]})", time.monotonic() - start)
        time.sleep(wait * random.uniform(0.5, 1.5))  # many workers retry at the same time
        wait = min(2 * wait, 8.0)
