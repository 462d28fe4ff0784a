"""Ctrl-C (SIGINT) and SIGTERM end a command within ten seconds: one sentence, exit code 130 or 143, nothing left.

    stopping.install()
    with stopping.exit_codes():
        command()

The first signal is a `KeyboardInterrupt` in the main thread, so that what is open is closed in its own order. What is
still busy eight seconds later, or when a second signal comes, is ended at once, together with all child processes.
The process ends by `os._exit`: at an ordinary exit Ray's objects, which the exception's frames still hold, would ask
for a Ray that has been shut down, and end the process with SIGSEGV.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RESUMABLE = "stopped; run the same command again to resume"
_GRACE_SECONDS = 8.0
_ECHO_SECONDS = 1.0  # a terminal and what started this process may both pass on one Ctrl-C


class Stopped(BaseException):
    """A `KeyboardInterrupt` on its way out: Typer would turn that one into an exit of its own."""


class _State:
    def __init__(self) -> None:
        self.signal: int | None = None  # the first that was handled
        self.seen: int | None = None  # the first that came; for moments Ray's handlers are installed instead
        self.since = 0.0
        self.is_over = False  # nothing is left that would close anything
        self.sentence: str | None = "stopped"
        self.stderr: int | None = None
        self.ending = threading.Lock()
        self.children: list[psutil.Process] = []


_state = _State()


def install() -> None:
    """Handle both signals from here on; once, in the main thread. An ignored signal stays ignored."""
    if _state.stderr is not None:
        return
    _state.stderr = os.dup(2)  # parts of Ray's start have fd 2 elsewhere
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    # Written to when a signal comes, also while the main thread is deep in native code and handles none.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_restore)
    threading.Thread(target=_watch, args=(reader,), name="stopping", daemon=True).start()


def say_at_stop(sentence: str | None) -> None:
    """Print this sentence when stopped from here on; None where the command prints its own."""
    _state.sentence = sentence


def is_asked() -> bool:
    """Whether a signal came that is to stop this command."""
    return _state.signal is not None or _state.seen is not None


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Around a command: whatever it raises after a signal ends the process with the signal's exit code."""
    try:
        yield
    except BaseException as error:
        is_stop = is_asked() or isinstance(error, KeyboardInterrupt | Stopped)
        if is_stop and not (isinstance(error, SystemExit) and error.code in (0, None)):
            _end()
        raise
    finally:
        _state.is_over = True


def _handle(number: int, frame: FrameType | None) -> None:
    if _state.is_over or (_state.signal is not None and time.monotonic() - _state.since > _ECHO_SECONDS):
        _end_now()
    if _state.signal is not None:
        return
    _state.signal, _state.since = number, time.monotonic()
    # What is cut off in the middle complains in logs, threads and finalizers; none of that is news.
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = _drop
    threading.excepthook = _drop
    raise KeyboardInterrupt


def _drop(details: object) -> None:
    """Print nothing."""


def _watch(reader: int) -> None:
    while _state.seen is None:
        _state.seen = next((number for number in os.read(reader, 64) if number in SIGNALS), None)
    with contextlib.suppress(Exception):
        _state.children = _children()
    time.sleep(_GRACE_SECONDS)
    _end_now()


def _restore() -> None:
    """In a forked child: it handles its signals as it likes."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_DFL)


def _end() -> NoReturn:
    """End in order: exit handlers first, then what is left of the child processes."""
    atexit._run_exitfuncs()
    _end_now()


def _end_now() -> NoReturn:
    _state.ending.acquire()  # never released: a second caller waits for the end
    with contextlib.suppress(Exception):
        _kill([*_children(), *_state.children])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if _state.sentence is not None and _state.stderr is not None:
        cursor = "\x1b[?25h" if os.isatty(_state.stderr) else ""  # which a progress bar hides
        with contextlib.suppress(OSError):
            os.write(_state.stderr, f"{cursor}{_state.sentence}\n".encode())
    os._exit(128 + (_state.signal or _state.seen or signal.SIGINT))


def _children() -> list[psutil.Process]:
    import psutil

    return psutil.Process().children(recursive=True)


def _kill(processes: list[psutil.Process]) -> None:
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.Error):  # `kill` checks that the id is still that process'
            process.kill()
    psutil.wait_procs(processes, timeout=0.5)
