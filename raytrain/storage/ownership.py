"""A run folder has one owner at a time: the process whose record, `owner.json`, lies in it.

    with owned(config.run_location, console.say):
        ...  # no other command writes there

The record goes when the command ends. One that a killed process left is passed over where the process is known to be
gone: it ran on this machine, and its id is nobody's or another process' now. Of an owner elsewhere only the lease can
tell: the owner touches its record every 20 s, and one that is not touched for 120 s, by the clock of the storage or by
watching it, is nobody's. A folder below an owned one belongs to the same process.

On a disk two processes can't both get the record. Object stores have no exclusive write, so there it is written, and
read again a second later: of two that write within the same moment, one stands. Whoever finds another record in place
of its own stops.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import shlex
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pydantic

from raytrain.errors import OwnedError, RaytrainError
from raytrain.redaction import redacted
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, make_folder, storage_error
from raytrain.storage.filesystem import (
    StorageReadError,
    exists,
    fingerprint,
    is_uri,
    read_range,
    remove_file,
    write_bytes,
)
from raytrain.storage.leftovers import OWNER_FILE as FILE
from raytrain.storage.leftovers import remove_temporaries

LEASE_SECONDS = 120.0
RENEW_SECONDS = 20.0
STOP_SECONDS = 30.0  # what a displaced owner gets to notice and to end its workers
_LOOK_SECONDS = 2.0
_SETTLE_SECONDS = 1.0
_COMMAND_CHARACTERS = 200
_MOST_BYTES = 1 << 20
_DISPLACED = signal.SIGUSR2  # Ctrl-C may be ignored: shells start background jobs so

Say = Callable[[str], None]


@dataclass(frozen=True)
class Owner:
    """Who writes to a run folder: a process of a machine, `since` a time in UTC. `machine` names a boot and a space of
    process ids, `start` when in it the process began."""

    token: str
    host: str
    machine: str
    pid: int
    start: str
    command: str
    since: datetime

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        started = start_of(os.getpid()) or ""
        return cls(
            secrets.token_hex(8),
            socket.gethostname(),
            this_machine(),
            os.getpid(),
            started,
            _command(),
            datetime.now(UTC).replace(microsecond=0),
        )

    @property
    def is_local(self) -> bool:
        """Whether its process id means something here."""
        return (self.host, self.machine) == (socket.gethostname(), this_machine())

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to write no more: it has ended, or is this one, which could not remove it."""
        return self.is_local and (self.pid == os.getpid() or start_of(self.pid) != self.start)

    def __str__(self) -> str:
        since = self.since.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        shown = f"process {self.pid} on {self.host} (`{self.command}`, since {since})"
        return "".join(one if one.isprintable() else "?" for one in shown)  # a terminal obeys some characters


_RECORD = pydantic.TypeAdapter(Owner)


def write_owner(owner: Owner) -> bytes:
    """A record's bytes."""
    return canonical_json(_RECORD.dump_python(owner, mode="json"))


def read_owner(data: bytes) -> Owner | None:
    """The owner in a record's bytes, None where they are no record."""
    try:
        owner = _RECORD.validate_json(data)
        owner.since.astimezone()  # years at either end of the calendar have no local time
    except (ValueError, OverflowError, OSError):
        return None
    return owner if owner.pid > 0 else None


def this_machine() -> str:
    """Names this boot of this machine and this space of process ids, of which containers have their own."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"boot {psutil.boot_time():.0f}"


def start_of(pid: int) -> str | None:
    """When a process began, as text that tells it from a later one of the same id; None where it is no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except ProcessLookupError:
        return None
    except (OSError, IndexError):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                return f"{process.create_time():.0f}"
    return None


def _command() -> str:
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    text = redacted(shlex.join(["raytrain" if program == "__main__.py" else program, *sys.argv[1:]]))
    return text if len(text) <= _COMMAND_CHARACTERS else f"{text[:_COMMAND_CHARACTERS]}…"


@dataclass(frozen=True)
class Record:
    """What lies in a run folder: bytes, and what changes when they are touched."""

    data: bytes
    stamp: Any

    @property
    def owner(self) -> Owner | None:
        """None where the bytes can't be read as a record."""
        return read_owner(self.data)

    def __str__(self) -> str:
        return str(self.owner or f"a process that can't be told from {FILE}")


class RunLock:
    """The ownership of the run folder at `location`, a path or a URI.

    `acquire` raises `OwnedError` where a living process owns it. `say` gets a line for each thing that takes time or
    that a person should know.
    """

    def __init__(self, location: str, say: Say = lambda line: None) -> None:
        self.location, self._say = location, say
        self._path, self._is_remote = f"{location}/{FILE}", is_uri(location)
        self._me = Owner.here()
        self._displaced_by: Record | None = None
        self._released, self._ending = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._renew, name="ownership", daemon=True)
        self._before, self._listens = None, False
        self.depth = 1

    # --- getting it

    def acquire(self, take_over: bool = False) -> None:
        """Own the folder; with `take_over` also where a living process does. Waits for the lease of an owner elsewhere
        to expire, unless it is renewed meanwhile."""
        if not self._is_remote:
            make_folder(Path(self.location))
        first: Record | None = None
        until = 0.0
        while True:
            with self._alone() as is_alone:
                record = self._look()
                if record is None or take_over or self._is_free(record, first, until):
                    if self._claim(record, is_alone):
                        break
                    continue
                if first is None:
                    first, until = record, time.monotonic() + LEASE_SECONDS - self._age(record)
                    left = max(0.0, until - time.monotonic())
                    self._say(f"  waiting for the lease of {record} to expire, {left:.0f} s, or to be renewed")
            time.sleep(min(_LOOK_SECONDS, max(0.0, until - time.monotonic())))
        self._listen()
        self._thread.start()
        if record is not None:
            self._succeed(record, take_over)

    def _is_free(self, record: Record, first: Record | None, until: float) -> bool:
        """Whether its owner is no more. Raises `OwnedError` where it is alive."""
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
        """Put this process' record in the place of `record`; whether it stands there."""
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
        return self._is_mine(self._look())

    def _succeed(self, record: Record, take_over: bool) -> None:
        """Let a displaced owner come to its end, or clear up after a dead one."""
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
            self._say(f"  {record} is gone and did not finish; going on")
            if not self._is_remote:
                remove_temporaries(Path(self.location), before=time.time())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Within it no other process of this machine looks or claims; false where the filesystem can't tell."""
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

    # --- keeping it

    def _renew(self) -> None:
        looked = touched = time.monotonic()
        every = RENEW_SECONDS if self._is_remote else _LOOK_SECONDS
        while not self._released.wait(max(0.0, looked + every - time.monotonic())):
            looked = time.monotonic()
            with contextlib.suppress(RaytrainError, OSError):  # storage that is away; the next time may do better
                record = self._look()
                if not self._is_mine(record):
                    self._displaced_by = record or Record(b"", None)
                    self._interrupt()
                    return
                if looked - touched >= RENEW_SECONDS - 0.5:
                    self._touch()
                    touched = looked

    def _is_mine(self, record: Record | None) -> bool:
        return record is not None and record.owner is not None and record.owner.token == self._me.token

    def _touch(self) -> None:
        if self._is_remote:
            write_bytes(self._path, write_owner(self._me))
        else:
            os.utime(self._path)  # changes whose record it is in no case

    def _interrupt(self) -> None:
        with self._ending:
            if not self._released.is_set() and self._listens:
                signal.pthread_kill(threading.main_thread().ident, _DISPLACED)

    def _listen(self) -> None:
        """Have the main thread, where this is it, end as with Ctrl-C once the folder is another's."""
        if threading.current_thread() is not threading.main_thread():
            return

        def displaced(number: int, frame: Any) -> None:
            if self._displaced_by is not None:
                raise KeyboardInterrupt
            if callable(self._before):
                self._before(number, frame)

        self._before, self._listens = signal.signal(_DISPLACED, displaced), True

    def check(self) -> None:
        """Raises `OwnedError` where another process has taken the folder meanwhile."""
        if self._displaced_by is None:
            return
        removed = self._displaced_by.stamp is None
        raise OwnedError(
            f"{self.location} was taken over while this command wrote to it; it has stopped",
            got=f"no {FILE}" if removed else str(self._displaced_by),
            remedy="let the new owner finish; the same command goes on from there",
        )

    def release(self) -> None:
        """Own it no more; a record that can't be removed is left to be found dead."""
        with self._ending:
            self._released.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        if self._listens and threading.current_thread() is threading.main_thread():
            signal.signal(_DISPLACED, self._before or signal.SIG_DFL)
        with contextlib.suppress(RaytrainError, OSError), self._alone():
            if self._is_mine(self._look()):
                remove_file(self._path)

    # --- inside

    def _look(self) -> Record | None:
        return look_at(self.location)

    def _age(self, record: Record) -> float:
        """Seconds since a record was touched, by the storage's own clock; 0 where it can't be told."""
        probe = f"{self.location}/.owner.{secrets.token_hex(4)}"
        try:
            write_bytes(probe, b"now")
            return max(0.0, (fingerprint(probe)[1] - record.stamp[1]) / 1e9)
        except (RaytrainError, OSError, TypeError):
            return 0.0
        finally:
            with contextlib.suppress(RaytrainError):
                remove_file(probe)


def look_at(location: str) -> Record | None:
    """The record in a run folder, None where nobody owns it. Raises `StorageReadError` where that can't be told."""
    path = f"{location.rstrip('/')}/{FILE}"
    for attempt in range(3):
        try:
            if not _is_there(path):
                return None
            stamp = fingerprint(path)
            record = Record(read_range(path, 0, min(stamp[0], _MOST_BYTES)), stamp)
        except RaytrainError:  # it may have gone between two calls
            if attempt == 2:
                raise
            record = None
        if record is not None and record.owner is not None:
            return record
        time.sleep(0.05)  # a record is seen while it is written
    return record


def _is_there(path: str) -> bool:
    """Whether there is a record. Raises `StorageReadError` where something else has its name: no record could ever
    stand there, or it would be written where a link leads."""
    if is_uri(path):
        return exists(path)
    try:
        is_file = stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageReadError(
            f"can't read {path}", why=(error.strerror or str(error)).lower(), remedy="choose another folder (run.root)"
        ) from error
    if not is_file:
        raise StorageReadError(
            f"{path} is no file",
            why="raytrain notes there who owns the run folder",
            remedy="remove it, or choose another folder (run.root)",
        )
    return True


_HELD: dict[str, RunLock] = {}
_HOLDING = threading.Lock()


@contextlib.contextmanager
def owned(location: str, say: Say = lambda line: None, take_over: bool = False) -> Iterator[None]:
    """Within it this process owns the run folder at `location`, a path or a URI, and all below it.

    Within itself, and for a folder below, it does nothing. Raises `OwnedError` where a living process owns the folder,
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


def owning(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a configuration, a console and more, for whose time this process owns the run folder; it gets
    the option `take_over`."""

    @functools.wraps(function)
    def call(config: Any, console: Any, *arguments: Any, take_over: bool = False, **options: Any) -> Any:
        with owned(config.run_location, console.say, take_over):
            return function(config, console, *arguments, **options)

    return call


def describe_owner(location: str) -> tuple[str, bool] | None:
    """A sentence on who owns a run folder, and whether it may be alive; None where nobody does."""
    record = look_at(location if is_uri(location) else os.path.realpath(location))
    if record is None:
        return None
    if record.owner is not None and record.owner.is_gone:
        return f"{location} was left by {record}, which is gone; the next command goes on", False
    return f"{location} is owned by {record}", True
