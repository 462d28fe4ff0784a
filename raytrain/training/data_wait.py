"""Warnings for the user when training waits for data.

    monitor = DataWaitMonitor(DataPath(num_loader_threads=2))
    monitor.check({"time_s": 60.0, "data_wait": 0.3, "loader_busy": 0.9, "loader_cpu": 0.95})    # a warning, or None

It sees only metrics lines, so it runs on the driver, which has a terminal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

WAIT_LIMIT = 0.05
REPEAT_SECONDS = 600.0
_LINES = 5  # a single slow file or the very first batch does not count
_LEAST_LINES = 3


@dataclass(frozen=True)
class DataPath:
    """The settings of a run's data path that advice depends on: `train.num_loader_threads`, `data.workers`,
    `assign.materialize`, and whether there is a `data.stream`."""

    num_loader_threads: int | str = "auto"
    workers: str = "threads"
    materialize: bool = False
    stream: bool = False


class DataWaitMonitor:
    """Warns when the median wait of the last lines is above `WAIT_LIMIT`: when that begins, and again after
    `REPEAT_SECONDS` of training or when the wait has doubled."""

    def __init__(self, data_path: DataPath) -> None:
        self._data_path = data_path
        self._lines: deque[Mapping[str, float]] = deque(maxlen=_LINES)
        self._warned: tuple[float, float] | None = None  # the time and the share of the last warning

    def check(self, line: Mapping[str, float]) -> str | None:
        """The warning for a metrics line, None if there is nothing new to report."""
        if "data_wait" not in line:  # a line of a validation
            return None
        self._lines.append(line)
        share = self._median("data_wait")
        if len(self._lines) < _LEAST_LINES or share is None or share <= WAIT_LIMIT:
            return None
        if self._warned is not None:
            seconds, warned_share = self._warned
            if line["time_s"] < seconds + REPEAT_SECONDS and share < 2 * warned_share:
                return None
        self._warned = (line["time_s"], share)
        reason = advice(self._data_path, self._median("loader_busy"), self._median("loader_cpu"))
        return f"training waits for data {share:.0%} of its time: {reason}"

    def _median(self, name: str) -> float | None:
        values = [line[name] for line in self._lines if name in line]
        return median(values) if values else None


def advice(data_path: DataPath, busy: float | None, cpu: float | None) -> str:
    """The bottleneck of the data path, and remedies.

    `busy` is the share of time in which the loader's threads have something to read, `cpu` the share of that in which
    they have a CPU; both None if unknown (batches from Ray Data).
    """
    copy = [] if data_path.materialize or data_path.stream else ["set assign.materialize: true"]
    if data_path.workers == "ray" or busy is None or cpu is None:
        return _sentence("the CPUs that decode can't keep up", [*copy, "add CPU nodes"])
    if busy < 0.5 and data_path.stream:
        return _sentence("the stream's sampler can't keep up", ["unset data.stream and run assign"])
    if busy < 0.5:
        reason = f"the loader's threads are idle {1 - busy:.0%} of it, so batches take unequal time"
        return _sentence(reason, ["raise train.prefetch_batches"])
    if cpu < 0.5:
        reason = f"the loader's threads wait {1 - cpu:.0%} of theirs, for storage or for a CPU"
        return _sentence(reason, ["raise train.num_loader_threads", *copy, "use faster storage"])
    threads = [] if data_path.num_loader_threads == "auto" else ["set train.num_loader_threads to auto or more"]
    elsewhere = "give each worker more CPUs" if data_path.stream else "set data.workers: ray"
    return _sentence("decoding takes all of the loader's threads", [*threads, *copy, elsewhere])


def _sentence(reason: str, remedies: list[str]) -> str:
    return f"{reason}; {', or '.join(remedies)}"
