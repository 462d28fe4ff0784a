"""Do something every few seconds beside a block of code."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


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
