"""Ctrl-C (SIGINT) and SIGTERM end a command within ten seconds: one message, exit code 130 or 143, nothing left behind.

    stopping.install()
    with stopping.exit_codes():
        command()

The first signal raises `KeyboardInterrupt` in the main thread, so that resources are closed in order. If the command is
still busy eight seconds later, or when a second signal arrives, it is ended immediately, together with all child
processes. The process ends with `os._exit`: at an ordinary exit, Ray objects that the exception's frames still hold
would call a Ray that has been shut down, and crash the process with SIGSEGV.
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
_ECHO_SECONDS = 1.0  # a terminal and the parent process may both forward one Ctrl-C


class Stopped(BaseException):
    """Stands for a `KeyboardInterrupt`, which Typer would turn into its own kind of exit."""


class _State:
    def __init__(self) -> None:
        self.signal: int | None = None  # the first signal that was handled
        self.seen: int | None = None  # the first signal that arrived, even while Ray's handlers are installed
        self.since = 0.0
        self.is_over = False  # cleanup is finished
        self.sentence: str | None = "stopped"
        self.stderr: int | None = None
        self.ending = threading.Lock()
        self.children: list[psutil.Process] = []


_state = _State()


def install() -> None:
    """Handle both signals from now on; call once, in the main thread. An ignored signal stays ignored."""
    if _state.stderr is not None:
        return
    _state.stderr = os.dup(2)  # fd 2 is redirected during parts of Ray's startup
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    # Written to when a signal arrives, even while the main thread is in native code and can't handle it.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_restore)
    threading.Thread(target=_watch, args=(reader,), name="stopping", daemon=True).start()


def say_at_stop(sentence: str | None) -> None:
    """Print this message when stopped from now on; None if the command prints its own."""
    _state.sentence = sentence


def is_asked() -> bool:
    """Whether a signal to stop this command has arrived."""
    return _state.signal is not None or _state.seen is not None


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Context around a command: any exception after a signal ends the process with the signal's exit code."""
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
    # Interrupted work causes errors in logs, threads and finalizers, all of which are expected.
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
    """In a forked child: restore default signal handling."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_DFL)


def _end() -> NoReturn:
    """Exit in order: exit handlers first, then the remaining child processes."""
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
        cursor = "\x1b[?25h" if os.isatty(_state.stderr) else ""  # a progress bar hides the cursor
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
