"""How fast a trained model decodes: seconds of audio per second, with batches of one and eight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.config import check_config
from raytrain.data.batch import SpeechBatch
from raytrain.data.loader import read_rows
from raytrain.decoding.recognizer import Recognizer
from raytrain.decoding.settings import DecodeSettings
from raytrain.model.device import worker_device
from raytrain.run_folder.scored_rows import encode_split
from raytrain.run_folder.trained import load_run
from raytrain.run_folder.workspace import Workspace

_NUM_RECORDINGS = 40


@dataclass(frozen=True)
class DecodingSpeed:
    """`rtfx`: seconds of audio per second, by batch size; `decoder_share`: the decoder's share of the time."""

    rtfx_batch_1: float
    decoder_share_batch_1: float
    rtfx_batch_8: float
    decoder_share_batch_8: float


def measure_decoding(values: dict[str, Any], folder: Path, cuda: bool) -> DecodingSpeed:
    """Time greedy decoding of dev recordings by the trial in `folder`, whose configuration is the JSON `values`;
    reading audio is excluded."""
    config = check_config(values)
    search = DecodeSettings(max_generation_delta=config.evaluate.max_generation_delta)
    recognizer = Recognizer(*load_run(values, str(folder), "best"), search, worker_device(cuda).torch)
    rows, pad_id = encode_split(Workspace(config, folder), "dev", _NUM_RECORDINGS).rows, recognizer.tokenizer.pad_id
    sample_rate = config.model.sample_rate
    speeds: list[float] = []
    for size in (1, 8):
        batches = [batch for _, batch in read_rows(rows, sample_rate, pad_id, size, lambda row, error: None)]
        speeds += _speed(recognizer, batches, sample_rate)
    return DecodingSpeed(*speeds)


def _speed(recognizer: Recognizer, batches: Sequence[SpeechBatch], sample_rate: int) -> tuple[float, float]:
    _decode(recognizer, batches[:1])  # warm up
    recognizer.take_seconds()
    _decode(recognizer, batches)
    spent = recognizer.take_seconds()
    audio = sum(float(batch.audio_lengths.sum()) for batch in batches) / sample_rate
    return audio / spent.total(), spent["decoder"] / spent.total()


def _decode(recognizer: Recognizer, batches: Sequence[SpeechBatch]) -> None:
    for batch in batches:
        recognizer.recognize(batch, [0.0] * len(batch), [False] * len(batch))
