"""The part of `benchmarks.reduction` that is measured: gradients exchanged in bf16 compared with float32."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._models import config_of
from raytrain.data.batch import SpeechBatch
from raytrain.model.canary import Canary
from raytrain.training.optim import make_optimizer, set_learning_rate
from raytrain.training.parallel import parallel_model
from raytrain.training.settings import TrainSettings
from raytrain.training.step import train_step

NUM_RANKS = 2
_WARMUP, _PEAK = 20, 1e-3


def accuracy(num_steps: int) -> dict[str, Any]:
    """The first gradient's relative error with two ranks, its growth with more ranks, and losses of a training."""
    folder_losses = {}
    for shard in (False, True):
        for reduce_in in ("fp32", "bf16"):
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(_rank, (folder, shard, reduce_in, num_steps), nprocs=NUM_RANKS)
                folder_losses[f"{'fsdp2' if shard else 'ddp'}_{reduce_in}"] = json.loads(
                    (Path(folder) / "losses.json").read_text()
                )
    return {"steps": num_steps, "trained": folder_losses, "error_by_ranks": errors_by_ranks()}


def errors_by_ranks() -> dict[str, float]:
    """Relative error (of norms) of a mean over 2 to 512 ranks that is added up in bf16, one rank after another as in a
    ring. The gradients of ranks share a part, as those of batches do, with 4 times its standard deviation in noise."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1 << 16, generator=generator)
    errors = {}
    for num_ranks in (2, 8, 64, 512):
        total, rounded = torch.zeros_like(common, dtype=torch.float64), torch.zeros_like(common, dtype=torch.bfloat16)
        for _ in range(num_ranks):
            gradient = common + 4 * torch.randn(common.shape, generator=generator)
            total += gradient.double() / num_ranks
            rounded += (gradient / num_ranks).bfloat16()
        errors[str(num_ranks)] = float(f"{float((rounded.double() - total).norm() / total.norm()):.2g}")
    return errors


def _rank(rank: int, folder: str, shard: bool, reduce_in: str, num_steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS)
    settings = TrainSettings(num_workers=NUM_RANKS, shard=shard, reduce_in="bf16" if reduce_in == "bf16" else "fp32")
    torch.manual_seed(0)
    model = Canary(replace(config_of("canary-tiny"), encoder_layers=2, decoder_layers=1, dropout=0.0)).train()
    wrapped = parallel_model(model, settings, NUM_RANKS, torch.device("cpu"))
    optimizer = make_optimizer(model, settings)
    torch.manual_seed(1 + rank)
    data = [SpeechBatch.synthetic(2, 1000, 12, vocab=200, device="cpu") for _ in range(4)]
    losses, norms = [], []
    for step in range(num_steps):
        set_learning_rate(optimizer, _PEAK * min(1.0, (step + 1) / _WARMUP))
        result = train_step(wrapped, [data[step % len(data)]], optimizer, settings, precision="fp32")
        sums = result.sums.clone()
        dist.all_reduce(sums)
        losses.append(float(sums[0] / sums[3]))
        norms.append(float(result.grad_norm))
    if rank == 0:
        tenths = [sum(losses[at : at + 4]) / 4 for at in range(0, num_steps - 3, max(4, num_steps // 10))]
        figures = {"first_grad_norm": norms[0], "losses": [round(loss, 5) for loss in (*tenths, sum(losses[-4:]) / 4)]}
        (Path(folder) / "losses.json").write_text(json.dumps(figures))
    dist.barrier()
    os._exit(0)  # DDP's teardown sometimes deadlocks with a gloo thread that waits for the GIL
