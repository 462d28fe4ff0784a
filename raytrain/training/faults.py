"""What training keeps in `faults/` so that the next attempt does better: batches that did not fit, deaths, stalls.

    faults/lowered-….json     a bucket whose step ran out of memory, and the batch size that it may have from now on
    faults/doing-RANK         step and bucket that a rank is in; what it leaves behind if it is killed
    faults/deaths.json        how often an attempt was killed while in a bucket
    faults/stalled-….json     what a rank that made no progress was doing

A step that runs out of GPU memory says so itself. A process that the system kills for host memory can't: where
attempts died twice in the same bucket, that bucket is lowered too, for a process that is killed in the same place twice
is seldom chance.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from raytrain.artifacts import atomic_write_bytes, canonical_json, make_folder

_MARK = 64  # bytes
_DEATHS_TO_LOWER = 2


class FaultNotes:
    """Notes of one run. `profile_id` names the batch profile that they are about: those of another one do not count."""

    def __init__(self, folder: Path, profile_id: str, rank: int = 0) -> None:
        self._folder, self._profile_id, self._rank = make_folder(Path(folder)), profile_id, rank
        self._mark: mmap.mmap | None = None

    def lower(self, bucket: int, failed_size: int, why: str) -> int:
        """Note that `failed_size` utterances of a bucket did not fit; returns what it may have, at least 1."""
        size = max(1, min(failed_size - 1, int(failed_size * 0.95)))
        body = {"bucket": bucket, "failed": failed_size, "batch_size": size, "why": why, "profile": self._profile_id}
        atomic_write_bytes(self._folder / f"lowered-{time.time_ns()}-{self._rank}.json", canonical_json(body))
        return size

    def lowered(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Batch sizes by bucket, lowered where notes say so."""
        result = list(sizes)
        for note in self._notes("lowered-*.json"):
            if note["profile"] == self._profile_id and note["bucket"] < len(result):
                result[note["bucket"]] = min(result[note["bucket"]], note["batch_size"])
        return tuple(result)

    def reasons(self) -> list[str]:
        """Why batch sizes were lowered, oldest first."""
        return [
            f"bucket {note['bucket']} takes {note['batch_size']} utterances instead of {note['failed']}: {note['why']}"
            for note in self._notes("lowered-*.json")
            if note["profile"] == self._profile_id
        ]

    def stalls(self, since: float) -> list[str]:
        """What ranks were doing that made no progress, from `since` (seconds of `time.time`) on."""
        return [note["doing"] for note in self._notes("stalled-*.json") if note["time"] >= since]

    def note_stall(self, doing: str) -> None:
        """Note that this rank makes no progress."""
        body = {"doing": f"worker {self._rank}: {doing}", "time": time.time()}
        atomic_write_bytes(self._folder / f"stalled-{time.time_ns()}-{self._rank}.json", canonical_json(body))

    @contextlib.contextmanager
    def marking(self) -> Iterator[Callable[[int, int, int], None]]:
        """Gives a function that notes (step, bucket, batch size) of the step that begins. Whoever leaves the block,
        also by an error, was not killed, and leaves no mark."""
        path = self._folder / f"doing-{self._rank}"
        path.write_bytes(b" " * _MARK)
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), _MARK) as mark:

            def write(step: int, bucket: int, size: int) -> None:
                mark[:] = f"{step} {bucket} {size}".ljust(_MARK).encode()  # memory only: the kernel keeps it

            try:
                yield write
            finally:
                path.unlink(missing_ok=True)

    def learn_from_deaths(self) -> None:
        """Count what the last attempt was killed in, and lower a bucket that was so twice. For one rank to call before
        any marks."""
        marks = [path.read_bytes().split() for path in self._folder.glob("doing-*")]
        for path in self._folder.glob("doing-*"):
            path.unlink(missing_ok=True)
        found = [tuple(map(int, mark)) for mark in marks if len(mark) == 3]
        if not found:
            return
        _, bucket, size = max(found)
        path = self._folder / "deaths.json"
        try:
            deaths = json.loads(path.read_bytes())
        except (OSError, ValueError):
            deaths = {}
        key = f"{self._profile_id} {bucket}"
        deaths[key] = deaths.get(key, 0) + 1
        if deaths[key] >= _DEATHS_TO_LOWER and size > 1:
            deaths[key] = 0
            self.lower(bucket, size, f"workers were killed {_DEATHS_TO_LOWER} times in this bucket")
        atomic_write_bytes(path, canonical_json(deaths))

    def _notes(self, pattern: str) -> Iterator[dict[str, Any]]:
        for path in sorted(self._folder.glob(pattern)):
            with contextlib.suppress(OSError, ValueError):
                yield json.loads(path.read_bytes())


class Watchdog:
    """Ends this process when nothing has happened for `seconds`: a worker that hangs in a call can't be woken.

    `beat(doing)` says that something happens. `on_stall` is told what was going on last.
    """

    def __init__(self, seconds: float, on_stall: Callable[[str], None], end: Callable[[int], Any] = os._exit) -> None:
        self._seconds, self._on_stall, self._end = seconds, on_stall, end
        self._last, self._doing = time.monotonic(), "starting"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """Something happens."""
        self._last, self._doing = time.monotonic(), doing

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(5.0, self._seconds / 4)):
            quiet = time.monotonic() - self._last
            if quiet > self._seconds:
                message = f"{self._doing} for {quiet:.0f} s"
                print(f"raytrain: no progress, {message}; this worker ends", file=sys.stderr, flush=True)
                self._on_stall(message)
                self._end(70)
                return
