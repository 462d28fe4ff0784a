"""Memory questions that only a device can answer: what each kind of layer keeps and needs compared with its trace, what
libraries allocate, and what a failed probe leaves behind.

    memory_questions("cuda")     # seconds; on "cpu" only the traced side, to see the format
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from raytrain.model.config import ModelConfig
from raytrain.model.decoder import Attention, DecoderFeedForward
from raytrain.model.encoder import Convolution, FeedForward, RelativeAttention, Subsampling
from raytrain.model.mixed import MixedLayerNorm
from raytrain.training.memory.live_bytes import DeviceLike, LiveBytes
from raytrain.training.memory.step_meter import StepMeter
from raytrain.training.settings import TrainSettings

MIB = 2**20
_WIDTH, _HEADS, _INNER, _DROPOUT = 1024, 8, 4096, 0.1


@dataclass(frozen=True)
class Layer:
    """`make` returns a module or a function and its inputs; floating-point inputs get gradients."""

    name: str
    make: Callable[[int], tuple[Callable[..., Tensor], tuple[Tensor, ...]]]


def _states(batch: int, time: int = 256) -> Tensor:
    return torch.randn(batch, time, _WIDTH).bfloat16()


def _mask(batch: int, time: int = 256) -> Tensor:
    return torch.ones(batch, 1, 1, time, dtype=torch.bool)


def _cross_attention(batch: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    attention = Attention(_WIDTH, _HEADS, _DROPOUT)

    def run(x: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        return attention(x, *attention.keys_values(states), mask)

    return run, (_states(batch, 64), _states(batch), _mask(batch))


def _self_attention(batch: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    attention = Attention(_WIDTH, _HEADS, _DROPOUT)
    return (lambda x: attention(x, *attention.keys_values(x), None, causal=True)), (_states(batch, 64),)


def _subsampling(batch: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    module = Subsampling(128, 256, _WIDTH)
    return (lambda mel, frames: module(mel, frames)[0]), (
        torch.randn(batch, 128, 2048).bfloat16(),
        torch.full((batch,), 2048),
    )


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")


LAYERS = (
    Layer("dropout", lambda batch: (lambda x: F.dropout(x, _DROPOUT, True), (_states(batch),))),
    Layer("layer norm", lambda batch: (MixedLayerNorm(_WIDTH), (_states(batch),))),
    Layer("feed-forward", lambda batch: (FeedForward(_WIDTH, _INNER, _DROPOUT), (_states(batch),))),
    Layer(
        "relative attention",
        lambda batch: (
            RelativeAttention(_WIDTH, _HEADS, _DROPOUT),
            (_states(batch), torch.randn(511, _WIDTH).bfloat16(), torch.full((batch,), 256)),
        ),
    ),
    Layer("convolution", lambda batch: (Convolution(_WIDTH, 9), (_states(batch), torch.full((batch,), 256)))),
    Layer("subsampling", _subsampling),
    Layer("decoder feed-forward", lambda batch: (DecoderFeedForward(_WIDTH, _INNER, _DROPOUT), (_states(batch),))),
    Layer("decoder self-attention", _self_attention),
    Layer("decoder cross-attention", _cross_attention),
    Layer(
        "cross-entropy",
        lambda batch: (
            _cross_entropy,
            (torch.randn(batch, 64, 5248).bfloat16(), torch.zeros(batch, 64, dtype=torch.long)),
        ),
    ),
)


def _inputs(layer: Layer, batch: int, device: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    with torch.device(device):
        run, inputs = layer.make(batch)
    for value in inputs:
        # A mel spectrogram has no gradient.
        if value.is_floating_point() and layer.name != "subsampling":
            value.requires_grad_()
    return run, inputs


def traced_layer(layer: Layer, batch: int, device_type: str) -> dict[str, int]:
    """Bytes that a layer keeps after forward, and the peaks of forward and backward above the initial level."""
    meter = LiveBytes()
    device_like = DeviceLike(device_type, lambda: None)
    run, inputs = _inputs(layer, batch, "meta")
    with meter, device_like:
        output = run(*inputs)
        kept, forward = meter.live, meter.peak
        gradient = torch.empty_like(output)
        meter.peak = meter.live
        output.backward(gradient)
        return {"kept": kept, "forward_peak": forward, "backward_peak": meter.peak}


def measured_layer(layer: Layer, batch: int, device: str) -> dict[str, int] | None:
    """The same on a GPU; None on a CPU, which can't report it. It runs twice, so that workspaces already exist."""
    if torch.device(device).type != "cuda":
        return None
    for _ in range(2):
        run, inputs = _inputs(layer, batch, device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        output = run(*inputs)
        kept, forward = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        gradient = torch.empty_like(output)
        torch.cuda.reset_peak_memory_stats(device)
        output.backward(gradient)
        backward = torch.cuda.max_memory_allocated(device)
        del run, inputs, output, gradient
    return {"kept": kept - before, "forward_peak": forward - before, "backward_peak": backward - before}


def layers(device: str, batch: int = 64) -> list[dict[str, Any]]:
    """MiB of each kind of layer, traced and measured."""
    rows = []
    for layer in LAYERS:
        traced, measured = traced_layer(layer, batch, "cuda"), measured_layer(layer, batch, device)
        row: dict[str, Any] = {"layer": layer.name}
        for name, size in traced.items():
            row[f"{name}_traced_mib"] = round(size / MIB, 2)
            row[f"{name}_measured_mib"] = None if measured is None else round(measured[name] / MIB, 2)
        rows.append(row)
    return rows


def workspaces(device: str) -> dict[str, float | None]:
    """MiB that PyTorch still counts as allocated after the tensors of matrix products and convolutions are freed, in
    forward and in the backward thread: the workspaces of cuBLAS and cuDNN."""
    if torch.device(device).type != "cuda":
        return {"cublas_mib": None, "cublas_with_backward_mib": None}
    found, before = {}, torch.cuda.memory_allocated(device)
    for name, in_backward in (("cublas_mib", False), ("cublas_with_backward_mib", True)):
        a = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16, requires_grad=True)
        product = F.linear(a, a, a[0])
        if in_backward:
            product.sum().backward()
        del a, product
        found[name] = round((torch.cuda.memory_allocated(device) - before) / MIB, 2)
    return found


class _OutOfMemory:
    """Raises what CUDA raises, in the middle of a backward pass."""

    def __call__(self, gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (as asked)")


def left_over(device: str, model: ModelConfig | None = None) -> dict[str, Any]:
    """What a failed probe leaves behind: additional MiB allocated, next to the size of DDP's buckets, and whether its
    DDP object is still alive. Both should be about 0."""
    model = model or ModelConfig(encoder_layers=4, decoder_layers=1)
    is_new = not dist.is_initialized()
    meter = StepMeter(model, TrainSettings(num_workers=2), None, device)
    cuda, edges = meter._device.type == "cuda", (1000, 16)
    meter.measure(1, edges, 2)
    before = torch.cuda.memory_allocated() if cuda else None
    hook = next(meter._bare.parameters()).register_hook(_OutOfMemory())
    failed = meter.measure(1, edges, 1)
    hook.remove()
    wrapped = sum(isinstance(thing, nn.parallel.DistributedDataParallel) for thing in gc.get_objects())
    weights = sum(parameter.numel() * parameter.itemsize for parameter in meter._bare.parameters())
    if is_new:
        dist.destroy_process_group()
    return {
        "failed": not failed.fits,
        "ddp_alive_beside_the_new": wrapped - 1,
        "left_over_mib": None if before is None else round((torch.cuda.memory_allocated() - before) / MIB, 2),
        "buckets_mib": round(weights / MIB, 2),
    }


def memory_questions(device: str, batch: int = 64) -> dict[str, Any]:
    """All of the above."""
    # Workspaces first: they are allocated once per process.
    return {"workspaces": workspaces(device), "layers": layers(device, batch), "left_over": left_over(device)}
