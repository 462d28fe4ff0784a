"""The device that a worker computes on, or the reason why a GPU worker has none.

    device = gpu_device()            # in a process that Ray gave a GPU
    device.kind, device.torch        # "cuda", torch.device("cuda:0")

With `RAYTRAIN_EMULATED_GPU=NAME:BYTES` in the environment of a node, its GPU workers take every branch of the code that
workers on a GPU do (`kind` is cuda: resources, bf16 autocast, budgets, profiles by name) while their tensors stay on
the CPU (`torch` is cpu). It is for tests on machines without GPUs, where Ray only claims to have them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytrain.errors import ClusterError, first_line

if TYPE_CHECKING:
    from torch import device as TorchDevice

EMULATED_GPU = "RAYTRAIN_EMULATED_GPU"


@dataclass(frozen=True)
class Device:
    """A worker's device.

    `kind` is cuda or cpu and selects the branches of the code; `torch_name` is the device of tensors (`cuda:0`,
    `cpu`). `name` and `total_bytes` are the GPU's, empty and 0 on a CPU.
    """

    kind: str
    torch_name: str
    name: str = ""
    total_bytes: int = 0

    @property
    def torch(self) -> TorchDevice:
        """The `torch.device` of tensors."""
        import torch

        return torch.device(self.torch_name)

    @property
    def is_emulated(self) -> bool:
        """Whether the GPU branches run on the CPU."""
        return self.kind == "cuda" and self.torch_name == "cpu"

    @property
    def pins_memory(self) -> bool:
        """Whether host memory can be pinned for transfers to it."""
        return self.torch_name.startswith("cuda")


CPU = Device("cpu", "cpu")


def emulated_gpu() -> Device | None:
    """The GPU that this process emulates. Raises `ClusterError` for a malformed setting."""
    text = os.environ.get(EMULATED_GPU)
    if not text:
        return None
    name, _, size = text.rpartition(":")
    if not name or not size.isdigit() or int(size) < 1:
        raise ClusterError(
            f"{EMULATED_GPU} can't be read",
            got=text,
            allowed="NAME:BYTES",
            remedy=f"unset {EMULATED_GPU}, or set it like A100:85899345920",
        )
    return Device("cuda", "cpu", name, int(size))


def gpu_device(index: Callable[[], int] = lambda: 0) -> Device:
    """The device of a worker that Ray gave a GPU, which becomes torch's current one.

    `index` selects the worker's GPU among the visible ones: Ray Train's workers see all GPUs of their group, other
    workers only their own. Raises `ClusterError` with the reason if torch can't use a GPU here.
    """
    emulated = emulated_gpu()
    if emulated is not None:
        return emulated
    devices = visible_gpus()
    import torch

    device = devices[index()]
    torch.cuda.set_device(device.torch)
    return device


def worker_device(cuda: bool, index: Callable[[], int] = lambda: 0) -> Device:
    """The device of a worker with (`cuda`) or without a GPU; see `gpu_device`."""
    return gpu_device(index) if cuda else CPU


def visible_gpus() -> list[Device]:
    """The GPUs that torch can use in this process, at least one. Raises `ClusterError` with the reason if there is
    none."""
    emulated = emulated_gpu()
    if emulated is not None:
        return [emulated]
    import torch

    try:
        if not torch.backends.cuda.is_built():
            raise RuntimeError(f"this torch ({torch.__version__}) was built without CUDA")
        torch.cuda.init()
        count = torch.cuda.device_count()
        if not count:
            raise RuntimeError(f"torch sees no GPU; CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES')!r}")
        return [_described(index) for index in range(count)]
    except (RuntimeError, AssertionError) as error:  # torch raises both, the latter if it was built without CUDA
        raise ClusterError(
            "Ray hands out GPUs here that torch can't use",
            why=first_line(error),
            remedy="install a torch build with CUDA that the driver supports (compare nvidia-smi with "
            "torch.version.cuda), or set train.device: cpu; `raytrain doctor` checks every node",
        ) from error


def _described(index: int) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return Device("cuda", f"cuda:{index}", properties.name, properties.total_memory)
