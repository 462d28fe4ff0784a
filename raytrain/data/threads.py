"""How many threads read audio, and how a step's rows are split into their tasks."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_MAX_AUTO_THREADS = 16  # more wait for Python's lock
_MAX_ROWS_PER_TASK = 16  # what handing over a task costs is small beside reading as many short recordings
_TASKS_PER_THREAD = 4  # of a step, so that no thread ends long after the rest


def loader_threads(setting: int | str, num_cpus: int, num_workers: int) -> int:
    """Threads of one of `num_workers` training workers on a node of `num_cpus` CPUs: what `train.num_loader_threads`
    says, or for `auto` the worker's CPUs less one, which the training step itself needs."""
    if setting != "auto":
        return int(setting)
    return max(1, min(_MAX_AUTO_THREADS, num_cpus // num_workers - 1))


def available_cpus() -> int:
    """CPUs that this process may use: those that it may run on, or the whole CPUs' time that its container has."""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max" instead of a number
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return max(1, min(num_cpus, quota // period))
    return num_cpus


def split_rows(num_rows: int, num_threads: int) -> list[range]:
    """Rows 0 … `num_rows` − 1 of a step in tasks for `num_threads` threads, in order; a step of few rows, which may be
    long, has few in each task."""
    size = max(1, min(_MAX_ROWS_PER_TASK, num_rows // (_TASKS_PER_THREAD * num_threads)))
    return [range(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
