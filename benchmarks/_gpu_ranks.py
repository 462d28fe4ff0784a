"""The part of `benchmarks.gpu` that trains on two ranks: a DDP step with NCCL on two GPUs, or with gloo on a CPU."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks._gpu import Shape, seconds_per_call, significant, wait_for
from benchmarks._gpu_run import Bench, Skipped
from benchmarks._models import config_of, random_model
from benchmarks.train_step import stepper
from raytrain.training.parallel import backend_of, parallel_model
from raytrain.training.settings import TrainSettings

NUM_RANKS = 2


def ddp(bench: Bench) -> None:
    """A training step on two ranks and on one: seconds, the all-reduce alone, whether ranks agree."""
    if bench.on_cuda and torch.cuda.device_count() < NUM_RANKS:
        raise Skipped(f"needs {NUM_RANKS} GPUs, found {torch.cuda.device_count()}")
    name, shape = ("canary-tiny", (2, 1.0, 12)) if bench.tiny else ("canary-1b-flash", (16, 20.0, 90))
    for rank, figures in enumerate(run_ranks(bench.device, name, shape)):
        bench.report(f"rank {rank}", figures)


def run_ranks(device: str, model: str, shape: Shape) -> list[dict[str, Any]]:
    """What each of two processes measures."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, device, model, shape), nprocs=NUM_RANKS)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def _rank(rank: int, folder: str, device: str, name: str, shape: Shape) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    # Each rank draws different weights; DDP broadcasts those of the first.
    model = random_model(config_of(name), device, seed=rank).to(device).train()
    backend = backend_of(device)
    alone = _step_seconds(model, shape, device)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS)
    rank_device = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    wrapped = parallel_model(model, TrainSettings(), NUM_RANKS, rank_device)
    together = _step_seconds(wrapped, shape, device)
    figures = {
        "backend": backend,
        "step_seconds_alone": significant(alone),
        "step_seconds": significant(together),
        "efficiency": significant(alone / together),
        **_reduction(model, device),
        "ranks_agree": _agree(model),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    # No cleanup: DDP's teardown sometimes deadlocks with a gloo thread that waits for the GIL.
    os._exit(0)


def _step_seconds(model: nn.Module, shape: Shape, device: str) -> float:
    """Seconds for a fixed number of steps: a rank that took more steps than the others would wait forever."""
    return seconds_per_call(stepper(model, shape, device), device, seconds=0.0, least=5)


def _reduction(model: nn.Module, device: str) -> dict[str, float]:
    """The gradients' all-reduce alone, in float32, and the resulting bytes per second on a link."""
    gradients = torch.zeros(sum(parameter.numel() for parameter in model.parameters()), device=device)
    dist.all_reduce(gradients)
    wait_for(device)
    start = time.perf_counter()
    dist.all_reduce(gradients)
    wait_for(device)
    taken = time.perf_counter() - start
    carried = 2 * (NUM_RANKS - 1) / NUM_RANKS * gradients.nbytes
    return {"all_reduce_ms": significant(1000 * taken), "bus_gb_per_second": significant(carried / taken / 1e9)}


def _agree(model: nn.Module) -> bool:
    """Whether all ranks have bit-identical weights."""
    sums = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()])
    gathered = [torch.empty_like(sums) for _ in range(NUM_RANKS)]
    dist.all_gather(gathered, sums)
    return all(torch.equal(gathered[0], other) for other in gathered)
