"""`SpeechBatch`: the input of a training step; real and synthetic batches have one constructor each.

Shapes: B utterances, S samples, L tokens (prompt + text + end of text).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from raytrain.errors import DataError
from raytrain.lengths.schedule import StepPlan

if TYPE_CHECKING:
    from raytrain.data.assignment import Row


@dataclass(frozen=True)
class SpeechBatch:
    """`audio` (B, S) float32, zero-padded; `tokens` (B, L) int64, padded; lengths (B,) int64."""

    audio: Tensor
    audio_lengths: Tensor
    tokens: Tensor
    token_lengths: Tensor
    prompt_lengths: Tensor

    @classmethod
    def collate(
        cls,
        audios: Sequence[np.ndarray],
        tokens: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        *,
        pad_id: int,
    ) -> SpeechBatch:
        """Pad utterances to the longest: `audios` are (num_samples,) float32 each."""
        if not audios or len(audios) != len(tokens):
            raise DataError(
                "a batch needs audio and tokens of the same utterances",
                got=(len(audios), len(tokens)),
                remedy="pass at least one utterance, and a list of tokens for each audio",
            )
        audio_lengths, token_lengths = list(map(len, audios)), np.fromiter(map(len, tokens), np.int64, len(tokens))
        audio = torch.empty(len(audios), max(audio_lengths))  # each sample is written once, as audio or as padding
        for padded, samples in zip(audio.numpy(), audios, strict=True):
            padded[: len(samples)] = samples
            padded[len(samples) :] = 0
        ids = torch.full((len(tokens), int(token_lengths.max())), pad_id)
        is_token = np.arange(ids.shape[1]) < token_lengths[:, None]
        ids.numpy()[is_token] = np.fromiter(chain.from_iterable(tokens), np.int64, int(token_lengths.sum()))
        return cls(
            audio,
            torch.tensor(audio_lengths),
            ids,
            torch.from_numpy(token_lengths),
            torch.tensor(prompt_lengths),
        )

    @classmethod
    def synthetic(
        cls,
        batch_size: int,
        max_duration_ms: int,
        max_tokens: int,
        *,
        vocab: int,
        device: torch.device | str,
        sample_rate: int = 16000,
        prompt_length: int = 9,
    ) -> SpeechBatch:
        """A full batch at a bucket's upper edges, as memory probes use it. `device` may be `meta`."""
        samples = max_duration_ms * sample_rate // 1000
        prompt = min(prompt_length, max(max_tokens - 2, 1))
        full = partial(torch.full, (batch_size,), device=device, dtype=torch.int64)
        return cls(
            torch.randn(batch_size, samples, device=device),
            full(fill_value=samples),
            torch.randint(0, vocab, (batch_size, max(max_tokens, 2)), device=device),
            full(fill_value=max(max_tokens, 2)),
            full(fill_value=prompt),
        )

    def __len__(self) -> int:
        return self.audio.shape[0]

    def tensors(self) -> list[Tensor]:
        """All tensors in field order."""
        return [getattr(self, field.name) for field in fields(self)]

    def part(self, utterances: slice) -> SpeechBatch:
        """A slice of the utterances, without the padding that only the rest needs."""
        if (utterances.start or 0, utterances.stop) == (0, len(self)):
            return self
        audio, lengths, *tokens = (tensor[utterances] for tensor in self.tensors())
        return SpeechBatch(audio[:, : int(lengths.max())], lengths, *tokens)

    def to(self, device: torch.device | str) -> SpeechBatch:
        """The batch on another device; from pinned memory the copy is asynchronous."""
        return SpeechBatch(*(tensor.to(device, non_blocking=True) for tensor in self.tensors()))

    def pin_memory(self) -> SpeechBatch:
        """The batch in page-locked memory."""
        return SpeechBatch(*(tensor.pin_memory() for tensor in self.tensors()))

    @property
    def input_ids(self) -> Tensor:
        """(B, L−1) decoder input."""
        return self.tokens[:, :-1]

    @property
    def labels(self) -> Tensor:
        """(B, L−1) next tokens."""
        return self.tokens[:, 1:]

    @property
    def input_lengths(self) -> Tensor:
        """(B,) valid positions of input and labels."""
        return self.token_lengths - 1

    def ctc_target_lengths(self) -> Tensor:
        """(B,) number of text tokens: neither prompt nor end of text."""
        return self.token_lengths - self.prompt_lengths - 1

    def ctc_targets(self) -> Tensor:
        """(B, L) text tokens moved to the front, then zeros."""
        width = self.tokens.shape[1]
        position = torch.arange(width, device=self.tokens.device)[None]
        index = (position + self.prompt_lengths[:, None]).clamp_max(width - 1)
        return self.tokens.gather(1, index).masked_fill(position >= self.ctc_target_lengths()[:, None], 0)


class StepState(Protocol):
    """The state to resume from after a step: `ScheduleState`, or `StreamState` without assignment."""

    @property
    def epoch(self) -> int:
        """Completed passes over all rows."""
        ...

    def to_dict(self) -> Mapping[str, Any]:
        """JSON values for the checkpoint."""
        ...


@dataclass(frozen=True)
class LoadedStep:
    """One share of a step (a micro-batch), and the schedule's state after the step (for the checkpoint). `is_last` if a
    finite schedule ends here; `rows` as drawn, before broken ones were replaced. The loader's threads each spent
    `read_seconds` reading on average, `cpu_seconds` of it on a CPU."""

    batch: SpeechBatch
    plan: StepPlan
    state: StepState
    num_replaced: int
    is_last: bool = False
    samples_by_corpus: dict[str, int] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    read_seconds: float = 0.0
    cpu_seconds: float = 0.0
