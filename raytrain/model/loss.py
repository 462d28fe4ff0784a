"""Training losses as sums over tokens; the step divides them by the global token count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn import functional as F

from raytrain.model.canary import CanaryOutput
from raytrain.model.features import mask_until


class LossSums(NamedTuple):
    """() float32 tensors: weighted total, cross-entropy, CTC (each summed), and the number of label tokens."""

    total_sum: Tensor
    ce_sum: Tensor
    ctc_sum: Tensor
    num_tokens: Tensor


def canary_loss(
    output: CanaryOutput,
    labels: Tensor,
    label_lengths: Tensor,
    *,
    ctc_targets: Tensor | None,
    ctc_target_lengths: Tensor | None,
    ctc_weight: float,
    label_smoothing: float,
    prompt_lengths: Tensor | None = None,
) -> LossSums:
    """(1 − w)·cross-entropy + w·CTC. `labels`: (B, U), valid before `label_lengths`; CTC targets: (B, L).

    With `prompt_lengths` (B,), labels of the prompt do not count. Label smoothing follows NeMo: ε is spread over the
    wrong classes only, hence V·ε/(V−1) for PyTorch.
    """
    logits = output.logits
    vocab = logits.shape[-1]
    valid = mask_until(label_lengths, labels.shape[1])
    if prompt_lengths is not None:  # a label is one position before its token
        valid = valid & ~mask_until(prompt_lengths - 1, labels.shape[1])
    targets = labels.masked_fill(~valid, -100)
    smoothing = vocab * label_smoothing / (vocab - 1)
    ce_sum = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=smoothing
    )
    ctc_sum = ce_sum.new_zeros(())
    if ctc_weight:
        assert ctc_targets is not None and ctc_target_lengths is not None
        ctc_sum = _ctc(output, ctc_targets, ctc_target_lengths)
    total = (1 - ctc_weight) * ce_sum + ctc_weight * ctc_sum
    return LossSums(total, ce_sum, ctc_sum, valid.sum())


def _ctc(output: CanaryOutput, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """CTC with the blank last; utterances with more tokens than frames count 0 instead of infinity."""
    assert output.ctc_logits is not None, "ctc_weight needs a model with ctc_head"
    log_probs = output.ctc_logits.float().log_softmax(-1).transpose(0, 1)
    if log_probs.is_meta:
        return _MetaCtc.apply(log_probs, targets.shape[1])
    return F.ctc_loss(
        log_probs,
        targets,
        output.encoder_lengths,
        target_lengths,
        blank=log_probs.shape[-1] - 1,
        reduction="sum",
        zero_infinity=True,
    )


class _MetaCtc(torch.autograd.Function):
    """Allocates the same memory as CTC (forward variables, backward variables, gradient), for tracing on meta, where
    PyTorch has no CTC."""

    @staticmethod
    def forward(ctx: FunctionCtx, log_probs: Tensor, target_length: int) -> Tensor:
        time, batch, _ = log_probs.shape
        alpha = log_probs.new_empty(batch, time, 2 * target_length + 1)
        ctx.save_for_backward(log_probs, alpha)
        return log_probs.new_empty(())

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> tuple[Tensor, None]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        log_probs, alpha = saved
        beta = torch.empty_like(alpha)
        result = torch.empty_like(log_probs)
        del beta
        return result, None
