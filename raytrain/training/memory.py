"""Predict the memory of a training step without the device: trace it on `meta` tensors.

Meta tensors have shapes and no data. Run the real step on them and note when each storage is made and when it
is freed, and the highest sum of live bytes is the step's peak. The peak is close to affine in the batch size,
so two traces say where to look for the largest batch that fits.

    peak = step_peak_bytes(model_config, settings, batch_size=16, max_duration_ms=4000, max_tokens=40)
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytrain.data.batch import SpeechBatch
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.training.optim import make_optimizer
from raytrain.training.settings import TrainSettings
from raytrain.training.step import train_step

_BLOCK_BYTES = 512  # the CUDA caching allocator's smallest unit


def rounded(num_bytes: int) -> int:
    """What an allocation of `num_bytes` takes from the device."""
    return -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of all storages that operators made and nobody freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watchers: dict[int, weakref.ref] = {}

    def watch(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed; a storage that is known already counts once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = rounded(storage.nbytes())
        self._sizes[key] = size
        self._watchers[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        self._watchers.pop(key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.watch(leaf)
        return result


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step: what stays between steps (parameters, buffers, optimizer) and the highest point."""

    resident_bytes: int
    peak_bytes: int


def trace_step(
    config: ModelConfig,
    settings: TrainSettings,
    *,
    batch_size: int,
    max_duration_ms: int,
    max_tokens: int,
    world_size: int = 1,
) -> StepMemory:
    """Trace two steps on meta tensors (the second one has optimizer states) and return their bytes.

    With several workers DDP's reducer keeps a second copy of the gradients in its buckets.
    """
    meter = LiveBytes()
    with torch.device("meta"):
        model = Canary(config).train()
        model.encoder.checkpoint_blocks = settings.activation_checkpointing
        optimizer = make_optimizer(model, settings)
        batch = SpeechBatch.synthetic(
            batch_size,
            max_duration_ms,
            max_tokens,
            vocab=config.vocab_size,
            device="meta",
            sample_rate=config.sample_rate,
        )
    for tensor in [*model.parameters(), *model.buffers(), *batch.tensors()]:
        meter.watch(tensor)
    reducer = sum(p.numel() * p.element_size() for p in model.parameters()) if world_size > 1 else 0
    resident = 0
    with meter:
        for _ in range(2):
            train_step(model, batch, optimizer, settings, precision="fp32", label_smoothing=config.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            resident = meter.live
    return StepMemory(resident_bytes=resident + reducer, peak_bytes=meter.peak + reducer)


@dataclass(frozen=True)
class MemoryLine:
    """Peak bytes as an affine function of the batch size: `base_bytes + batch_size · slope_bytes`."""

    base_bytes: float
    slope_bytes: float

    @classmethod
    def through(cls, small: int, small_peak: int, large: int, large_peak: int) -> MemoryLine:
        """The line through two traced points; `small` and `large` are batch sizes."""
        slope = (large_peak - small_peak) / (large - small)
        return cls(base_bytes=small_peak - small * slope, slope_bytes=slope)

    def largest_batch(self, budget_bytes: int) -> int:
        """The largest batch size on the line within the budget, at least 1."""
        return max(1, int((budget_bytes - self.base_bytes) // max(self.slope_bytes, 1.0)))
