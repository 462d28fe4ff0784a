"""Shared by the benchmarks: what machine and versions ran, and the dated result file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, GPU where one was used, Python and library versions."""
    names = ("numpy", "torch", "ray")
    return {
        "processor": _processor(),
        **({"gpu": _gpu()} if device != "cpu" else {}),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: found for name in names if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    """None where it is not installed: a GPU machine may have torch and numpy alone."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name()


def record(theme: str, result: dict[str, Any], *, as_json: bool, device: str = "cpu") -> Path:
    """Print the result and write `results/<theme>_<device>_<date>.json`, whose path comes back; as JSON, its figures
    stand at the top."""
    # A path names somebody's machine; its last part says enough.
    arguments = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    command = " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *arguments])
    document = {"theme": theme, "command": command, "machine": machine(device), "result": result}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{theme}_{device}_{datetime.date.today():%Y%m%d}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    if as_json:
        print(json.dumps({key: value for key, value in document.items() if key != "result"} | result))
    else:
        for key, value in result.items():
            print(f"{key}: {value}")
        print(f"written to {path}")
    return path
