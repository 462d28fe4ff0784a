"""One complete training step; memory probes run the same code as training.

The loss is a sum over tokens divided by the **global** token count, over all ranks and micro-batches. Their token
counts may differ, and a mean of means would give short batches too much weight. DDP averages gradients over ranks,
hence the factor `world_size`.

Running statistics of batch norm take the mean over a step's micro-batches, each as if it were the only one. A rank's
statistics are those of its own shares; `TrainingLoop` averages them over ranks before they are used. Both are linear,
so the result does not depend on how shares are distributed over ranks.

A step with non-finite gradients changes nothing on any rank: gradients are the same everywhere, so all ranks notice.

Nothing here waits for the device: no `.item()`, no printing, no branch on a tensor's value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrain.data.batch import SpeechBatch
from raytrain.model.canary import CanaryOutput
from raytrain.model.loss import LossSums, canary_loss
from raytrain.training.average import WeightAverage
from raytrain.training.settings import TrainSettings


@dataclass(frozen=True)
class StepResult:
    """Device tensors of one step; reading them waits for the device, so read them rarely.

    `sums`: (4,) float32, of this rank: total loss, cross-entropy, CTC, tokens. `grad_norm`: () before clipping.
    `skipped`: () float32, 1 if the gradients were non-finite and nothing was changed.
    """

    sums: Tensor
    grad_norm: Tensor
    skipped: Tensor


class StepOptimizer(Protocol):
    """The optimizer interface of a step; a traced rank implements it without allocating anything."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""

    def step(self) -> object:
        """Update the weights."""


def computing_type(precision: str) -> torch.dtype:
    """The type that the model computes in, from the features on; its weights stay in float32."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def resolve_precision(precision: str, device_type: str) -> str:
    """`auto` is bf16 on a GPU and fp32 elsewhere."""
    if precision == "auto":
        return "bf16" if device_type == "cuda" else "fp32"
    return precision


def train_step(
    model: nn.Module,
    batches: Sequence[SpeechBatch],
    optimizer: StepOptimizer,
    settings: TrainSettings,
    *,
    precision: str,
    label_smoothing: float = 0.0,
    seeds: Sequence[int] | None = None,
    average: WeightAverage | None = None,
) -> StepResult:
    """Forward, loss and backward of each micro-batch, gradient reduction (when `model` is DDP), clip, update, average.

    `seeds`: one for each micro-batch, set before its forward pass.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    optimizer.zero_grad(set_to_none=True)
    statistics = StepStatistics(model)
    tokens, reduced = _global_tokens(batches, settings, world_size)
    sums = []
    for number, batch in enumerate(batches):
        if seeds is not None:
            torch.manual_seed(seeds[number])
        with _gradient_sync(model, number == len(batches) - 1):
            output = model(
                batch.audio,
                batch.audio_lengths,
                batch.input_ids,
                batch.input_lengths,
                dtype=computing_type(precision),
            )
            loss = _loss(output, batch, settings, label_smoothing)
            if reduced is not None:
                reduced.wait()  # on a GPU the stream waits, not the host
            (loss.total_sum * (world_size / tokens)).backward()
        parts = (loss.total_sum, loss.ce_sum, loss.ctc_sum, loss.num_tokens)
        sums.append(torch.stack([part.detach().float() for part in parts]))
        if len(batches) > 1:
            statistics.end_micro_batch()
    statistics.average()
    grad_norm, skipped = clip_and_update(model, optimizer, settings.clip_norm)
    statistics.restore_where(skipped)
    if average is not None:
        average.update()
    return StepResult(torch.stack(sums).sum(0), grad_norm, skipped)


def clip_and_update(model: nn.Module, optimizer: StepOptimizer, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Clip and update; returns the gradient norm, and 1 if it is non-finite and nothing changes."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = nn.utils.get_total_norm(gradients)
    if hasattr(grad_norm, "full_tensor"):  # of a sharded model
        grad_norm = grad_norm.full_tensor()
    skipped = (~torch.isfinite(grad_norm)).float()
    # Both as `GradScaler` sets them, which torch does not declare. Fused kernels divide the gradients by the one where
    # they read them, so clipping takes no pass over the gradients and a divisor of 1 changes no bit; where the other is
    # 1 they leave weights, moments and step counts unchanged.
    optimizer.grad_scale = clip_divisor(grad_norm, clip_norm)  # type: ignore[attr-defined]
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    return grad_norm, skipped


def clip_divisor(grad_norm: Tensor, clip_norm: float) -> Tensor:
    """() float32, as fused kernels take it: what gradients of this norm are divided by, 1 up to `clip_norm`; the
    inverse of `torch.nn.utils.clip_grad_norm_`'s factor."""
    return ((grad_norm + 1e-6) / clip_norm).clamp(min=1.0).float()


def _global_tokens(
    batches: Sequence[SpeechBatch], settings: TrainSettings, world_size: int
) -> tuple[Tensor, dist.Work | None]:
    """Labels of all ranks and micro-batches, and the work to wait for before they are used."""
    tokens = torch.stack([label_tokens(batch, settings) for batch in batches]).sum().float()
    return tokens, dist.all_reduce(tokens, async_op=True) if world_size > 1 else None


def _gradient_sync(model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[object]:
    """Ranks exchange gradients in the backward pass of a step's last micro-batch alone."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext() if is_last else model.no_sync()
    set_sync = getattr(model, "set_requires_gradient_sync", None)  # FSDP2
    if set_sync is not None:
        set_sync(is_last)
    return contextlib.nullcontext()


def _loss(output: CanaryOutput, batch: SpeechBatch, settings: TrainSettings, label_smoothing: float) -> LossSums:
    return canary_loss(
        output,
        batch.labels,
        batch.input_lengths,
        ctc_targets=batch.ctc_targets() if settings.ctc_weight else None,
        ctc_target_lengths=batch.ctc_target_lengths() if settings.ctc_weight else None,
        ctc_weight=settings.ctc_weight,
        label_smoothing=label_smoothing,
        prompt_lengths=batch.prompt_lengths if settings.mask_prompt else None,
    )


class StepStatistics:
    """Batch norm's running statistics in a step: each micro-batch begins with those from before the step.

    All statistics are one flat tensor, so that the number of kernels does not grow with the layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = running_statistics(model)
        self._sizes = [buffer.numel() for buffer in self._buffers]
        self._before = self._read()
        self._sum: Tensor | None = None
        self._num_batches = 0

    def end_micro_batch(self) -> None:
        """Add up a micro-batch's statistics, and restore those from before the step."""
        self._num_batches += 1
        self._sum = self._read() if self._sum is None else self._sum + self._read()
        self._write(self._before)

    def average(self) -> None:
        """Set the mean over micro-batches, if there are several."""
        if self._sum is not None:
            self._write(self._sum / self._num_batches)

    def restore_where(self, skipped: Tensor) -> None:
        """Restore the statistics from before a skipped step, without waiting for the device."""
        # A selection, since those of a skipped step may be NaN, which an interpolation would spread.
        self._write(torch.where(skipped > 0, self._before, self._read()))

    def _read(self) -> Tensor:
        flat = [buffer.reshape(-1) for buffer in self._buffers]
        return torch.cat(flat) if flat else torch.empty(0)

    def _write(self, flat: Tensor) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, list(flat.split(self._sizes)))


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of a model's batch norms."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]


def label_tokens(batch: SpeechBatch, settings: TrainSettings) -> Tensor:
    """() int64: labels that count in the loss."""
    prompts = (batch.prompt_lengths - 1).sum() if settings.mask_prompt else 0
    return batch.input_lengths.sum() - prompts
