"""Who writes to a run folder: the record `owner.json` in it, and how to read it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import socket
import stat
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pydantic

from raytrain.errors import RaytrainError, system_reason
from raytrain.redaction import redacted
from raytrain.storage.artifacts import canonical_json
from raytrain.storage.filesystem import Fingerprint, exists, fingerprint, read_range
from raytrain.storage.leftovers import OWNER_FILE
from raytrain.storage.locations import StorageReadError, is_uri

_COMMAND_CHARACTERS = 200
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Owner:
    """Who writes to a run folder: a process on a machine, `since` a time in UTC. `machine` identifies a boot and a PID
    namespace, `start` the time in it at which the process started."""

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
        """Whether its process id is valid on this machine."""
        return (self.host, self.machine) == (socket.gethostname(), this_machine())

    @property
    def is_gone(self) -> bool:
        """Whether the process has certainly stopped writing: it ended, or it is this process, which could not remove
        its record."""
        return self.is_local and (self.pid == os.getpid() or start_of(self.pid) != self.start)

    def __str__(self) -> str:
        since = self.since.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        shown = f"process {self.pid} on {self.host} (`{self.command}`, since {since})"
        return "".join(character if character.isprintable() else "?" for character in shown)  # terminals obey these


_RECORD = pydantic.TypeAdapter(Owner)


def write_owner(owner: Owner) -> bytes:
    """A record's bytes."""
    return canonical_json(_RECORD.dump_python(owner, mode="json"))


def read_owner(data: bytes) -> Owner | None:
    """The owner in a record's bytes, None if they are not a valid record."""
    try:
        owner = _RECORD.validate_json(data)
        owner.since.astimezone()  # years at the limits of the calendar have no local time
    except (ValueError, OverflowError, OSError):
        return None
    return owner if owner.pid > 0 else None


def this_machine() -> str:
    """Identifies this boot of this machine and this PID namespace; containers have their own."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"boot {psutil.boot_time():.0f}"


def start_of(pid: int) -> str | None:
    """When a process started, as text that distinguishes it from a later process with the same id; None if it has
    ended."""
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
    """A record as stored in a run folder: its bytes, and a stamp that changes when it is touched."""

    data: bytes
    stamp: Fingerprint | None

    @property
    def owner(self) -> Owner | None:
        """None if the bytes can't be parsed as a record."""
        return read_owner(self.data)

    def __str__(self) -> str:
        return str(self.owner or f"a process that {OWNER_FILE} does not name")


def read_record(location: str) -> Record | None:
    """The record in a run folder, None if it has no owner. Raises `StorageReadError` if that can't be determined."""
    path = f"{location.rstrip('/')}/{OWNER_FILE}"
    for attempt in range(3):
        try:
            if not _is_there(path):
                return None
            stamp = fingerprint(path)
            size = min(stamp.size, _MOST_BYTES) if stamp else 0
            record: Record | None = Record(read_range(path, 0, size), stamp)
        except RaytrainError:  # it may have been removed between two calls
            if attempt == 2:
                raise
            record = None
        if record is not None and record.owner is not None:
            return record
        time.sleep(0.05)  # the record may be half written
    return record


def _is_there(path: str) -> bool:
    """Whether there is a record. Raises `StorageReadError` if something else has its name: a record could never be
    written there, or a link would redirect it."""
    if is_uri(path):
        return exists(path)
    try:
        is_file = stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageReadError(
            f"can't read {path}", why=system_reason(error), remedy="choose another folder (run.root)"
        ) from error
    if not is_file:
        raise StorageReadError(
            f"{path} is not a file",
            why="raytrain records the owner of the run folder there",
            remedy="remove it, or choose another folder (run.root)",
        )
    return True
