"""Predict the memory of a training step without the device: trace it on `meta` tensors.

Meta tensors have shapes and no data. Run the real step on them and record when each storage is allocated and freed: the
highest sum of live bytes is the step's peak.

    tracer = StepTracer(model_config, settings, precision="bf16", world_size=8)
    tracer.trace(batch_size=16, max_duration_ms=4000, max_tokens=40).peak_bytes
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle

from raytrain.data.batch import SpeechBatch
from raytrain.model.block import blocks_of
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.training.acceleration import compiles, fuses_attention
from raytrain.training.memory.compiled_trace import CompiledBlocks, first_inputs
from raytrain.training.memory.live_bytes import DeviceLike, LiveBytes, cuda_block, rounded
from raytrain.training.memory.ranks import ShardedRank, WholeRank, area_of
from raytrain.training.parallel import is_sharded, micro_batches
from raytrain.training.settings import TrainSettings
from raytrain.training.step import train_step

# Utterances, milliseconds and tokens of the batch for which blocks are compiled; any others would do that are not equal
# to each other in frames.
_EXAMPLE = (13, 4720, 23)

TRACER_VERSION = 3  # raised where predictions change: sizes from an older tracer are predicted again


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step: persistent (parameters, optimizer, reducer), at the peak, and by origin at the peak.

    `at_peak` is bytes by (phase, area): parameters, gradients and optimizer; activations, which forward made and
    backward needs; and temporary, which backward allocates. The area is the module that allocated them, if any.
    """

    resident_bytes: int
    peak_bytes: int
    at_peak: dict[tuple[str, str], int] = field(default_factory=dict)

    @classmethod
    def of(cls, meter: LiveBytes, resident_bytes: int) -> StepMemory:
        """What a meter saw since it was reset."""
        return cls(resident_bytes, meter.peak, {origin: size for origin, size in meter.at_peak.items() if size})

    def by_phase(self) -> dict[str, int]:
        """Bytes at the peak by phase, the largest first."""
        return _summed(self.at_peak, 0)

    def by_module(self) -> dict[str, int]:
        """Bytes at the peak by module, the largest first."""
        return _summed(self.at_peak, 1)


def _summed(at_peak: dict[tuple[str, str], int], part: int) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for origin, size in at_peak.items():
        sums[origin[part]] += size
    return dict(sums.most_common())


def meta_batch(config: ModelConfig, batch_size: int, max_duration_ms: int, max_tokens: int) -> SpeechBatch:
    """A synthetic batch on `meta` tensors."""
    with torch.device("meta"):
        return SpeechBatch.synthetic(
            batch_size,
            max_duration_ms,
            max_tokens,
            vocab=config.vocab_size,
            device="meta",
            sample_rate=config.sample_rate,
        )


class StepTracer:
    """Traces training steps of one model as a `device_type` (cuda or cpu) would run them. `precision` is fp32 or bf16.

    With a `world_size` above 1 the step is that of one of as many ranks: of a model in DDP, or with `shard` (by default
    as the settings say) of one that FSDP2 spreads over the ranks; see `ranks.py`. With `compiled` its blocks are
    compiled.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: TrainSettings,
        *,
        precision: str = "fp32",
        world_size: int = 1,
        device_type: str = "cuda",
        remember: bool = True,
        shard: bool | None = None,
        compiled: bool | None = None,
    ) -> None:
        self._config, self._settings, self._precision = config, settings, precision
        self._device_type, self._num_batches = device_type, micro_batches(settings, world_size)
        with torch.device("meta"):
            self._model = Canary(config).train()
        compiled = compiles(settings, device_type) if compiled is None else compiled
        self._model.fuse_attention(fuses_attention(config, settings, device_type))
        self._model.set_checkpointing(settings.activation_checkpointing, compiled=compiled)
        self._meter = LiveBytes(remember, cuda_block if device_type == "cuda" else rounded)
        averaged = settings.average_decay is not None
        is_part = is_sharded(settings, world_size) if shard is None else shard and world_size > 1
        self._rank: WholeRank | ShardedRank
        if is_part:
            self._rank = ShardedRank(self._model, self._meter, world_size, averaged, device_type, settings.reduce_in)
        else:
            self._rank = WholeRank(self._model, self._meter, world_size, averaged, settings.reduce_in)
        self._blocks: CompiledBlocks | None = None
        if compiled:
            self._blocks = self._compiled_blocks()

    def _compiled_blocks(self) -> CompiledBlocks:
        blocks = blocks_of(self._model)
        example = meta_batch(self._config, *_EXAMPLE)
        return CompiledBlocks(
            blocks,
            first_inputs(blocks, lambda: self._run(example)),
            self._settings.activation_checkpointing,
            self._meter,
            lambda: DeviceLike(self._device_type, lambda: None),
        )

    def trace(self, batch_size: int, max_duration_ms: int, max_tokens: int) -> StepMemory:
        """Bytes of a step of `batch_size` utterances at a bucket's upper edges."""
        meter = self._meter
        meter.reset()
        batch = meta_batch(self._config, batch_size, max_duration_ms, max_tokens)
        self._rank.watch()
        resident = meter.live
        for tensor in batch.tensors():
            meter.watch(tensor, "activations", "batch")
        self._run(batch)
        return StepMemory.of(meter, resident)

    def _run(self, batch: SpeechBatch) -> None:
        meter = self._meter

        def backward_begins() -> None:
            meter.phase, meter.area = "temporary", "backward"

        device_like = DeviceLike(self._device_type, backward_begins)
        with _recomputed_blocks(self._model, device_like), _named_areas(self._model, meter), without_gc():
            try:
                with self._compiled(), meter, device_like:
                    train_step(
                        self._model,
                        [batch] * self._num_batches,
                        self._rank,
                        self._settings,
                        precision=self._precision,
                        label_smoothing=self._config.label_smoothing,
                    )
            finally:
                self._rank.zero_grad()

    def _compiled(self) -> AbstractContextManager[None]:
        return nullcontext() if self._blocks is None else self._blocks.active()


@contextmanager
def without_gc() -> Iterator[None]:
    """A trace creates and frees thousands of objects, without cycles; garbage collection would take a fifth of its
    time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _recomputed_blocks(model: Canary, device_like: DeviceLike) -> Iterator[None]:
    """Tell `device_like` where a recomputed block begins and ends."""
    hooks: list[RemovableHandle] = []
    for block in blocks_of(model):
        hooks.append(block.register_forward_pre_hook(device_like.block_begins))
        # Recomputation stops with an exception as soon as it has what backward needs.
        hooks.append(block.register_forward_hook(device_like.block_ends, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _named_areas(model: Canary, meter: LiveBytes) -> Iterator[None]:
    """Record which module of the first two levels is running."""
    handles: list[RemovableHandle] = []
    before: list[str] = []

    def enter(area: str, *_: object) -> None:
        before.append(meter.area)
        meter.area = area

    def leave(*_: object) -> None:
        meter.area = before.pop()

    for name, module in model.named_modules():
        # A module list is never called itself.
        if name and (name.count(".") < 2 or name.split(".")[2].isdigit() and name.count(".") == 2):
            handles.append(module.register_forward_pre_hook(partial(enter, area_of(name))))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
