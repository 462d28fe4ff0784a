"""Validation during training: every rank decodes its share of the dev rows, and all ranks score the combined results.

Only readable rows are scored: the number of unreadable rows is a metric, and too many of them end training, since a
checkpoint that is best on whatever happened to be readable would be kept for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from raytrain.data.batch import SpeechBatch
from raytrain.decoding.halving import in_halves
from raytrain.decoding.search import transcribe_batch
from raytrain.decoding.settings import DecodeSettings
from raytrain.errors import TrainingError
from raytrain.evaluation.readable import are_enough_readable
from raytrain.evaluation.validation_scores import Decoded, score_decoded
from raytrain.model.canary import Canary
from raytrain.model.loss import canary_loss
from raytrain.training.limits import GaveUp

if TYPE_CHECKING:
    from raytrain.data.assignment import Row  # which imports pyarrow

_NUM_EXAMPLES = 3
OnError = Callable[["Row", Exception], object]


@dataclass
class _Share:
    """The results of one rank: summed cross-entropy of `num_tokens` tokens, texts, and the rows that can't be read."""

    decoded: list[Decoded] = field(default_factory=list)
    loss_sum: float = 0.0
    num_tokens: float = 0.0
    unreadable: int = 0
    examples: list[str] = field(default_factory=list)

    def miss(self, row: Row, error: Exception) -> None:
        """Count a row that can't be read."""
        self.unreadable += 1
        if len(self.examples) < _NUM_EXAMPLES:
            self.examples.append(f"corpus {row.corpus}: {error}")


class Measured(NamedTuple):
    """Texts of a part of a batch, and the summed cross-entropy of its tokens."""

    texts: list[str]
    loss_sum: float
    num_tokens: float


@dataclass(frozen=True)
class Validator:
    """Computes validation loss (cross-entropy per token), and WER and BLEU of the decoded texts.

    `batches` yields (rows, batch) pairs of this rank's share, from the start at each call, and passes each unreadable
    row to its argument; `is_translation` classifies a row; `decode` turns ids into text, and `normalize` normalizes
    references and hypotheses of a language before comparison. A batch that does not fit into the device's memory is
    halved until it does; `on_out_of_memory` gets its size.
    """

    batches: Callable[[OnError], Iterable[tuple[Sequence[Row], SpeechBatch]]]
    is_translation: Callable[[Row], bool]
    decode: Callable[[list[int]], str]
    eos_id: int
    search: DecodeSettings
    normalize: Callable[[str, str], str] = lambda text, language: text
    max_bad_fraction: float = 0.01
    on_out_of_memory: Callable[[int], object] = lambda size: None

    @torch.no_grad()
    def __call__(self, model: Canary, device: torch.device) -> dict[str, float]:
        """Run on all ranks together; returns the same numbers everywhere. `model` is not wrapped by DDP.

        `val_unreadable` counts the unreadable rows. Raises `TrainingError` if not even one utterance fits, and
        `GaveUp`, on all ranks, if more than `max_bad_fraction` of the rows or all of them can't be read.
        """
        was_training = model.training
        model.eval()
        mine = _Share()
        for rows, batch in self.batches(mine.miss):
            for part, measured in self._in_parts(model, batch, device):
                mine.loss_sum += measured.loss_sum
                mine.num_tokens += measured.num_tokens
                mine.decoded += [self._decoded(row, text) for row, text in zip(rows[part], measured.texts, strict=True)]
        model.train(was_training)
        shares = [mine]
        if dist.is_initialized():
            shares = [_Share() for _ in range(dist.get_world_size())]
            dist.all_gather_object(shares, mine)
        decoded = [text for share in shares for text in share.decoded]
        self._check_unreadable(shares, len(decoded))
        num_tokens = sum(share.num_tokens for share in shares)
        metrics = {**score_decoded(decoded), "val_unreadable": sum(share.unreadable for share in shares)}
        return metrics | ({"val_loss": sum(share.loss_sum for share in shares) / num_tokens} if num_tokens else {})

    def _decoded(self, row: Row, text: str) -> Decoded:
        reference, hypothesis = (self.normalize(words, row.language) for words in (row.text, text))
        return Decoded(row.language, row.corpus, self.is_translation(row), reference, hypothesis)

    def _check_unreadable(self, shares: Sequence[_Share], num_decoded: int) -> None:
        unreadable = sum(share.unreadable for share in shares)
        num_rows = num_decoded + unreadable
        if are_enough_readable(unreadable, num_rows, self.max_bad_fraction):
            return
        examples = [example for share in shares for example in share.examples][:_NUM_EXAMPLES]
        raise GaveUp(
            f"{unreadable} of {num_rows} dev recordings can't be read" if num_rows else "there is no dev row to score",
            got=f"{unreadable / num_rows:.2%}" if num_rows else None,
            allowed=f"data.max_bad_fraction = {self.max_bad_fraction:.2%}, and at least one that can be read",
            why="a score of the remaining rows would decide the best checkpoint and when training ends",
            remedy="check data.dev, data.root and that every training worker sees the audio; training resumes from its "
            "last checkpoint; quarantine.jsonl lists the files" + "".join(f"\n  {example}" for example in examples),
        )

    def _in_parts(self, model: Canary, batch: SpeechBatch, device: torch.device) -> Iterator[tuple[slice, Measured]]:
        """Utterances, and what was measured of them, of a batch in as few parts as fit into memory."""

        def too_large(part: slice, why: str) -> NoReturn:
            raise TrainingError(
                "validation of a single utterance does not fit into the device's memory",
                got=f"{int(batch.audio_lengths[part.start])} samples",
                why=why,
                remedy="lower oomptimize.memory_fraction, or leave such utterances out of data.dev",
            )

        def measure(part: slice) -> Measured:
            return self._measure(model, batch.part(part).to(device))

        return in_halves(len(batch), len(batch), measure, self.on_out_of_memory, too_large)

    def _measure(self, model: Canary, batch: SpeechBatch) -> Measured:
        texts = self._transcribe(model, batch)
        output = model(batch.audio, batch.audio_lengths, batch.input_ids, batch.input_lengths)
        loss = canary_loss(
            output,
            batch.labels,
            batch.input_lengths,
            ctc_targets=None,
            ctc_target_lengths=None,
            ctc_weight=0.0,
            label_smoothing=0.0,
        )
        return Measured(texts, float(loss.ce_sum), float(loss.num_tokens))

    def _transcribe(self, model: Canary, batch: SpeechBatch) -> list[str]:
        return [self.decode(best[0].ids) for best in transcribe_batch(model, batch, self.eos_id, self.search)]
