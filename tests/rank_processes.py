"""Run a function on several gloo ranks, each a process of its own."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist


def on_ranks(function, *arguments, num_ranks=2):
    """What `function(rank, *arguments)` returns on each rank; it is defined at the top of a module."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (num_ranks, folder, function, arguments), nprocs=num_ranks)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(num_ranks)]


def _rank(rank, num_ranks, folder, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # DDP's teardown sometimes deadlocks with a gloo thread that waits for the GIL
