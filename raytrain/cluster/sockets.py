"""Where a local Ray puts its sockets: a Unix socket's path has at most 107 bytes, and Ray's folders below TMPDIR take
64 of them."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

from raytrain.errors import ClusterError

LONGEST = 43  # bytes of the folder's name: 107 less /session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store
_LOG = logging.getLogger("raytrain.cluster")


def socket_folder() -> str:
    """The folder for `ray.init`, which by default uses TMPDIR even if that does not exist or has a name that its native
    code can't read. Raises `ClusterError` if no folder is both short enough and writable."""
    default = os.path.join(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray")
    problem = "too long a name" if len(os.fsencode(default)) > LONGEST else _problem(default)
    if problem is None:
        return default
    folders = short_folders()
    for folder in folders:
        if len(os.fsencode(folder)) <= LONGEST and folder.isascii() and _is_mine(Path(folder).parent):
            _LOG.warning("%s has %s for Ray's sockets: they are in %s", default, problem, folder)
            return folder
    raise ClusterError(
        "no usable folder for Ray's sockets",
        got=f"{default}, a name of {len(os.fsencode(default))} bytes",
        allowed=f"{LONGEST} bytes of ASCII, since socket paths have at most 107",
        why=f"none of {', '.join(folders)} can be used either",
        remedy="set TMPDIR to a folder with a shorter name that this user can write to",
    )


def _problem(folder: str) -> str | None:
    """Why Ray could not use the folder, or None."""
    if not folder.isascii():
        return "non-ASCII characters"
    existing = next(path for path in (folder, *map(str, Path(folder).absolute().parents)) if os.path.exists(path))
    usable = os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)
    return None if usable else "no folder that this user can write to"


def short_folders() -> list[str]:
    """Folders with short names, in the order they are tried."""
    parents = ["/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR"), "/dev/shm"]
    # Ray makes its folder accessible to everyone, so it is put inside a private one.
    return [os.path.join(parent, f"raytrain-{os.getuid()}", "r") for parent in parents if parent]


def ray_folders() -> list[Path]:
    """Folders in which a Ray started on this machine puts its sessions."""
    parents = (os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR"), tempfile.gettempdir(), "/tmp")
    folders = [Path(parent) / "ray" for parent in parents if parent]
    return sorted({folder.resolve() for folder in (*folders, *map(Path, short_folders()))})


def _is_mine(folder: Path) -> bool:
    """Create the private folder; false if that is impossible, or if another user could change its contents."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return private and os.access(folder, os.W_OK | os.X_OK)
