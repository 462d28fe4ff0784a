"""Validation during training: every rank decodes its share of the dev rows, and all score what all decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytrain.data.batch import SpeechBatch
from raytrain.model.decoding import DecodeSettings, transcribe_batch
from raytrain.model.loss import canary_loss
from raytrain.training.evaluation import Decoded, score_decoded


@dataclass(frozen=True)
class Validator:
    """Computes validation loss (cross-entropy per token), and WER and BLEU of what is decoded.

    `batches` yields (rows, batch) pairs of this rank's share, anew at each call; `is_translation` says it of a row;
    `decode` turns ids into text.
    """

    batches: Callable[[], Iterable[tuple[Sequence[Any], SpeechBatch]]]
    is_translation: Callable[[Any], bool]
    decode: Callable[[list[int]], str]
    eos_id: int
    search: DecodeSettings

    @torch.no_grad()
    def __call__(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Run on all ranks together; returns the same numbers everywhere. `model` is not wrapped by DDP."""
        was_training = model.training
        model.eval()
        decoded, loss_sum, num_tokens = [], 0.0, 0.0
        for rows, batch in self.batches():
            batch = batch.to(device)
            for row, text in zip(rows, self._transcribe(model, batch), strict=True):
                decoded.append(Decoded(row.language, row.corpus, self.is_translation(row), row.text, text))
            output = model(batch.audio, batch.audio_lengths, batch.input_ids, batch.input_lengths)
            loss = canary_loss(
                output, batch.labels, batch.input_lengths,
                ctc_targets=None, ctc_target_lengths=None, ctc_weight=0.0, label_smoothing=0.0,
            )  # fmt: skip
            loss_sum += float(loss.ce_sum)
            num_tokens += float(loss.num_tokens)
        model.train(was_training)
        shares = [(decoded, loss_sum, num_tokens)]
        if dist.is_initialized():
            shares = [None] * dist.get_world_size()
            dist.all_gather_object(shares, (decoded, loss_sum, num_tokens))
        every, losses, tokens = zip(*shares, strict=True)
        return {
            **score_decoded([one for share in every for one in share]),
            "val_loss": sum(losses) / max(sum(tokens), 1.0),
        }

    def _transcribe(self, model: Any, batch: SpeechBatch) -> list[str]:
        return [self.decode(best[0].ids) for best in transcribe_batch(model, batch, self.eos_id, self.search)]
