"""Validation during training: every rank decodes its share of the dev rows, and all score what all decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytrain.data.batch import SpeechBatch
from raytrain.errors import TrainingError
from raytrain.model.decoding import DecodeSettings, transcribe_batch
from raytrain.model.loss import canary_loss
from raytrain.training.evaluation import Decoded, score_decoded


@dataclass(frozen=True)
class Validator:
    """Computes validation loss (cross-entropy per token), and WER and BLEU of what is decoded.

    `batches` yields (rows, batch) pairs of this rank's share, anew at each call; `is_translation` says it of a row;
    `decode` turns ids into text. A batch that does not fit into the device's memory is halved until it does;
    `on_out_of_memory` is told its size.
    """

    batches: Callable[[], Iterable[tuple[Sequence[Any], SpeechBatch]]]
    is_translation: Callable[[Any], bool]
    decode: Callable[[list[int]], str]
    eos_id: int
    search: DecodeSettings
    on_out_of_memory: Callable[[int], object] = lambda size: None

    @torch.no_grad()
    def __call__(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Run on all ranks together; returns the same numbers everywhere. `model` is not wrapped by DDP.

        Raises `TrainingError` where not even one utterance fits.
        """
        was_training = model.training
        model.eval()
        decoded, loss_sum, num_tokens = [], 0.0, 0.0
        for rows, batch in self.batches():
            for part, texts, ce_sum, tokens in self._in_parts(model, batch, device):
                loss_sum += ce_sum
                num_tokens += tokens
                for row, text in zip(rows[part], texts, strict=True):
                    decoded.append(Decoded(row.language, row.corpus, self.is_translation(row), row.text, text))
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

    def _in_parts(
        self, model: nn.Module, batch: SpeechBatch, device: torch.device
    ) -> Iterator[tuple[slice, list[str], float, float]]:
        """(utterances, their texts, summed cross-entropy, tokens) of a batch, in as few parts as fit into memory."""
        start, size = 0, len(batch)
        while start < len(batch):
            part = slice(start, min(start + size, len(batch)))
            # What did not fit is freed only after the except block has ended, which holds it.
            try:
                yield part, *self._measure(model, batch.part(part).to(device))
                start = part.stop
                continue
            except torch.OutOfMemoryError as error:
                why = str(error).strip().splitlines()[0]
            number = part.stop - part.start
            self.on_out_of_memory(number)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if number == 1:
                raise TrainingError(
                    "validation of a single utterance does not fit into the device's memory",
                    got=f"{int(batch.audio_lengths[start])} samples",
                    why=why,
                    remedy="lower oomptimize.memory_fraction, or leave such utterances out of data.dev",
                )
            size = -(-number // 2)

    def _measure(self, model: nn.Module, batch: SpeechBatch) -> tuple[list[str], float, float]:
        texts = self._transcribe(model, batch)
        output = model(batch.audio, batch.audio_lengths, batch.input_ids, batch.input_lengths)
        loss = canary_loss(
            output, batch.labels, batch.input_lengths,
            ctc_targets=None, ctc_target_lengths=None, ctc_weight=0.0, label_smoothing=0.0,
        )  # fmt: skip
        return texts, float(loss.ce_sum), float(loss.num_tokens)

    def _transcribe(self, model: Any, batch: SpeechBatch) -> list[str]:
        return [self.decode(best[0].ids) for best in transcribe_batch(model, batch, self.eos_id, self.search)]
