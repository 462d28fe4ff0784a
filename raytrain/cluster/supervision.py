"""Makes sure a local Ray ends with its driver: starts the `supervisor` process, and lists what old sessions left
behind."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from raytrain.cluster import supervisor
from raytrain.cluster.sockets import ray_folders
from raytrain.storage.leftovers import Leftover, size_of
from raytrain.storage.owner import Owner, read_owner, this_machine, write_owner

NOTE = "raytrain.json"
_STARTED: list[subprocess.Popen[bytes]] = []  # keeps each supervisor that still runs from a ResourceWarning


@contextlib.contextmanager
def supervised(is_local: bool) -> Iterator[Callable[[str], None]]:
    """Context around a Ray that starts here (`is_local`): when the body or this process ends, its remaining processes
    are ended, and if the body succeeds, the session's folder is removed.

    The body passes the session's folder to the yielded function. A Ray that was joined is left alone.
    """
    if not is_local:
        yield lambda session: None
        return
    _STARTED[:] = [process for process in _STARTED if process.poll() is None]
    process = subprocess.Popen(
        [sys.executable, "-P", supervisor.__file__, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    _STARTED.append(process)
    pipe = process.stdin
    assert pipe is not None

    def send(line: str) -> None:
        with contextlib.suppress(OSError):  # the supervisor was killed: Ray runs unsupervised
            pipe.write(f"{line}\n".encode())
            pipe.flush()

    def report_session(session: str) -> None:
        send(session)
        with contextlib.suppress(OSError):
            (Path(session) / NOTE).write_bytes(write_owner(Owner.here()))

    try:
        yield report_session
        send(supervisor.DONE)
    finally:
        with contextlib.suppress(OSError):
            pipe.close()


def dead_sessions() -> Iterator[Leftover]:
    """Folders of local sessions that raytrain started on this machine and that have no running process."""
    over: dict[str, Owner] = {}
    for folder in sorted(path for root in ray_folders() for path in root.glob("session_*") if not path.is_symlink()):
        with contextlib.suppress(OSError):  # not raytrain's, or another user's
            owner = read_owner((folder / NOTE).read_bytes())
            if owner is not None and _is_over(owner):
                over[str(folder)] = owner
    in_use = {path for _, path in supervisor.written("|".join(map(re.escape, over)))} if over else set()
    for path, owner in over.items():
        if path not in in_use:
            yield Leftover(path, f"Ray's session of `{owner.command}`", size_of(Path(path)))


def _is_over(owner: Owner) -> bool:
    """Whether a session's driver has ended; a reboot ends it too."""
    boot, now = owner.machine.partition(" ")[0], this_machine().partition(" ")[0]
    if owner.pid == os.getpid():
        return False
    return owner.is_gone or (owner.host == socket.gethostname() and boot != now)
