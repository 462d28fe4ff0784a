"""The number of threads that read audio, and the split of a step's rows into tasks."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_MAX_AUTO_THREADS = 16  # more would wait for Python's GIL
_MAX_ROWS_PER_TASK = 16  # the cost of a task is small compared with reading this many short recordings
_TASKS_PER_THREAD = 4  # per step, so that no thread finishes long after the rest


def loader_threads(setting: int | str, num_cpus: int, num_workers: int) -> int:
    """Threads of one of `num_workers` training workers on a node of `num_cpus` CPUs: `train.num_loader_threads`, or for
    `auto` the worker's CPUs minus one, which the training step itself needs."""
    if setting != "auto":
        return int(setting)
    return max(1, min(_MAX_AUTO_THREADS, num_cpus // num_workers - 1))


def available_cpus() -> int:
    """CPUs that this process may use: those of its affinity mask, or the whole CPUs of its container's quota."""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max" instead of a number
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return max(1, min(num_cpus, quota // period))
    return num_cpus


def split_rows(num_rows: int, num_threads: int) -> list[range]:
    """Rows 0 … `num_rows` − 1 of a step in tasks for `num_threads` threads, in order; a step of few, perhaps long rows
    has few in each task."""
    size = max(1, min(_MAX_ROWS_PER_TASK, num_rows // (_TASKS_PER_THREAD * num_threads)))
    return [range(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
