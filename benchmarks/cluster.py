"""Stages `statistics`, `buckets`, `assign` on local clusters of 1, 2, 3 nodes: time, driver memory, equal results.

    python -m benchmarks.cluster                                   # 20 million lines; docs/scale.md speaks of it
    python -m benchmarks.cluster --lines 200000 --nodes 1 2 --json

Each node is a Ray node with one CPU on this machine; the head, where the driver is, has none. If the machine has fewer
cores than nodes plus the driver, they share them, and the result says so (`share_cores`). Each number of nodes has its
own driver and cluster, whose workers are started (`start_seconds`) before the first stage begins.

The manifest and the assignments are in a folder inside --folder (by default the system's temporary folder), which needs
about 600 bytes per line. It is removed at the end and when the benchmark is stopped, unless --keep is given; the same
command then resumes with the remaining numbers of nodes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# As a script, this file's folder would come first, and with it `statistics.py` in place of the standard module.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._record import RESULTS, record
from benchmarks.statistics import PeakMemory, make_manifest
from raytrain.config import Config, check_config
from raytrain.data.text.tokenizer import SPECIALS, CanaryTokenizer, train_specials
from raytrain.storage.artifacts import file_id

STAGES = ("statistics", "buckets", "assign")
_BLOCK = 200_000  # lines that are generated together
_SAME = ("statistics.json", "bucket_plan.json", "histogram.parquet")
_BILLION = 1_000_000_000


def prepare(folder: Path, lines: int) -> None:
    """Write the manifest and a tokenizer for it, unless they exist."""
    if (folder / "ready").exists():
        return
    _, model = make_manifest(folder, lines, _BLOCK)
    CanaryTokenizer({SPECIALS: train_specials(["en"]), "en": model.read_bytes()}).save(folder / "tokenizer")
    (folder / "ready").touch()


def make_config(folder: Path, nodes: int, chunk_bytes: int | None = None) -> Config:
    """The run of one number of nodes: 60 optimal cells, as `benchmarks.scale` plans them."""
    return check_config(
        {
            "name": f"nodes-{nodes}",
            "run": {"root": str(folder)},
            "data": {
                "train": [{"name": "all", "path": str(folder / "manifest.jsonl")}],
                "default_language": "en",
                "chunk_bytes": chunk_bytes,
                "audio_sample": 0,
            },
            "tokenizer": {"path": str(folder / "tokenizer")},
            "buckets": {"policy": "optimal", "num_cells": 60, "max_tokens": 2048},
            "model": {"max_positions": 2048},
            "tracking": {"enabled": False},
        }
    )


def run_stages(config: Config, nodes: int) -> dict[str, Any]:
    """Seconds of each stage, the driver's peak in MiB, and ids of the results. Call it in a separate process, which
    becomes the driver."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    from ray.cluster_utils import Cluster

    from raytrain.cluster.mapping import map_on_workers
    from raytrain.cluster.session import ray_session
    from raytrain.console import Console
    from raytrain.stages.pipeline import run_pipeline

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    seconds: dict[str, float] = {}
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        settings = config.cluster.model_copy(update={"address": cluster.address})
        with PeakMemory() as memory, ray_session(settings):
            start = time.perf_counter()
            list(map_on_workers(list(range(nodes)), lambda items: time.sleep(1), 1))  # one on each node
            starting = time.perf_counter() - start
            for stage in STAGES:
                start = time.perf_counter()
                run_pipeline(config, Console(quiet=True), (stage,))
                seconds[stage] = time.perf_counter() - start
    finally:
        cluster.shutdown()
    index = json.loads((config.run_dir / "assignment" / "index.json").read_bytes())["body"]
    return {
        "seconds": seconds,
        "start_seconds": starting,
        "driver_peak_mib": memory.peak_mib,
        "rows": index["rows"],
        "rejected": index["rejected"],
        "ids": {name: file_id(config.run_dir / name) for name in _SAME}
        | {"assignment": folder_id(config.run_dir / "assignment")},
    }


def folder_id(folder: Path) -> str:
    """A hash of the names and bytes of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()


def run_apart(folder: Path, nodes: int, chunk_bytes: int | None) -> dict[str, Any]:
    """Run `run_stages` in a separate process; everything it wrote except its results is removed."""
    done = folder / f"nodes-{nodes}.done.json"
    if not done.exists():
        config = make_config(folder, nodes, chunk_bytes)
        shutil.rmtree(config.run_dir, ignore_errors=True)  # times are those of whole runs
        command = [sys.executable, "-m", "benchmarks.cluster", "--run", str(folder), str(nodes), str(chunk_bytes or 0)]
        # What Ray prints must not get into --json.
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=sys.stderr.fileno())
        try:
            if process.wait() != 0:
                raise SystemExit(f"the stages failed on {nodes} node(s)")
        finally:
            _end(process)
            shutil.rmtree(config.run_dir, ignore_errors=True)
    return json.loads(done.read_bytes())


def _end(process: subprocess.Popen) -> None:
    """Ask a driver to stop together with its cluster."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # Ray responds to SIGTERM with a stack trace
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _run_one(folder: Path, nodes: int, chunk_bytes: int | None) -> None:
    figures = run_stages(make_config(folder, nodes, chunk_bytes), nodes)
    half = folder / f"nodes-{nodes}.half"
    half.write_text(json.dumps(figures))
    half.rename(folder / f"nodes-{nodes}.done.json")


def measure(folder: Path, lines: int, nodes: list[int], chunk_bytes: int | None = None) -> dict[str, Any]:
    """Run the whole benchmark; returns the result."""
    prepare(folder, lines)
    runs = {number: run_apart(folder, number, chunk_bytes) for number in nodes}
    ids = [run["ids"] for run in runs.values()]
    cores = os.cpu_count() or 1
    return {
        "lines": lines,
        "manifest_gib": round((folder / "manifest.jsonl").stat().st_size / 2**30, 3),
        "same_results": all(run_ids == ids[0] for run_ids in ids),
        "ids": ids[0] if all(run_ids == ids[0] for run_ids in ids) else ids,
        "rows": [run["rows"] for run in runs.values()],
        "rejected": [run["rejected"] for run in runs.values()],
        "nodes": {
            str(number): {
                **{f"{stage}_seconds": round(run["seconds"][stage], 1) for stage in STAGES},
                **{f"{stage}_rows_per_second": round(lines / run["seconds"][stage]) for stage in STAGES[::2]},
                "start_seconds": round(run["start_seconds"], 1),
                "driver_peak_mib": round(run["driver_peak_mib"], 1),
                "share_cores": number + 1 > cores,  # the driver is busy too
                **_billion(run["seconds"], lines, min(number, cores)),
            }
            for number, run in runs.items()
        },
        "predicted_cpu_hours": _predicted(),
    }


def _billion(seconds: dict[str, float], lines: int, cores: int) -> dict[str, float]:
    """CPU-hours of a billion rows at the rate of a run."""
    return {
        f"{stage}_cpu_hours_of_a_billion": round(seconds[stage] / lines * _BILLION * cores / 3600, 2)
        for stage in STAGES[::2]
    }


def _predicted() -> dict[str, Any] | None:
    """The figures for a billion rows in the newest result of `benchmarks.scale`."""
    sheets = sorted(RESULTS.glob("scale_cpu_*.json"))
    if not sheets:
        return None
    result = json.loads(sheets[-1].read_bytes())["result"]
    return {"statistics": result["count_cpu_hours"], "assign": result["assign_cpu_hours"], "by": sheets[-1].name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=20_000_000)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, help="where there is room for the manifest and one assignment")
    parser.add_argument("--keep", action="store_true", help="when stopped, keep what is done for the same command")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # `kill` ends a run like Ctrl-C: folders and clusters are removed on exit.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if arguments.run:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it by default
        folder, nodes, chunk_bytes = arguments.run
        try:
            _run_one(Path(folder), int(nodes), int(chunk_bytes) or None)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        return
    folder = (arguments.folder or Path(tempfile.gettempdir())).absolute() / f"raytrain-cluster-{arguments.lines}"
    folder.mkdir(parents=True, exist_ok=True)
    finished = False
    try:
        result = measure(folder, arguments.lines, arguments.nodes)
        record("cluster", result, as_json=arguments.json)
        finished = True
    finally:
        if finished or not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if not result["same_results"]:
        raise SystemExit("the results differ with the number of nodes")


if __name__ == "__main__":
    main()
