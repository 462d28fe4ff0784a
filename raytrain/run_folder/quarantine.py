"""`quarantine.jsonl`: recordings that could not be read in training.

In a run folder at a URI each process writes its own file, and the driver merges them when training is over.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from raytrain.data.quarantine import Quarantine
from raytrain.storage.artifacts import atomic_write_bytes, lines_of, make_folder
from raytrain.storage.run_files import QUARANTINE
from raytrain.storage.run_store import RunStore

_FOLDER = "quarantine"


def open_quarantine(store: RunStore) -> Quarantine:
    """The file in which this process records broken recordings."""
    if not store.is_remote:
        return Quarantine(store.local / QUARANTINE)
    return Quarantine(make_folder(store.local / _FOLDER) / f"{socket.gethostname()}-{os.getpid()}.jsonl")


def share_quarantine(store: RunStore) -> None:
    """Upload this process's records to the run folder."""
    for path in (store.local / _FOLDER).glob(f"*-{os.getpid()}.jsonl") if store.is_remote else ():
        store.share(f"{_FOLDER}/{path.name}")


def gather_quarantine(store: RunStore) -> None:
    """Merge the records of all processes into `quarantine.jsonl`."""
    if not store.is_remote:
        return
    store.refresh_all(_FOLDER, "*.jsonl")
    lines = {line for path in (store.local / _FOLDER).glob("*.jsonl") for line in path.read_bytes().splitlines()}
    if lines:
        atomic_write_bytes(store.local / QUARANTINE, b"".join(line + b"\n" for line in sorted(lines)))


def num_quarantined(path: Path) -> int:
    """The number of distinct recordings in a quarantine file; several workers may record the same recording."""
    return len(set(lines_of(path)))
