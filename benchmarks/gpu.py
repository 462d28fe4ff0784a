"""Everything raytrain measures on a GPU, within a limited number of minutes.

    python -m benchmarks.gpu --minutes 8 python -m benchmarks.gpu --only step,rtfx --minutes 3 python -m benchmarks.gpu
    --device cpu --tiny         # the same parts at toy size, without a GPU

Parts run in order of importance, each in a separate process with its own time limit: one that hangs or ends in a CUDA
error does not affect the others, and one that ends early leaves its time to the later ones. The result file is
rewritten with each figure, so a stopped run keeps what it has. A part that lacks something (Ray, a second GPU) is
skipped and says so. Needs torch, numpy and sentencepiece; the pipeline part needs all of raytrain. The exit code is 1
if a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._gpu import nvidia_smi
from benchmarks._gpu_run import Outcome, Part, limit_of, run_part
from benchmarks._gpu_table import print_tables
from benchmarks._record import command, machine, result_path, write_document

# Weights: the seconds that each may need on a large GPU, including its process's startup.
PARTS = (
    Part("card", "benchmarks._gpu_parts:card", 30, "the GPU, its driver, and a bf16 matrix product"),
    Part("tests", "benchmarks._gpu_pipeline:gpu_tests", 75, "tests marked gpu"),
    Part("pipeline", "benchmarks._gpu_pipeline:pipeline", 135, "the pipeline on the demo's corpus, with real probes"),
    Part("step", "benchmarks._gpu_parts:step", 140, "training steps beside NeMo's order, and their costliest kernels"),
    Part("memory", "benchmarks._gpu_parts:memory", 90, "predicted and measured peaks"),
    Part("memory_questions", "benchmarks._gpu_parts:memory_questions", 20, "what the tracer can't know"),
    Part("rtfx", "benchmarks._gpu_parts:rtfx", 50, "RTFx of encoder and decoder"),
    Part("ddp", "benchmarks._gpu_ranks:ddp", 20, "a training step on two ranks"),
)
_LEAST_SECONDS = 5.0  # less is not worth starting a process
_RESERVE_SECONDS = 5.0  # imports before the first part, tables after the last


def chosen(names: str | None) -> tuple[Part, ...]:
    """The parts in a comma-separated list, in canonical order; all if it is empty. Raises `ValueError` for unknown
    parts."""
    if names is None:
        return PARTS
    wanted = [name.strip() for name in names.split(",")]
    if unknown := sorted(set(wanted) - {part.name for part in PARTS}):
        allowed = ", ".join(part.name for part in PARTS)
        raise ValueError(f"there is no part {', '.join(unknown)}; allowed: {allowed}")
    return tuple(part for part in PARTS if part.name in wanted)


@dataclass(frozen=True)
class Run:
    """Parts to run on a device, and the document that is kept up to date at `path`."""

    parts: tuple[Part, ...]
    device: str
    tiny: bool
    path: Path
    document: dict[str, Any]

    def run(self, seconds: float) -> None:
        """Run all parts within `seconds`, even if they hang."""
        deadline = time.monotonic() + seconds
        for number, part in enumerate(self.parts):
            left = deadline - time.monotonic()
            limit = limit_of(part.weight, [later.weight for later in self.parts[number + 1 :]], left)
            if limit < _LEAST_SECONDS:
                self._keep(part, Outcome("skipped", f"only {max(0.0, left):.0f} s were left", 0.0, limit, {}))
                continue
            print(f"{part.name}: {part.title}, at most {limit:.0f} s", file=sys.stderr, flush=True)
            outcome = run_part(part, self.device, self.tiny, limit, partial(self._keep, part))
            self._keep(part, outcome)
            if outcome.status == "interrupted":
                return

    def failed(self) -> list[str]:
        """The parts that failed."""
        return [name for name, outcome in self.document["parts"].items() if outcome["status"] == "failed"]

    def _keep(self, part: Part, outcome: Outcome) -> None:
        self.document["parts"][part.name] = outcome.to_dict()
        write_document(self.path, self.document)


def new_document(device: str, tiny: bool) -> dict[str, Any]:
    """What is known before the first part: the machine, the code version, and the command line."""
    gpu = (nvidia_smi("name") or ["unknown"])[0] if device == "cuda" else None
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {
        "theme": "gpu",
        "command": command(),
        "commit": _commit(),
        "started": started,
        "device": device,
        "tiny": tiny,
        "machine": machine(device, gpu),
        "parts": {},
    }


def default_path(document: dict[str, Any]) -> Path:
    """`results/gpu_<card>_<date>.json`, with the GPU's name without the vendor."""
    name = document["machine"].get("gpu", document["device"])
    words = re.findall(r"[a-z0-9]+", name.lower().replace("nvidia", ""))
    return result_path("gpu_tiny" if document["tiny"] else "gpu", "-".join(words) or document["device"])


@contextlib.contextmanager
def _compiled_code() -> Iterator[None]:
    """A folder in which parts leave compiled code for later ones, empty at first, so that the first to compile shows
    how long that takes; the environment's if it names one. A part's other temporary files go with it."""
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="rt-code-", ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]


def _commit() -> str | None:
    """The checkout's commit, with a plus if files differ from it; None without git."""
    try:
        options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 20, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changed else commit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--only", help=f"comma-separated parts of {','.join(part.name for part in PARTS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--tiny", action="store_true", help="canary-tiny and small batches, to check that all parts run"
    )
    parser.add_argument("--output", type=Path, help="the result file, instead of one in benchmarks/results")
    parser.add_argument("--json", action="store_true", help="print the result file instead of tables")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny runs the same parts at toy size")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("a CPU takes hours for these shapes; add --tiny")
    try:
        parts = chosen(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    document = new_document(arguments.device, arguments.tiny)
    run = Run(parts, arguments.device, arguments.tiny, arguments.output or default_path(document), document)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` sends it; measurements so far are shown
    with _compiled_code():
        run.run(60 * arguments.minutes - _RESERVE_SECONDS)
    if arguments.json:
        print(json.dumps(document))
    else:
        print_tables(document)
        print(f"written to {run.path}")
    if run.failed():
        sys.exit(1)


if __name__ == "__main__":
    main()
