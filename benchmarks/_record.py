"""Shared by the benchmarks: what machine and versions ran, and the dated result file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, Python and library versions."""
    names = ("numpy", "torch", "ray")
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def record(theme: str, result: dict[str, Any], *, as_json: bool) -> None:
    """Print the result and write `results/<theme>_cpu_<date>.json`."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    document = {"theme": theme, "command": command, "machine": machine(), "result": result}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{theme}_cpu_{datetime.date.today():%Y%m%d}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    if as_json:
        print(json.dumps(document))
    else:
        for key, value in result.items():
            print(f"{key}: {value}")
        print(f"written to {path}")
