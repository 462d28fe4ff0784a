"""Background threads for a block of code: `repeating` calls a function, `reporting_wait` says what the block waits
for."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from raytrain.redaction import redacted

T = TypeVar("T")
AFTER_SECONDS = 10.0
INTERVAL_SECONDS = 60.0
_END = object()


@contextlib.contextmanager
def repeating(
    function: Callable[[], float | None],
    seconds: float,
    *,
    name: str = "progress",
    first: float | None = None,
    at_end: bool = True,
    join_seconds: float | None = 10.0,
) -> Iterator[threading.Thread]:
    """While the body runs, a thread calls `function` every `seconds`, or after the number of seconds that it returns.

    The first call comes after `first` seconds, if given; with `at_end` there is another call when the body has ended,
    for which the exit waits `join_seconds` at most (None: as long as it takes).
    """
    stopped = threading.Event()

    def repeat() -> None:
        pause = seconds if first is None else first
        while not stopped.wait(pause):
            pause = function() or seconds
        if at_end:
            function()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        stopped.set()
        thread.join(join_seconds)


@contextlib.contextmanager
def reporting_wait(
    what: str | Callable[[], str], after: float | None = None, interval: float = INTERVAL_SECONDS
) -> Iterator[None]:
    """Report on standard error what the body waits for (`what` may be a function, called each time) once it has taken
    `after` seconds (10 if left out), and again every `interval` seconds."""
    stderr, start = os.dup(2), time.monotonic()  # the body may redirect fd 2

    def say() -> None:
        with contextlib.suppress(Exception):  # `what` may fail while the awaited service is unavailable
            text = what if isinstance(what, str) else what()
            report_wait(text, time.monotonic() - start, stderr)

    first = AFTER_SECONDS if after is None else after
    try:
        with repeating(say, interval, name="waiting", first=first, at_end=False, join_seconds=1) as thread:
            yield
    finally:
        if not thread.is_alive():
            os.close(stderr)


def report_waits(items: Iterable[T], what: str | Callable[[], str]) -> Iterator[T]:
    """The items; a long wait for one of them is reported."""
    iterator = iter(items)
    while True:
        with reporting_wait(what):
            item: Any = next(iterator, _END)
        if item is _END:
            return
        yield item


def report_wait(what: str, seconds: float, descriptor: int = 2) -> None:
    """One line about a wait that has taken `seconds` so far."""
    os.write(descriptor, redacted(f"  waiting for {what}; {seconds:.0f} s so far\n").encode())
