"""A meter in a separate process: if a batch kills that process, that is an answer, not a crash.

A CUDA error leaves a process unusable, and the host's out-of-memory killer ends it. The parent then counts the batch as
one that does not fit, and starts a new process for the next.

    meter = IsolatedMeter(StepMeter, model_config, settings, budget_bytes)
    meter.measure(64, (4000, 40), num_steps=3).fits
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any

from raytrain.errors import ProfileError, first_line, last_line
from raytrain.training.memory.meter import Edges, Meter, Probe


def make_step_meter(*arguments: Any) -> Meter:
    """A factory of `StepMeter` for `IsolatedMeter`, which avoids importing torch here, since that takes seconds."""
    from raytrain.training.memory.step_meter import StepMeter

    return StepMeter(*arguments)


class IsolatedMeter:
    """Makes `make(*arguments)` in a new process, which must be importable there, and forwards calls to it.

    `num_starts` counts processes. `seconds` says how long each part of the last start took: `process` is Python with
    its imports, mainly PyTorch's; the rest is reported by the meter (`StepMeter.seconds`).
    """

    def __init__(self, make: Callable[..., Meter], *arguments: Any, environment: dict[str, str] | None = None) -> None:
        self._start = pickle.dumps((make, arguments))
        self._environment = {**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process: _MeterProcess | None = None
        self.num_starts = 0
        self.seconds: dict[str, float] = {}

    def start(self) -> None:
        """Start the process unless it is running; `measure` does so too. Raises as `measure` does."""
        if self._process is None:
            self._open()

    def measure(self, batch_size: int, edges: Edges, num_steps: int, *, fresh: bool = True) -> Probe:
        """See `Meter`. Raises `ProfileError` if the process can't even start, and what `make` raises."""
        process = self._process or self._open()
        try:
            answer = process.ask(pickle.dumps((batch_size, edges, num_steps, fresh)))
        except (EOFError, OSError):
            return Probe(batch_size, False, why=self._cause_of_death(process))
        if isinstance(answer, Exception):
            # The device is in an unknown state after anything but a plain out-of-memory error.
            self.close()
            return Probe(batch_size, False, why=f"{type(answer).__name__}: {first_line(answer)[:200]}")
        return answer

    def kill(self) -> None:
        """End the process from another thread: a `measure` that waits for it answers that the batch does not fit."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def __enter__(self) -> IsolatedMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> _MeterProcess:
        started = time.perf_counter()
        process = self._process = _MeterProcess(self._environment)
        try:
            answer = process.ask(self._start)
        except (EOFError, OSError):
            raise ProfileError(
                "the process that probes batch sizes exited during startup",
                why=self._cause_of_death(process),
                remedy="make sure that nothing else uses this GPU and the node's memory; `raytrain doctor` checks both",
            ) from None
        if isinstance(answer, Exception):
            self.close()
            raise answer
        self.num_starts += 1
        self.seconds = {"process": time.perf_counter() - started - sum(answer.values()), **answer}
        return process

    def _cause_of_death(self, process: _MeterProcess) -> str:
        code = process.wait()
        self.close()
        message = last_line(process.messages())
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        killer = ", perhaps by the host's out-of-memory killer" if code == -signal.SIGKILL else ""
        return f"its process ended with {name}{killer}" + (f": {message[:200]}" if message else "")


class _MeterProcess:
    """Runs `_serve`: questions go to its standard input, answers come from its standard output."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        self._process = subprocess.Popen(
            [sys.executable, "-m", "raytrain.training.memory.isolated_meter"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._questions, self._answers = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, question: bytes) -> Any:
        """The answer to a pickled question. Raises `EOFError` or `OSError` where the process has ended."""
        _write(self._questions, question)
        return _read(self._answers)

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self._process.wait()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._questions, self._answers):
            with contextlib.suppress(OSError):  # unread input is lost with it
                pipe.close()

    def messages(self) -> str:
        """What it wrote to standard error."""
        self._messages.seek(0)
        return self._messages.read().decode(errors="replace")


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> Any:
    header = pipe.read(8)
    if len(header) < 8:
        raise EOFError
    size = struct.unpack("<Q", header)[0]
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)  # from our own child or parent


def _serve() -> None:
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # library output must not mix with the answers
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if the host runs out of memory, this process is killed first
    except OSError:
        pass
    try:
        make, arguments = _read(questions)
        meter = make(*arguments)
    except Exception as error:
        _write(answers, pickle.dumps(error))
        return
    _write(answers, pickle.dumps(getattr(meter, "seconds", {})))
    while True:
        try:
            batch_size, edges, num_steps, fresh = _read(questions)
        except EOFError:
            return  # the parent is gone
        try:
            answer: Any = meter.measure(batch_size, edges, num_steps, fresh=fresh)
        except Exception as error:
            answer = error
        try:
            data = pickle.dumps(answer)
        except (pickle.PicklingError, TypeError, AttributeError):
            data = pickle.dumps(RuntimeError(str(answer)))
        _write(answers, data)


if __name__ == "__main__":
    _serve()
