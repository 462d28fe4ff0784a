"""Training's overhead besides its steps, how it scales, and how soon it resumes after a worker is killed.

python -m benchmarks.training --json

The loop: audio-seconds per second of `TrainingLoop` with loader, schedule, tracking (MLflow and JSON lines) and
checkpoints, compared with the bare steps on batches in memory; both with one compute thread, alternating. Workers: the
same total batch on 1, 2 and 4 Ray Train workers, which share this machine's cores. Recovery: from SIGKILL of a worker
in mid-step to the beginning of its next step, with the shares of Ray Train and of restoring the checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script, this file's folder would come first

from benchmarks._record import record
from raytrain.cluster.session import ray_session
from raytrain.config import ClusterSection, Config, check_config
from raytrain.console import Console
from raytrain.run_folder.batches import make_loader
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.pipeline import run_pipeline

MODEL = {
    "encoder_layers": 4,
    "encoder_width": 144,
    "encoder_heads": 4,
    "subsampling_channels": 32,
    "decoder_layers": 2,
    "decoder_width": 144,
    "decoder_heads": 4,
    "max_positions": 128,
}


def prepare(root: Path, utterances: int) -> Config:
    """A run folder with everything that training needs, of spoken numbers."""
    from raytrain.demo.speech import make_corpus

    make_corpus(root / "corpus", {"train": utterances, "dev": 8, "test": 8}, seed=1)
    config = check_config(
        {
            "name": "benchmark",
            "run": {"root": str(root)},
            "data": {"root": str(root / "corpus"), "train": ["train.jsonl"], "test": ["test.jsonl"]},
            "tokenizer": {"vocab_size": 64},
            "buckets": {"num_duration_buckets": 4, "num_token_buckets": 2, "max_duration_ms": 8000, "max_tokens": 64},
            "oomptimize": {"device_memory": "512MiB", "max_batch_size": 16},
            "model": MODEL,
            "train": {"ctc_weight": 0.5, "warmup_steps": 100, "learning_rate": 1e-3, "checkpoint_every_steps": 100},
        }
    )
    with ray_session(ClusterSection(num_cpus=max(4, os.cpu_count() or 1))):
        run_pipeline(config, Console(quiet=True), ("statistics", "buckets", "assign", "oomptimize"))
    return config


def new_loop(config: Config, workspace: Workspace, batches: Any, out: Path, log: Any) -> Any:
    """A loop of one rank from fresh weights."""
    import torch

    from raytrain.model.canary import Canary
    from raytrain.training.checkpoint import CheckpointFolder
    from raytrain.training.hooks import LoopHooks
    from raytrain.training.loop import TrainingLoop
    from raytrain.training.optim import make_optimizer
    from raytrain.training.state import TrainState

    torch.manual_seed(1)
    model = Canary(workspace.model_config())
    return TrainingLoop(
        state=TrainState(model, model, make_optimizer(model, config.train)),
        settings=config.train,
        batches=batches,
        checkpoints=CheckpointFolder(out / "checkpoints"),
        device=torch.device("cpu"),
        checkpoint_meta={},
        seed=1,
        sample_rate=config.model.sample_rate,
        hooks=LoopHooks(log=log),
    )


def overhead(config: Config, steps: int, turns: int) -> dict[str, Any]:
    """Loop and bare steps on the same batches, one after the other, `turns` times."""
    import torch

    from raytrain.tracking import JsonLinesTracker, MultiTracker
    from raytrain.tracking.mlflow import MlflowTracker
    from raytrain.training.step import train_step

    torch.set_num_threads(1)
    workspace = Workspace(config, config.run_dir)
    sizes = workspace.profiles()[0].batch_sizes
    config = config.model_copy(update={"train": replace(config.train, max_steps=steps)})
    with make_loader(workspace, sizes, None, [0], 1) as loader:
        kept = [loaded.batch for loaded in islice(loader, steps)]
    audio = sum(int(batch.audio_lengths.sum()) for batch in kept) / config.model.sample_rate
    bare, whole = [], []
    for turn in range(turns):
        loop = new_loop(config, workspace, (), config.run_dir / "bare", None)
        loop.state.model.train()
        start = time.perf_counter()
        for number, batch in enumerate(kept):
            train_step(loop.state.model, [batch], loop.state.optimizer, config.train, precision="fp32", seeds=[number])
        bare.append(time.perf_counter() - start)

        out = config.run_dir / f"loop-{turn}"
        mlflow = MlflowTracker.open(f"sqlite:///{out.parent / 'loop.db'}", "benchmark", "loop", system_metrics=True)
        tracker = MultiTracker(JsonLinesTracker(out / "metrics.jsonl"), mlflow)
        with make_loader(workspace, sizes, None, [0], 1) as loader:
            loop = new_loop(config, workspace, loader, out, tracker.log_metrics)
            start = time.perf_counter()
            loop.run()
            whole.append(time.perf_counter() - start)
        tracker.close()
        shutil.rmtree(out)
    costs = [loop / step - 1 for loop, step in zip(whole, bare, strict=True)]
    return {
        "steps": steps,
        "bare_step_audio_seconds_per_second": [round(audio / seconds, 1) for seconds in bare],
        "whole_loop_audio_seconds_per_second": [round(audio / seconds, 1) for seconds in whole],
        "loop_costs": [round(cost, 4) for cost in costs],
        "loop_costs_median": round(statistics.median(costs), 4),
    }


def in_folder(config: Config, name: str, **train: Any) -> Config:
    """The same run with other settings in a separate folder."""
    run = config.run.model_copy(update={"root": f"{config.run.root}/{name}"})
    copy = config.model_copy(update={"run": run, "train": replace(config.train, **train)})
    shutil.copytree(config.run_dir, copy.run_dir)
    return copy


def scaling(config: Config, steps: int) -> dict[str, Any]:
    """Audio-seconds per second on 1, 2 and 4 workers at the same total batch, after the first ten steps."""
    figures = {}
    for workers in (1, 2, 4):
        copy = in_folder(
            config,
            f"workers-{workers}",
            num_workers=workers,
            accumulate=4 // workers,
            max_steps=steps,
            log_every_steps=10,
        )
        run_pipeline(copy, Console(quiet=True), ("train",))
        lines = [json.loads(line) for line in (copy.run_dir / "metrics.jsonl").read_bytes().splitlines()]
        rates = [line["audio_seconds_per_second"] for line in lines if line.get("step", 0) > 10]
        figures[f"audio_seconds_per_second_with_{workers}_workers"] = round(statistics.median(rates), 1)
    return figures


def recovery(config: Config) -> dict[str, Any]:
    """Seconds from a kill to the next step's beginning."""
    copy = in_folder(config, "recovery", num_workers=2, max_steps=60, checkpoint_every_steps=10, log_every_steps=1)
    killed: list[tuple[float, int]] = []
    seconds: list[float] = []
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(0.005):
            with contextlib.suppress(OSError, ValueError):
                pid, step = map(int, (copy.run_dir / "faults" / "doing-1").read_bytes().split()[:2])
                if len(killed) > len(seconds):
                    if pid != killed[-1][1]:
                        seconds.append(time.perf_counter() - killed[-1][0])
                elif len(killed) < 3 and step >= 15 * (len(killed) + 1):
                    killed.append((time.perf_counter(), pid))
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    run_pipeline(copy, Console(quiet=True), ("train",))
    stopped.set()
    thread.join()
    return {"seconds_from_kill_to_next_step": [round(delay, 1) for delay in seconds]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--utterances", type=int, default=1200)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(Path(folder), arguments.utterances)
        result = overhead(config, arguments.steps, arguments.turns)
        with ray_session(ClusterSection(num_cpus=max(4, os.cpu_count() or 1))):
            result |= scaling(config, max(30, arguments.steps // 3))
            result |= recovery(config)
    record("training", result, as_json=arguments.json)


if __name__ == "__main__":
    main()
