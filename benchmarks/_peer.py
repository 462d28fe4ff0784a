"""Talks to `peer_nemo.py` in NeMo's own environment, and times both sides in turn.

Machines are noisy, so runs alternate between ours and theirs, and the ratio of the medians counts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PAUSE = 0.3


class Peer:
    """NeMo in a subprocess, holding one model; a context manager that ends it."""

    def __init__(self, python: Path, model: Path, threads: int) -> None:
        command = [str(python), str(Path(__file__).with_name("peer_nemo.py")), str(model), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        # It sends its versions once it has loaded, and no longer competes for the CPU.
        self.versions = self._answer()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer: `seconds` and `result`."""
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit("NeMo ended; run benchmarks/peer_nemo.py by hand to see why")


def in_turn(ours: Callable[[], object], theirs: Callable[[], float], rounds: int) -> dict[str, float]:
    """Median seconds of both and how many times faster ours is.

    Before each timed run the same side runs once untimed: the other one has emptied its caches.
    """
    our_seconds, peer_seconds = [], []
    for _ in range(rounds):
        # The other side's threads keep spinning for a while after their work.
        time.sleep(_PAUSE)
        ours()
        start = time.perf_counter()
        ours()
        our_seconds.append(time.perf_counter() - start)
        time.sleep(_PAUSE)
        theirs()
        peer_seconds.append(theirs())
    mine, peer = statistics.median(our_seconds), statistics.median(peer_seconds)
    return {"ours_ms": round(1000 * mine, 1), "nemo_ms": round(1000 * peer, 1), "times_faster": round(peer / mine, 2)}
