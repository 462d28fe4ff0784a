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


def machine(device: str = "cpu", gpu: str | None = None) -> dict[str, Any]:
    """Processor, cores, GPU if one was used, Python and library versions.

    Asking torch for the GPU's name occupies some of its memory while this process lives; passing `gpu` avoids that.
    """
    names = ("numpy", "torch", "ray")
    return {
        "processor": _processor(),
        **({"gpu": gpu or _gpu()} if device != "cpu" else {}),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: found for name in names if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    """None if it is not installed: a GPU machine may have only torch and numpy."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name if Linux reports it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name()


def command() -> str:
    """This process's command line, with paths reduced to file names, since folders would identify a machine."""
    arguments = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *arguments])


def result_path(theme: str, device: str) -> Path:
    """`results/<theme>_<device>_<date>.json`."""
    return RESULTS / f"{theme}_{device}_{datetime.date.today():%Y%m%d}.json"


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Replace the file atomically, so that there is never a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def record(theme: str, result: dict[str, Any], *, as_json: bool, device: str = "cpu") -> Path:
    """Print the result and write it to its `result_path`, which is returned; as JSON, its figures are at the top
    level."""
    document = {"theme": theme, "command": command(), "machine": machine(device), "result": result}
    path = result_path(theme, device)
    write_document(path, document)
    if as_json:
        print(json.dumps({key: value for key, value in document.items() if key != "result"} | result))
    else:
        for key, value in result.items():
            print(f"{key}: {value}")
        print(f"written to {path}")
    return path
