"""`quarantine.jsonl`: recordings that could not be read in training.

In a run folder at a URI each process writes a file of its own, which the driver puts together when training is over.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from raytrain.data.quarantine import Quarantine
from raytrain.storage.artifacts import atomic_write_bytes, lines_of, make_folder
from raytrain.storage.run_store import RunStore

QUARANTINE = "quarantine.jsonl"
_FOLDER = "quarantine"


def open_quarantine(store: RunStore) -> Quarantine:
    """Where this process names broken recordings."""
    if not store.is_remote:
        return Quarantine(store.local / QUARANTINE)
    return Quarantine(make_folder(store.local / _FOLDER) / f"{socket.gethostname()}-{os.getpid()}.jsonl")


def share_quarantine(store: RunStore) -> None:
    """Put the recordings that this process named where the run folder is."""
    for path in (store.local / _FOLDER).glob(f"*-{os.getpid()}.jsonl") if store.is_remote else ():
        store.share(f"{_FOLDER}/{path.name}")


def gather_quarantine(store: RunStore) -> None:
    """Put the recordings that all processes named into `quarantine.jsonl`."""
    if not store.is_remote:
        return
    store.refresh_all(_FOLDER, "*.jsonl")
    lines = {line for path in (store.local / _FOLDER).glob("*.jsonl") for line in path.read_bytes().splitlines()}
    if lines:
        atomic_write_bytes(store.local / QUARANTINE, b"".join(line + b"\n" for line in sorted(lines)))


def num_quarantined(path: Path) -> int:
    """Recordings that a quarantine file names; several workers may name the same one."""
    return len(set(lines_of(path)))
