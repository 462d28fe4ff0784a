"""Parts of `benchmarks.gpu` that start programs: the tests marked `gpu`, and the pipeline on the demo's corpus."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks._gpu_run import Bench, PartFailed, Skipped, need_modules

ROOT = Path(__file__).parents[1]


# --- tests


def gpu_tests(bench: Bench) -> None:
    """Outcomes of the tests that need a GPU, counted as they finish, and the names of failed tests.

    Without pydantic, tests/conftest.py can't be imported and is skipped; tests that use its fixtures then fail with
    errors.
    """
    need_modules(["pytest"])
    if not bench.on_cuda:
        raise Skipped("the tests marked gpu need CUDA")
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py")) if is_marked(path)]
    # addopts of pyproject.toml leave these tests out.
    options = ["-m", "gpu", "-v", "-ra", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors"]
    if importlib.util.find_spec("pydantic") is None:
        options += ["--noconftest"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    environment = {**os.environ, "COLUMNS": "400"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for figures in outcomes(process.stdout):
            bench.report("outcomes", figures)
    if process.returncode not in (0, 5):  # 5: no test was found
        raise PartFailed(f"pytest ended with exit code {process.returncode}")


def is_marked(path: Path) -> bool:
    """Whether a file has tests that need a GPU."""
    return "mark.gpu" in path.read_text()


_OUTCOME = re.compile(r"^(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_REASON = re.compile(r"^(FAILED|ERROR|SKIPPED) (.*)$")


def outcomes(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The outcomes so far, after each relevant line of pytest's verbose output."""
    counts: Counter[str] = Counter()
    reasons: dict[str, list[str]] = {"failed": [], "error": [], "skipped": []}
    for line in lines:
        if match := _OUTCOME.match(line):
            counts[match[2].lower()] += 1
        elif match := _REASON.match(line.rstrip()):
            reasons[match[1].lower()].append(match[2][:300])
        else:
            continue
        yield dict(counts) | {f"{outcome}_tests": rows for outcome, rows in reasons.items() if rows}


# --- pipeline


NEEDED = (
    "ray",
    "pydantic",
    "yaml",
    "typer",
    "rich",
    "orjson",
    "pyarrow",
    "mlflow",
    "soundfile",
    "espeakng_loader",
    "jiwer",
    "matplotlib",
    "jinja2",
    "psutil",
)
UTTERANCES = {"train": 1200, "dev": 40, "test": 80}
TINY_UTTERANCES = {"train": 64, "dev": 4, "test": 4}
SETTINGS = (
    "oomptimize.device_memory=null",
    "oomptimize.max_batch_size=512",
    "oomptimize.soak_steps=48",
    "train.device=cuda",
    "train.max_steps=60",
    "train.max_minutes=2",
    "train.stop_at_wer=null",
    "train.warmup_steps=20",
    "train.validate_every_steps=60",
    "train.checkpoint_every_steps=60",
    "train.log_every_steps=5",
)
TINY_SETTINGS = (
    "oomptimize.device_memory=64MiB",
    "oomptimize.max_batch_size=8",
    "train.num_workers=1",
    "train.device=cpu",
    "buckets.num_duration_buckets=1",
    "model.encoder_layers=1",
    "model.decoder_layers=1",
    "train.max_steps=4",
    "train.stop_at_wer=null",
    "train.warmup_steps=2",
    "train.validate_every_steps=4",
    "train.checkpoint_every_steps=4",
    "train.log_every_steps=1",
    "evaluate.beam_size=2",
)
_RAY_LOG = re.compile(r"^(\(\w+ pid=\d+\)|\[\d{4}-\d\d-\d\d )")  # lines printed by Ray
_STAGE = re.compile(r"^✓ (\w+) .*\((\d+\.\d) s\)\s*$")


def pipeline(bench: Bench) -> None:
    """`raytrain run` with the demo's configuration and fewer steps; on a GPU its batch sizes are probed for real."""
    need_modules(NEEDED)
    from raytrain.demo.speech import make_corpus

    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.perf_counter()
        sizes = TINY_UTTERANCES if bench.tiny else UTTERANCES
        make_corpus(folder / "corpus", sizes, seed=1)
        bench.report("corpus", {"utterances": sum(sizes.values()), "seconds": round(time.perf_counter() - start, 1)})
        workers = () if bench.tiny else (f"train.num_workers={max(1, torch.cuda.device_count())}",)
        settings = (f"data.root={folder / 'corpus'}", f"run.root={folder}", *workers)
        settings += TINY_SETTINGS if bench.tiny else SETTINGS
        code = _run_stages(bench, folder, settings)
        report_run(bench, folder / "demo")
    if code:
        raise PartFailed(f"raytrain run ended with exit code {code}")


def _run_stages(bench: Bench, folder: Path, settings: tuple[str, ...]) -> int:
    """Returns the exit code; reports each stage's seconds as it ends, and the other lines at the end."""
    command = [sys.executable, "-m", "raytrain", "run", "--config", str(ROOT / "raytrain/demo/demo.yaml")]
    for setting in settings:
        command += ["--set", setting]
    # Use a separate local Ray, even if this shell is configured for a cluster.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"COLUMNS": "400"}
    seconds: dict[str, float] = {}
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            if match := _STAGE.match(line):
                seconds[match[1]] = float(match[2])
                bench.report("stage seconds", seconds)
            lines.append(line.rstrip().replace(str(folder), "").replace(f"{ROOT}/", "")[:300])
    said = [line for line in lines if line.strip() and not _RAY_LOG.match(line)]
    bench.report("run", {"exit_code": process.returncode, "lines": said[-40:]})
    return process.returncode


def report_run(bench: Bench, run_dir: Path) -> None:
    """Batch sizes, training and evaluation from the run's artifacts, as far as they exist."""
    profile = _body(run_dir / "batch_profile.json")
    if profile:
        bench.report("oomptimize", oomptimize_figures(profile))
    if (metrics := run_dir / "metrics.jsonl").exists():
        bench.report("train", training_figures([json.loads(line) for line in metrics.read_text().splitlines()]))
    scores = _body(run_dir / "scores.json")
    bench.report("evaluate", {key: scores[key] for key in ("wer", "utterances") if key in scores} or {"ended": False})


def _body(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())["body"] if path.exists() else {}


def oomptimize_figures(body: dict[str, Any]) -> dict[str, Any]:
    """The first profile's columns, and what else the stage wrote, such as where its time went."""
    profile = body["profiles"][0]
    columns = ("batch_sizes", "num_probes", "predicted_gib", "measured_gib", "step_seconds")
    figures = {name: profile[name] for name in columns if profile.get(name) is not None}
    probes = [number for number in profile.get("num_probes", []) if number]
    figures["probes_per_bucket"] = round(statistics.mean(probes), 2) if probes else 0
    return figures | {name: value for name, value in body.items() if name != "profiles"}


def training_figures(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the log lines, except the first, which includes startup."""
    rows = [line for line in lines if "data_wait" in line]
    figures: dict[str, Any] = {"steps": max((line["step"] for line in lines), default=0)}
    if rows:
        sizes = [row["batch_size"] for row in rows]
        figures |= {"batch_size": [round(min(sizes)), round(max(sizes))]}
    for name in ("data_wait", "audio_seconds_per_second", "steps_per_second", "memory_gib", "mfu"):
        values = [row[name] for row in rows[1:] or rows if name in row]
        if values:
            figures[name] = round(statistics.median(values), 5)
    return figures
