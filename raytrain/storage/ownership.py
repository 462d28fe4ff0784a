"""A run folder has one owner at a time: the process whose record, `owner.json`, is in it.

    with owned(config.run_location, console.say):
        ...  # no other command writes there

The record is removed when the command ends. A record left by a killed process is ignored once the process is known to
be gone: it ran on this machine, and its id is unused or belongs to another process now. For an owner on another machine
only the lease decides: the owner touches its record every 20 s, and a record that has not been touched for 120 s, by
the storage's clock or by watching it, has expired. A folder below an owned one belongs to the same process.

On a disk two processes can't both create the record. Object stores have no exclusive write, so there it is written, and
read again a second later: of two concurrent writes, one survives. A process that finds another record in place of its
own stops.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

from raytrain.errors import OwnedError, RaytrainError
from raytrain.storage.artifacts import atomic_write_bytes, make_folder, storage_error
from raytrain.storage.filesystem import Fingerprint, fingerprint, remove_file, write_bytes
from raytrain.storage.leftovers import OWNER_FILE, remove_temporaries
from raytrain.storage.locations import is_uri
from raytrain.storage.owner import Owner, Record, read_record, write_owner

LEASE_SECONDS = 120.0
RENEW_SECONDS = 20.0
STOP_SECONDS = 30.0  # the time that a displaced owner has to notice and to stop its workers
_CHECK_SECONDS = 2.0
_SETTLE_SECONDS = 1.0
_DISPLACED = signal.SIGUSR2  # SIGINT may be ignored: shells start background jobs that way

Say = Callable[[str], None]
T = TypeVar("T")


class _Configuration(Protocol):
    @property
    def run_location(self) -> str: ...


class _Console(Protocol):
    def say(self, text: str) -> None: ...


class RunLock:
    """The ownership of the run folder at `location`, a path or a URI.

    `acquire` raises `OwnedError` if a live process owns it. `say` prints a line about each wait and each event that the
    user should know about.
    """

    def __init__(self, location: str, say: Say = lambda line: None) -> None:
        self.location, self._say = location, say
        self._path, self._is_remote = f"{location}/{OWNER_FILE}", is_uri(location)
        self._me = Owner.here()
        self._displaced_by: Record | None = None
        self._released, self._ending = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._renew, name="ownership", daemon=True)
        self._before: Callable[[int, FrameType | None], object] | int | None = None
        self._listens = False
        self.depth = 1

    # --- acquiring it

    def acquire(self, take_over: bool = False) -> None:
        """Own the folder; with `take_over`, even if a live process owns it. Waits for the lease of an owner on another
        machine to expire, unless it is renewed in the meantime."""
        if not self._is_remote:
            make_folder(Path(self.location))
        first: Record | None = None
        until = 0.0
        while True:
            with self._alone() as is_alone:
                record = read_record(self.location)
                if record is None or take_over or self._is_free(record, first, until):
                    if self._claim(record, is_alone):
                        break
                    continue
                if first is None:
                    first, until = record, time.monotonic() + LEASE_SECONDS - self._age(record)
                    left = max(0.0, until - time.monotonic())
                    self._say(f"  waiting for the lease of {record} to expire, {left:.0f} s, or to be renewed")
            time.sleep(min(_CHECK_SECONDS, max(0.0, until - time.monotonic())))
        self._listen()
        self._thread.start()
        if record is not None:
            self._succeed(record, take_over)

    def _is_free(self, record: Record, first: Record | None, until: float) -> bool:
        """Whether its owner is gone. Raises `OwnedError` if it is alive."""
        owner = record.owner
        if owner is not None and owner.is_local:
            if owner.is_gone:
                return True
            raise self._refusal(record)
        if first is not None and record != first:
            raise self._refusal(record)
        return first is not None and time.monotonic() >= until

    def _refusal(self, record: Record) -> OwnedError:
        return OwnedError(
            f"{self.location} has an owner, which may be writing to it",
            got=str(record),
            remedy="wait until it has ended, stop it, or take the folder from it with --take-over",
        )

    def _claim(self, record: Record | None, is_alone: bool) -> bool:
        """Replace `record` with this process' record; returns whether that worked."""
        data = write_owner(self._me)
        if self._is_remote:
            write_bytes(self._path, data)
        elif record is not None:
            atomic_write_bytes(Path(self._path), data)
        else:
            try:
                with open(self._path, "xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
            except OSError as error:
                Path(self._path).unlink(missing_ok=True)
                raise storage_error(self._path, error) from error
        if not is_alone:
            time.sleep(_SETTLE_SECONDS)
        return self._is_mine(read_record(self.location))

    def _succeed(self, record: Record, take_over: bool) -> None:
        """Wait for a displaced owner to stop, or clean up after a dead one."""
        owner = record.owner
        if owner is not None and owner.is_local and not owner.is_gone:
            self._say(
                f"  taking {self.location} over from {record}; waiting until it ends, {STOP_SECONDS:.0f} s at most"
            )
            until = time.monotonic() + STOP_SECONDS
            while time.monotonic() < until and not owner.is_gone:
                time.sleep(0.1)
        elif take_over and not (owner is not None and owner.is_gone) and self._age(record) < LEASE_SECONDS:
            self._say(f"  taking {self.location} over from {record}; it gets {STOP_SECONDS:.0f} s to notice")
            time.sleep(STOP_SECONDS)
        else:
            self._say(f"  {record} is gone and did not finish; resuming")
            if not self._is_remote:
                remove_temporaries(Path(self.location), before=time.time())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Inside the block no other process of this machine reads or writes the record; false if the filesystem can't
        lock."""
        if self._is_remote:
            yield False
            return
        with contextlib.ExitStack() as stack:
            is_alone = False
            with contextlib.suppress(OSError):  # NFS locks no folders
                handle = os.open(self.location, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
                is_alone = True
            yield is_alone

    # --- holding it

    def _renew(self) -> None:
        checked = touched = time.monotonic()
        interval = RENEW_SECONDS if self._is_remote else _CHECK_SECONDS
        while not self._released.wait(max(0.0, checked + interval - time.monotonic())):
            checked = time.monotonic()
            with contextlib.suppress(RaytrainError, OSError):  # unavailable storage; the next attempt may succeed
                record = read_record(self.location)
                if not self._is_mine(record):
                    self._displaced_by = record or Record(b"", None)
                    self._interrupt()
                    return
                if checked - touched >= RENEW_SECONDS - 0.5:
                    self._touch()
                    touched = checked

    def _is_mine(self, record: Record | None) -> bool:
        return record is not None and record.owner is not None and record.owner.token == self._me.token

    def _touch(self) -> None:
        if self._is_remote:
            write_bytes(self._path, write_owner(self._me))
        else:
            os.utime(self._path)  # never changes whose record it is

    def _interrupt(self) -> None:
        with self._ending:
            if not self._released.is_set() and self._listens:
                signal.pthread_kill(threading.main_thread().ident or 0, _DISPLACED)

    def _listen(self) -> None:
        """If this is the main thread, interrupt it as with Ctrl-C once another process has taken the folder."""
        if threading.current_thread() is not threading.main_thread():
            return

        def displaced(number: int, frame: FrameType | None) -> None:
            if self._displaced_by is not None:
                raise KeyboardInterrupt
            if callable(self._before):
                self._before(number, frame)

        self._before, self._listens = signal.signal(_DISPLACED, displaced), True

    def check(self) -> None:
        """Raises `OwnedError` if another process has taken the folder in the meantime."""
        if self._displaced_by is None:
            return
        removed = self._displaced_by.stamp is None
        raise OwnedError(
            f"{self.location} was taken over while this command wrote to it; it has stopped",
            got=f"no {OWNER_FILE}" if removed else str(self._displaced_by),
            remedy="let the new owner finish; then run the same command to resume",
        )

    def release(self) -> None:
        """End the ownership; a record that can't be removed is left, and later counts as that of a dead process."""
        with self._ending:
            self._released.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        if self._listens and threading.current_thread() is threading.main_thread():
            signal.signal(_DISPLACED, self._before or signal.SIG_DFL)
        with contextlib.suppress(RaytrainError, OSError), self._alone():
            if self._is_mine(read_record(self.location)):
                remove_file(self._path)

    # --- internals

    def _age(self, record: Record) -> float:
        """Seconds since a record was touched, by the storage's own clock; 0 if unknown."""
        probe = f"{self.location}/.owner.{secrets.token_hex(4)}"
        try:
            write_bytes(probe, b"now")
            return max(0.0, (_changed(fingerprint(probe)) - _changed(record.stamp)) / 1e9)
        except (RaytrainError, OSError, TypeError):
            return 0.0
        finally:
            with contextlib.suppress(RaytrainError):
                remove_file(probe)


_HELD: dict[str, RunLock] = {}
_HOLDING = threading.Lock()


@contextlib.contextmanager
def owned(location: str, say: Say = lambda line: None, take_over: bool = False) -> Iterator[None]:
    """Inside the block this process owns the run folder at `location` (a path or a URI) and everything below it. A
    nested call, also for a folder below, does nothing. Raises `OwnedError` where a living process owns the folder,
    unless it is to be taken over; and, as soon as that is noticed, where another takes it over meanwhile.
    """
    location = location.rstrip("/") if is_uri(location) else os.path.realpath(location)
    with _HOLDING:
        lock = next((held for at, held in _HELD.items() if f"{location}/".startswith(f"{at}/")), None)
        if lock is None:
            lock = RunLock(location, say)
            try:
                lock.acquire(take_over)
            except BaseException:
                lock.release()
                raise
            _HELD[location] = lock
        else:
            lock.depth += 1
    try:
        yield
        lock.check()
    except BaseException:
        lock.check()
        raise
    finally:
        with _HOLDING:
            lock.depth -= 1
            if lock.depth == 0:
                del _HELD[lock.location]
                lock.release()


def owning(function: Callable[..., T]) -> Callable[..., T]:
    """Own the run folder while the decorated function (of a configuration, a console and more) runs; adds the option
    `take_over`."""

    @functools.wraps(function)
    def call(
        config: _Configuration, console: _Console, *arguments: object, take_over: bool = False, **options: object
    ) -> T:
        with owned(config.run_location, console.say, take_over):
            return function(config, console, *arguments, **options)

    return call


def describe_owner(location: str) -> tuple[str, bool] | None:
    """A sentence on who owns a run folder, and whether the owner may be alive; None if it has no owner."""
    record = read_record(location if is_uri(location) else os.path.realpath(location))
    if record is None:
        return None
    if record.owner is not None and record.owner.is_gone:
        return f"{location} was left by {record}, which is gone; the next command resumes", False
    return f"{location} is owned by {record}", True


def _changed(stamp: Fingerprint | None) -> int:
    """When a file was modified. Raises `TypeError` if that is unknown."""
    if stamp is None or stamp.mtime_ns is None:
        raise TypeError("the storage has no modification times")
    return stamp.mtime_ns
