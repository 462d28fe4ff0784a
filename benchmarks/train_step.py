"""Audio-seconds per second of a whole training step, by model and batch shape; optionally compared with NeMo.

    python -m benchmarks.train_step --models canary-tiny canary-180m-flash --shapes 4x4x30 2x10x60
    python -m benchmarks.train_step --models canary-tiny --nemo-python nemo-venv/bin/python

A shape is utterances × seconds × tokens. NeMo trains the same weights (written as .nemo) on the same shapes; the two
alternate in one run.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._models import random_parts
from benchmarks._peer import Peer, in_turn
from benchmarks._record import record
from raytrain.data.batch import SpeechBatch
from raytrain.model.formats.nemo import write_nemo
from raytrain.model.formats.portable import ModelParts
from raytrain.training.conversion import load_model
from raytrain.training.optim import make_optimizer
from raytrain.training.settings import TrainSettings
from raytrain.training.step import StepResult, resolve_precision, train_step


def stepper(model: nn.Module, shape: tuple[int, float, int], device: str) -> Callable[[], StepResult]:
    """A function that launches one training step on the device and does not wait for it.

    `model` is a `Canary` in training mode on that device, or DDP around it.
    """
    settings = TrainSettings()
    config = getattr(model, "module", model).config
    optimizer = make_optimizer(model, settings)
    batch, seconds, tokens = shape
    data = SpeechBatch.synthetic(batch, int(seconds * 1000), tokens, vocab=config.vocab_size, device=device)
    precision = resolve_precision("auto", device)
    return lambda: train_step(model, [data], optimizer, settings, precision=precision)


@contextlib.contextmanager
def peer_of(parts: ModelParts, python: Path | None) -> Iterator[Peer | None]:
    """NeMo with the same weights, or None."""
    if python is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        write_nemo(Path(folder) / "model.nemo", parts)
        with Peer(python, Path(folder) / "model.nemo", torch.get_num_threads()) as peer:
            yield peer


def parts_of(name: str) -> ModelParts:
    """A shipped model with random weights, or a model on disk."""
    return load_model(Path(name)) if Path(name).exists() else random_parts(name)


def measure(
    parts: ModelParts, shape: tuple[int, float, int], device: str, rounds: int, peer: Peer | None
) -> dict[str, Any]:
    start_step = stepper(parts.build().to(device).train(), shape, device)

    def step() -> float:
        return float(start_step().sums[0])  # synchronizes with the device

    step()
    batch, seconds, tokens = shape
    if peer is not None:
        peer.ask(do="train_step", batch=batch, seconds=seconds, tokens=tokens)
        found = in_turn(step, lambda: peer.ask(do="run")["seconds"], rounds)
    else:
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        found = {"ours_ms": round(1000 * statistics.median(times), 1)}
    found["audio_seconds_per_second"] = round(batch * seconds / found["ours_ms"] * 1000, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["canary-tiny"], help="names in configs/, or paths of models")
    parser.add_argument("--shapes", nargs="+", default=["4x4x30", "8x10x60"], help="utterances x seconds x tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--nemo-python", type=Path, help="Python of an environment that has nemo_toolkit[asr]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.nemo_python:
        arguments.device = "cpu"  # NeMo runs on the CPU
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"threads": arguments.threads}
    for name in arguments.models:
        parts = parts_of(name)
        label = Path(name).parent.name if Path(name).exists() else name
        with peer_of(parts, arguments.nemo_python) as peer:
            if peer is not None:
                result["peer"] = peer.versions
            for text in arguments.shapes:
                batch, seconds, tokens = text.split("x")
                shape = (int(batch), float(seconds), int(tokens))
                result[f"{label} {text}"] = measure(parts, shape, arguments.device, arguments.rounds, peer)
    record(
        "train_step_beside_nemo" if arguments.nemo_python else "train_step",
        result,
        as_json=arguments.json,
        device=arguments.device,
    )


if __name__ == "__main__":
    main()
