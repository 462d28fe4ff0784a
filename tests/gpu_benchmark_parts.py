"""Parts that end in every way, for tests/test_gpu_benchmark.py; their processes import little and start soon."""

import os
import signal
import subprocess
import sys
import time

from benchmarks._gpu_run import Bench, PartFailed, need_modules


def ends(bench: Bench) -> None:
    """It tells two things, the second one twice."""
    bench.report("first", {"tiny": bench.tiny, "device": bench.device})
    bench.report("second", {"value": 1})
    bench.report("second", {"value": 2})


def hangs(bench: Bench) -> None:
    """It has a child in a separate session, and both ignore SIGTERM."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    bench.report("child", {"id": child.pid})
    time.sleep(600)


def dies(bench: Bench) -> None:
    """A fault of the device may take the process along."""
    bench.report("before", {"value": 1})
    os.kill(os.getpid(), signal.SIGSEGV)


def raises(bench: Bench) -> None:
    """An error of CUDA's."""
    raise RuntimeError("CUDA error: an illegal memory access")


def skips(bench: Bench) -> None:
    """It needs a module that is not installed."""
    need_modules(["json", "no_such_module_anywhere"])


def fails(bench: Bench) -> None:
    """It ran, and what it saw is a failure."""
    raise PartFailed("2 tests failed")
