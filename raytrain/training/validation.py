"""Validation during training: every rank decodes its share of the dev rows and the counts are added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytrain.data.batch import SpeechBatch
from raytrain.model.decoding import greedy
from raytrain.model.loss import canary_loss
from raytrain.training.evaluation import ErrorCounts, count_errors


@dataclass(frozen=True)
class Validator:
    """Computes validation loss (cross-entropy per token) and WER of greedy decoding.

    `batches` yields (texts, batch) pairs of this rank's share, anew at each call; `decode` turns ids into text.
    """

    batches: Callable[[], Iterable[tuple[Sequence[str], SpeechBatch]]]
    decode: Callable[[list[int]], str]
    eos_id: int
    max_generation_delta: int = 50

    @torch.no_grad()
    def __call__(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Run on all ranks together; returns the same numbers everywhere. `model` is not wrapped by DDP."""
        was_training = model.training
        model.eval()
        counts, loss_sum, num_tokens = ErrorCounts(), 0.0, 0.0
        for texts, batch in self.batches():
            batch = batch.to(device)
            states, lengths = model.encode(batch.audio, batch.audio_lengths)
            counts += count_errors(texts, self._transcribe(model, states, lengths, batch))
            output = model(batch.audio, batch.audio_lengths, batch.input_ids, batch.input_lengths)
            loss = canary_loss(
                output, batch.labels, batch.input_lengths,
                ctc_targets=None, ctc_target_lengths=None, ctc_weight=0.0, label_smoothing=0.0,
            )  # fmt: skip
            loss_sum += float(loss.ce_sum)
            num_tokens += float(loss.num_tokens)
        model.train(was_training)
        totals = torch.tensor([*counts.as_tuple(), loss_sum, num_tokens], dtype=torch.float64)
        if dist.is_initialized():
            totals = totals.to(device)
            dist.all_reduce(totals)
        *numbers, loss_sum, num_tokens = totals.tolist()
        counts = ErrorCounts(*(int(number) for number in numbers))
        return {"wer": counts.rate, "val_loss": loss_sum / max(num_tokens, 1.0)}

    def _transcribe(self, model: Any, states: Any, lengths: Any, batch: SpeechBatch) -> list[str]:
        width = int(batch.prompt_lengths.max())
        ids = greedy(
            model, states, lengths, batch.tokens[:, :width], batch.prompt_lengths, self.eos_id,
            max_generation_delta=self.max_generation_delta,
        )  # fmt: skip
        return [self.decode(row) for row in ids]
