"""Training of encoder-decoder speech models on Ray. What a notebook needs is here; `raytrain --help` has the commands.

Read a configuration:

    >>> from pathlib import Path
    >>> import numpy as np
    >>> import raytrain
    >>> config = raytrain.load_config(Path("mine.yaml"), ["train.max_steps=100"])
    >>> config.train.max_steps, config.model.encoder_layers
    (100, 1)

Cut lengths into buckets:

    >>> durations_ms = np.arange(1000, 9000, 10)
    >>> lengths = raytrain.LengthHistogram.from_lengths(durations_ms, tokens=durations_ms // 100)
    >>> plan = raytrain.make_plan(lengths, raytrain.BucketSettings(num_duration_buckets=2), histogram_id="")
    >>> [(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets]
    [(6410, 46), (6410, 64), (8990, 78), (8990, 89)]

Transcribe and score with a model, a `.nemo` file, a run, a checkpoint or a Hugging Face folder:

    >>> model = raytrain.load_model(Path("mine.nemo"))
    >>> transcriber = raytrain.Transcriber(model, language="en", device="cpu")
    >>> texts = [transcript.text for transcript in transcriber.run(["talk.wav"])]
    >>> raytrain.count_errors(["one two three"], ["one too three"]).rate
    0.3333333333333333

Look at a model's tokens and at a corpus' rows:

    >>> tokenizer = raytrain.CanaryTokenizer(model.tokenizers)
    >>> tokenizer.decode(tokenizer.encode_text("two three", "en"))
    'two three'
    >>> for chunk in raytrain.plan_chunks([raytrain.Corpus("mine", "mine.jsonl", language="en")]):
    ...     print([row.text for row in raytrain.read_chunk(chunk)])
    ['one two', 'three']

`import raytrain` loads none of this: each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raytrain.config import Config, check_config, load_config
    from raytrain.data.assignment import Assignment
    from raytrain.data.corpora.reading import plan_chunks, read_chunk
    from raytrain.data.corpora.types import Corpus
    from raytrain.data.loader import BatchLoader, StepReader
    from raytrain.data.quarantine import Quarantine
    from raytrain.data.text.tokenizer import CanaryTokenizer, train_tokenizer
    from raytrain.data.work import scheduled_work
    from raytrain.decoding.settings import DecodeSettings
    from raytrain.decoding.transcriber import Transcriber
    from raytrain.evaluation.error_counts import count_errors
    from raytrain.evaluation.scoring import score, texts_of
    from raytrain.lengths import BatchSchedule, BucketPlan, BucketSettings, LengthHistogram, ScheduleState, make_plan
    from raytrain.model.formats.portable import ModelParts
    from raytrain.training.conversion import load_model, save_model

__version__ = "0.1.0"
__all__ = [
    "Assignment",
    "BatchLoader",
    "BatchSchedule",
    "BucketPlan",
    "BucketSettings",
    "CanaryTokenizer",
    "Config",
    "Corpus",
    "DecodeSettings",
    "LengthHistogram",
    "ModelParts",
    "Quarantine",
    "ScheduleState",
    "StepReader",
    "Transcriber",
    "check_config",
    "count_errors",
    "load_config",
    "load_model",
    "make_plan",
    "plan_chunks",
    "read_chunk",
    "save_model",
    "scheduled_work",
    "score",
    "texts_of",
    "train_tokenizer",
]
_MODULES = {
    "raytrain.config": ("Config", "check_config", "load_config"),
    "raytrain.data.assignment": ("Assignment",),
    "raytrain.data.corpora.reading": ("plan_chunks", "read_chunk"),
    "raytrain.data.corpora.types": ("Corpus",),
    "raytrain.data.loader": ("BatchLoader", "StepReader"),
    "raytrain.data.quarantine": ("Quarantine",),
    "raytrain.data.work": ("scheduled_work",),
    "raytrain.data.text.tokenizer": ("CanaryTokenizer", "train_tokenizer"),
    "raytrain.decoding.settings": ("DecodeSettings",),
    "raytrain.decoding.transcriber": ("Transcriber",),
    "raytrain.evaluation.error_counts": ("count_errors",),
    "raytrain.evaluation.scoring": ("score", "texts_of"),
    "raytrain.lengths": (
        "BatchSchedule",
        "BucketPlan",
        "BucketSettings",
        "LengthHistogram",
        "ScheduleState",
        "make_plan",
    ),
    "raytrain.model.formats.portable": ("ModelParts",),
    "raytrain.training.conversion": ("load_model", "save_model"),
}


def __getattr__(name: str) -> object:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(module), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
