"""Threads beside a block of code: `repeating` calls a function, `telling` says what the block waits for."""

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
EVERY_SECONDS = 60.0
_END = object()


@contextlib.contextmanager
def repeating(function: Callable[[], object], seconds: float, name: str = "progress") -> Iterator[None]:
    """While the body runs, a thread calls `function` every `seconds`, and once more when the body has ended."""
    stopped = threading.Event()

    def repeat() -> None:
        while True:
            is_last = stopped.wait(seconds)
            function()
            if is_last:
                return

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(timeout=10)


@contextlib.contextmanager
def telling(what: str | Callable[[], str], after: float | None = None, every: float = EVERY_SECONDS) -> Iterator[None]:
    """Say on standard error what the body waits for (`what` may be asked anew each time) when it has taken `after`
    seconds (10 if left out), and `every` so many again."""
    stderr, ended, start = os.dup(2), threading.Event(), time.monotonic()  # the body may have fd 2 elsewhere

    def watch() -> None:
        pause = AFTER_SECONDS if after is None else after
        while not ended.wait(pause):
            with contextlib.suppress(Exception):  # to ask may fail while what is waited for is away
                text = what if isinstance(what, str) else what()
                tell(text, time.monotonic() - start, stderr)
            pause = every

    thread = threading.Thread(target=watch, name="telling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=1)
        if not thread.is_alive():
            os.close(stderr)


def told(items: Iterable[T], what: str | Callable[[], str]) -> Iterator[T]:
    """The items; each that is long in coming is told of."""
    iterator = iter(items)
    while True:
        with telling(what):
            item: Any = next(iterator, _END)
        if item is _END:
            return
        yield item


def tell(what: str, seconds: float, descriptor: int = 2) -> None:
    """One line about a wait that has taken `seconds` so far."""
    os.write(descriptor, redacted(f"  waiting for {what}; {seconds:.0f} s so far\n").encode())
