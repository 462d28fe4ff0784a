"""Ends a local Ray with its driver, even if the driver was killed: `python -P supervisor.py DRIVER`, a separate
process.

The kernel ends the driver's direct children, Ray's servers. Their children, agents and workers, may run forever.
Standard input is a pipe that only the driver writes to: first the session's folder, once Ray has created it, and
finally `done` if everything succeeded and the folder is not needed anymore; the pipe closes with the driver or the
session. A process belongs to the session if it writes to a file in that folder; the driver, and drivers that joined,
also write there, to files with distinct names.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

DONE = "done"
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 3.0  # for the processes of a session that was shut down to exit by themselves
_ROUNDS = 20
_ROUND_SECONDS = 0.25
_DRIVERS_LOG = "python-core-driver"


def wait_for_end(driver: int) -> tuple[list[str], bool]:
    """The lines that the driver sent, and whether it died; returns when the session is over."""
    received = b""
    while os.getppid() == driver:
        if select.select([0], [], [], _POLL_SECONDS)[0]:
            data = os.read(0, 4096)
            if not data:
                time.sleep(0.1)  # a killed process closes its files before it disappears
                break
            received += data
    return received.decode().splitlines(), os.getppid() != driver


def written(folder: str, since: float = 0.0) -> Iterator[tuple[psutil.Process, str]]:
    """(process, path) for processes started after a time in seconds that write to a file in a folder whose path matches
    the regular expression `folder`; a process with several such files appears several times."""
    import psutil

    for process in psutil.process_iter(["create_time"]):
        try:
            if process.pid == os.getpid() or (process.info["create_time"] or 0.0) < since:
                continue
            for file in process.open_files():
                match = re.match(f"({folder})/", file.path)
                is_drivers = os.path.basename(file.path).startswith(_DRIVERS_LOG)
                if match and getattr(file, "mode", "w") != "r" and not is_drivers:
                    yield process, match[1]
        except (psutil.Error, OSError):  # it just ended, or belongs to another user
            continue


def main() -> None:
    """See the module's docstring."""
    driver, began = int(sys.argv[1]), time.time() - 2
    lines, is_dead = wait_for_end(driver)
    session = lines[0] if lines else ""
    if not session and not is_dead:
        return  # Ray did not start
    if not is_dead:
        time.sleep(_GRACE_SECONDS)
    folder = re.escape(os.path.realpath(session)) if session else rf".*/session_[\d_-]+_{driver}"
    for _ in range(_ROUNDS):
        alive = {process for process, _ in written(folder, began)}
        if not alive:
            break
        for process in alive:
            try:
                process.kill()
            except Exception:  # noqa: S112, BLE001
                continue
        time.sleep(_ROUND_SECONDS)
    if lines[1:] == [DONE]:
        shutil.rmtree(session, ignore_errors=True)


if __name__ == "__main__":
    main()
