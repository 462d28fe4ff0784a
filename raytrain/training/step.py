"""One training step, whole: what training runs is what the memory probe runs.

The loss is a sum over tokens divided by the **global** token count. Ranks of one bucket may differ in their
number of tokens, and a mean of their means would weigh short batches too much. DDP averages gradients over
ranks, hence the factor `world_size`.

Nothing here waits for the device: no `.item()`, no printing, no branch on a tensor's value.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrain.data.batch import SpeechBatch
from raytrain.model.loss import canary_loss
from raytrain.training.settings import TrainSettings


@dataclass(frozen=True)
class StepResult:
    """Device tensors of one step; reading them waits for the device, so read them rarely.

    `sums`: (4,) float32, over all ranks: total loss, cross-entropy, CTC, tokens. `grad_norm`: () before clipping.
    """

    sums: Tensor
    grad_norm: Tensor


def autocast(device_type: str, precision: str) -> contextlib.AbstractContextManager:
    """bf16 autocast where asked for, else nothing; on meta the tracer does it (`memory.CudaLike`)."""
    if precision == "bf16" and device_type != "meta":
        return torch.autocast(device_type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def resolve_precision(precision: str, device_type: str) -> str:
    """`auto` is bf16 on a GPU and fp32 elsewhere."""
    if precision == "auto":
        return "bf16" if device_type == "cuda" else "fp32"
    return precision


def train_step(
    model: nn.Module,
    batch: SpeechBatch,
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    *,
    precision: str,
    label_smoothing: float = 0.0,
) -> StepResult:
    """Forward, loss, backward with gradient reduction (when `model` is DDP), clip, optimizer update."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    optimizer.zero_grad(set_to_none=True)
    with autocast(batch.audio.device.type, precision):
        output = model(batch.audio, batch.audio_lengths, batch.input_ids, batch.input_lengths)
    loss = canary_loss(
        output,
        batch.labels,
        batch.input_lengths,
        ctc_targets=batch.ctc_targets() if settings.ctc_weight else None,
        ctc_target_lengths=batch.ctc_target_lengths() if settings.ctc_weight else None,
        ctc_weight=settings.ctc_weight,
        label_smoothing=label_smoothing,
        prompt_lengths=batch.prompt_lengths if settings.mask_prompt else None,
    )
    parts = (loss.total_sum, loss.ce_sum, loss.ctc_sum, loss.num_tokens)
    sums = torch.stack([part.detach().float() for part in parts])
    if world_size > 1:
        dist.all_reduce(sums)
    (loss.total_sum * (world_size / sums[3])).backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    optimizer.step()
    return StepResult(sums=sums, grad_norm=grad_norm)
