"""Notes in `faults/` from which the next attempt learns: batches that did not fit, killed workers, stalls.

    faults/lowered-….json      a bucket whose step ran out of memory, and the batch size that it may have from now on
    faults/validation-….json   validation ran out of memory, and the batch size that it may have from now on
    faults/doing-RANK          what a rank is doing: left behind if its process is killed
    faults/killed-for-memory   Ray's memory monitor ended the last attempt
    faults/stalled-….json      what a rank that made no progress was doing

A step that runs out of GPU memory says so itself. A process that is killed for host memory can't; but Ray's monitor
raises a recognizable error, and the kernel counts its out-of-memory kills (`oom_kill` in `/proc/vmstat`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raytrain.storage.artifacts import (
    atomic_write_bytes,
    canonical_json,
    is_count,
    is_number,
    make_folder,
    parse_json,
    read_at_once,
)

_MARK = 256  # bytes
# A rank's activity other than a step, in place of the step's bucket.
VALIDATION, SAVING = -1, -2
KILLED_FOR_MEMORY = "killed-for-memory"


def kills_for_memory() -> tuple[str, int]:
    """This machine's name, and its kernel's count of out-of-memory kills; 0 if unknown."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return socket.gethostname(), int(line.split()[1])
    return socket.gethostname(), 0


class FaultNotes:
    """Notes of one run. `profile_id` is the batch profile that they refer to: notes on another profile are ignored.

    `on_written` and `on_removed` get each note's path, to replicate it for other machines; marks are local to this
    machine."""

    def __init__(
        self,
        folder: Path,
        profile_id: str,
        rank: int = 0,
        on_written: Callable[[Path], object] = lambda path: None,
        on_removed: Callable[[Path], object] = lambda path: None,
    ) -> None:
        self._folder, self._profile_id, self._rank = make_folder(Path(folder)), profile_id, rank
        self._on_written, self._on_removed = on_written, on_removed
        self._mark: mmap.mmap | None = None

    def lower(self, bucket: int, failed_size: int, why: str) -> int:
        """Record that `failed_size` utterances of a bucket did not fit; returns the new batch size, at least 1."""
        size = max(1, min(failed_size - 1, int(failed_size * 0.95)))
        body = {"bucket": bucket, "failed": failed_size, "batch_size": size, "why": why, "profile": self._profile_id}
        self._write(f"lowered-{time.time_ns()}-{self._rank}.json", canonical_json(body))
        return size

    def lowered(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Batch sizes by bucket, lowered according to the notes."""
        result = list(sizes)
        for note in self._notes("lowered-*.json", _LOWERED):
            if note["profile"] == self._profile_id and note["bucket"] < len(result):
                result[note["bucket"]] = min(result[note["bucket"]], note["batch_size"])
        return tuple(result)

    def lower_validation(self, failed_size: int) -> int:
        """Record that validation with `failed_size` utterances at a time ran out of memory; returns the new batch
        size."""
        size = max(1, failed_size // 2)
        self._write(f"validation-{time.time_ns()}-{self._rank}.json", canonical_json({"batch_size": size}))
        return size

    def validation_size(self, size: int) -> int:
        """The batch size of validation, lowered according to the notes."""
        return min([size, *(note["batch_size"] for note in self._notes("validation-*.json", _VALIDATION))])

    def reasons(self) -> list[str]:
        """Why batch sizes were lowered, oldest first."""
        return [
            f"bucket {note['bucket']} takes {note['batch_size']} utterances instead of {note['failed']}: {note['why']}"
            for note in self._notes("lowered-*.json", _LOWERED)
            if note["profile"] == self._profile_id
        ]

    def stalls(self, since: float) -> list[str]:
        """What stalled ranks were doing, since the time `since` (as `time.time`)."""
        return [note["doing"] for note in self._notes("stalled-*.json", _STALLED) if note["time"] >= since]

    def note_stall(self, doing: str) -> None:
        """Record that this rank makes no progress."""
        body = {"doing": f"worker {self._rank}: {doing}", "time": time.time()}
        self._write(f"stalled-{time.time_ns()}-{self._rank}.json", canonical_json(body))

    def note_kill_for_memory(self) -> None:
        """Record that the last attempt ended because a worker ran out of host memory and was killed."""
        self._write(KILLED_FOR_MEMORY, b"")

    def _write(self, name: str, data: bytes) -> None:
        atomic_write_bytes(self._folder / name, data)
        self._on_written(self._folder / name)

    @contextlib.contextmanager
    def marking(self) -> Iterator[Callable[[int | None, int, int], None]]:
        """Yields a function that marks (step, bucket, batch size) of the step that begins, or later `VALIDATION` or
        `SAVING` as the bucket and None as the step. A process that leaves the block, even by an error, was not killed,
        so its mark is removed."""
        path = self._folder / f"doing-{self._rank}"
        path.write_bytes(b" " * _MARK)
        machine, kills = kills_for_memory()
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), _MARK) as mark:
            last_step = 0

            def write(step: int | None, bucket: int, size: int) -> None:
                nonlocal last_step
                last_step = last_step if step is None else step
                text = f"{os.getpid()} {last_step} {bucket} {size} {kills} {machine}"
                mark[:] = text.encode()[:_MARK].ljust(_MARK)  # a memory-mapped write: the kernel keeps it

            try:
                yield write
            finally:
                path.unlink(missing_ok=True)

    def take_marks(self) -> list[str]:
        """What ranks on this machine were doing when they were killed; removes the marks."""
        marks = []
        for path in self._folder.glob("doing-*"):
            with contextlib.suppress(FileNotFoundError):  # another rank takes it
                marks.append(read_at_once(path).decode(errors="replace"))
                path.unlink()
        return marks

    def learn_from_deaths(self, kills: Mapping[str, int], marks: Iterable[str]) -> None:
        """Lower the batch size of the last attempt's bucket or validation if one of its processes was killed for
        memory; if it was saving, there is nothing to lower. `kills` (see `kills_for_memory`) and `marks` (see
        `take_marks`) are of all machines. Only one rank calls it, before any rank marks."""
        killed = self._folder / KILLED_FOR_MEMORY
        by_monitor = killed.exists()
        if by_monitor:
            killed.unlink()
            self._on_removed(killed)
        killed_steps = [
            (step, bucket, size)
            for step, bucket, size, before, machine in _marks_of(marks)
            if by_monitor or kills.get(machine, 0) > before
        ]
        if not killed_steps:
            return
        # Ranks proceed together after a step.
        _, bucket, size = max(killed_steps, key=lambda mark: (mark[0], -mark[1]))
        if bucket == VALIDATION:
            self.lower_validation(max(1, size))
        elif bucket >= 0 and size > 1:
            self.lower(bucket, size, "a worker ran out of host memory and was killed")

    def _notes(self, pattern: str, fields: Mapping[str, Callable[[Any], bool]]) -> Iterator[dict[str, Any]]:
        """Notes with these fields; unreadable and other files are skipped."""
        for path in sorted(self._folder.glob(pattern)):
            try:
                note = parse_json(read_at_once(path))
            except (OSError, ValueError):
                continue
            if isinstance(note, dict) and all(fits(note.get(name)) for name, fits in fields.items()):
                yield note


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_size(value: object) -> bool:
    return is_count(value, least=1)


_LOWERED = {"bucket": is_count, "failed": is_count, "batch_size": _is_size, "why": _is_text, "profile": _is_text}
_VALIDATION = {"batch_size": _is_size}
_STALLED = {"doing": _is_text, "time": is_number}


def _marks_of(texts: Iterable[str]) -> Iterator[tuple[int, int, int, int, str]]:
    """(step, bucket, batch size, kills before, machine) of each mark; torn marks are skipped."""
    for text in texts:
        parts = text.split()
        if len(parts) == 6:
            with contextlib.suppress(ValueError):
                step, bucket, size, kills = map(int, parts[1:5])
                yield step, bucket, size, kills, parts[5]


class Watchdog:
    """Ends this process when nothing has happened for `seconds`: a worker that hangs in a call can't be interrupted.
    `beat(doing)` reports activity. `on_stall` gets the last activity.
    """

    def __init__(self, seconds: float, on_stall: Callable[[str], None], end: Callable[[int], Any] = os._exit) -> None:
        self._seconds, self._on_stall, self._end = seconds, on_stall, end
        self._last, self._doing = time.monotonic(), "starting"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """Report activity."""
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
