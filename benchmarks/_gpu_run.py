"""One part of `benchmarks.gpu` in a separate process, which may hang or die without affecting the others.

The parent starts `python -m benchmarks._gpu_run PART …` with a file that gets a line of JSON for each report, reads it
while the process works, and ends the process and all its children at the time limit. Everything reported until then
counts. This module imports only the standard library; each part imports what it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GRACE_SECONDS = 3.0  # between asking a process to end and killing it
_POLL_SECONDS = 0.2
_SKIPPED, _FAILED = 77, 78
_REPORTS, _MESSAGES = "reports.jsonl", "messages.txt"


@dataclass(frozen=True)
class Bench:
    """What a part receives: the device, whether to use tiny shapes, its time limit in seconds, and where to report
    figures.

    `report(name, figures)` may be called repeatedly; the last figures for a name count.
    """

    device: str
    tiny: bool
    seconds: float
    report: Callable[[str, dict[str, Any]], None]

    @property
    def on_cuda(self) -> bool:
        """Whether the part runs on a GPU."""
        return self.device == "cuda"


class Skipped(Exception):
    """A part can't run here; the message says why."""


class PartFailed(Exception):
    """A part ran to completion and found a failure."""


def need_modules(names: Iterable[str]) -> None:
    """Raises a `Skipped` that names the missing modules."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"not installed here: {', '.join(missing)}")


@dataclass(frozen=True)
class Part:
    """`function` is `module:name`, called with a `Bench`; `weight` is its share of the time."""

    name: str
    function: str
    weight: float
    title: str


@dataclass
class Outcome:
    """`status` is running, done, skipped, failed, stopped (at its limit) or interrupted; `why` says why if it is not
    done."""

    status: str
    why: str | None
    seconds: float
    limit: float
    results: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        body: dict[str, Any] = {"status": self.status}
        if self.why:
            body["why"] = self.why
        return body | {
            "seconds": round(self.seconds, 1),
            "limit_seconds": round(self.limit, 1),
            "results": self.results,
        }


def limit_of(weight: float, later: Sequence[float], seconds_left: float) -> float:
    """The part's share, by weight, of the remaining time, less the time that ending each part may take.

    A part that ends early thus leaves its time to later parts, and no part can use up theirs.
    """
    usable = seconds_left - GRACE_SECONDS * (1 + len(later))
    return max(0.0, usable * weight / (weight + sum(later)))


def run_part(
    part: Part, device: str, tiny: bool, limit: float, on_report: Callable[[Outcome], None] = lambda outcome: None
) -> Outcome:
    """Run a part for at most `limit` seconds; `on_report` is called with each new figure.

    A `KeyboardInterrupt` ends the part too, and gives `interrupted`.
    """
    outcome, start = Outcome("running", None, 0.0, limit, {}), time.monotonic()
    # A short path, since Ray's sockets are below it; removed with everything that a killed part leaves.
    folder = Path(tempfile.mkdtemp(prefix="rt-gpu-"))
    try:
        process = _start(part, device, tiny, limit, folder)
        for figures in _follow(process, folder / _REPORTS, start + limit):
            outcome.results |= figures
            outcome.seconds = time.monotonic() - start
            on_report(outcome)
        outcome.status, outcome.why = _verdict(process.poll(), limit, folder / _MESSAGES)
    except KeyboardInterrupt:
        outcome.status, outcome.why = "interrupted", "stopped by a signal; what it had reported until then counts"
    finally:
        end_all(folder)
        shutil.rmtree(folder, ignore_errors=True)
    outcome.seconds = time.monotonic() - start
    return outcome


def _start(part: Part, device: str, tiny: bool, limit: float, folder: Path) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    if device == "cpu":  # toy sizes don't benefit from threads, which wait for each other on a busy machine
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", __name__, part.function, "--device", device, "--seconds", f"{limit:.1f}"]
    command += ["--reports", str(folder / _REPORTS), *(["--tiny"] if tiny else [])]
    with open(folder / _MESSAGES, "wb") as messages:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=messages,
            start_new_session=True,  # Ctrl-C goes to the parent, which ends it
        )


def _follow(process: subprocess.Popen, reports: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """The figures that a process reports, until it has ended or the deadline has passed."""
    read = 0
    while True:
        ended = process.poll() is not None or time.monotonic() >= deadline
        data = reports.read_bytes()[read:] if reports.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        read += len(whole)
        figures: dict[str, Any] = {}
        for line in whole.splitlines():
            figures |= json.loads(line)
        if figures:
            yield figures
        if ended:
            return
        time.sleep(_POLL_SECONDS)


def _verdict(code: int | None, limit: float, messages: Path) -> tuple[str, str | None]:
    """Status and reason from the exit code; None if the process is still running."""
    if code is None:
        return "stopped", f"not ended after {limit:.0f} s; what it had reported until then counts"
    if code == 0:
        return "done", None
    lines = [line.strip() for line in messages.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][:400].replace(str(ROOT), "") if lines else "no message"
    if code in (_SKIPPED, _FAILED):
        return ("skipped" if code == _SKIPPED else "failed"), last
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return "failed", f"its process ended with {name}: {last}"


def end_all(folder: Path) -> None:
    """End every process that was started with `folder` as its TMPDIR: a part's process and all its descendants, in any
    process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + GRACE_SECONDS / 2
        while (processes := processes_of(folder)) and time.monotonic() < until:
            for process in processes:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, number)
            time.sleep(0.1)


def processes_of(folder: Path) -> list[int]:
    """Ids of the processes whose environment sets TMPDIR to `folder`."""
    mark, processes = f"TMPDIR={folder}\0".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it just ended, or belongs to another user
            if mark in path.read_bytes() + b"\0":
                processes.append(int(path.parent.name))
    return processes


def main() -> None:
    """Run a part in this process; skipped and failed parts say why in their last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function", help="module:name")
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--reports", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    module, name = arguments.function.split(":")
    work = getattr(importlib.import_module(module), name)
    with open(arguments.reports, "a", buffering=1) as file:

        def report(title: str, figures: dict[str, Any]) -> None:
            file.write(json.dumps({title: figures}) + "\n")

        try:
            work(Bench(arguments.device, arguments.tiny, arguments.seconds, report))
        except (Skipped, PartFailed) as reason:
            print(reason, file=sys.stderr)
            sys.exit(_SKIPPED if isinstance(reason, Skipped) else _FAILED)


if __name__ == "__main__":
    from benchmarks import _gpu_run  # the parts raise its exceptions; those of `__main__` are different classes

    _gpu_run.main()
