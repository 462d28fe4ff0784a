"""`raytrain transcribe --manifest`: rows of manifests to one JSONL file, part by part (`transcript_parts`).

When the last part is written, the parts are merged into OUT.jsonl. After a kill, the same command skips the finished
parts; see `raytrain.storage.finished`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from raytrain.cluster.inference import MAX_BATCH, batch_sizes
from raytrain.cluster.inference_worker import RecognitionJob
from raytrain.cluster.pool import find_pool
from raytrain.cluster.session import ray_session
from raytrain.config import ClusterSection
from raytrain.console import Console
from raytrain.data.corpora.reading import plan_chunks
from raytrain.data.corpora.types import Chunk, Corpus
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.decoding.longform import checked_overlap
from raytrain.decoding.requests import Prompts, read_requests
from raytrain.decoding.settings import DecodeSettings
from raytrain.errors import ConfigError, ManifestError
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.operations.transcript_parts import PartTranscriber, Progress, Summary, output_is_input
from raytrain.storage.artifacts import check_absent, content_id
from raytrain.storage.finished import FinishedParts
from raytrain.training.conversion import load_model, model_stamp
from raytrain.training.memory.decoding import BatchSizes

_WHOLE_FILES = 1 << 62  # chunk size in bytes
_SHORT_MS = 1000


@dataclass(frozen=True)
class TranscriptionSpec:
    """What to transcribe, with which model, and where to write.

    `language` (not needed if the model has only one), `target_language` and `pnc` apply to rows that don't specify
    them. A part ends at `part_rows` rows or ten hours of audio, whichever comes first.
    """

    corpora: tuple[Corpus, ...]
    output: Path
    checkpoint: Path
    settings: DecodeSettings = DecodeSettings()
    precision: str = "fp32"
    language: str | None = None
    target_language: str | None = None
    pnc: bool = True
    window_s: float = 40.0
    overlap_s: float | None = None
    device: str = "auto"
    workers: int | None = None
    device_memory: int | None = None
    max_batch: int = MAX_BATCH
    part_rows: int = 2000
    overwrite: bool = False
    cluster: ClusterSection = field(default_factory=ClusterSection)

    @property
    def model_path(self) -> Path:
        """The checkpoint's path for workers, which have a different working directory."""
        return self.checkpoint.expanduser().absolute()

    def chunks(self) -> list[Chunk]:
        """The manifests, one chunk each."""
        return plan_chunks(self.corpora, _WHOLE_FILES)


def load_parts(path: str) -> tuple[Canary, CanaryTokenizer]:
    """A model by path, for a worker."""
    parts = load_model(Path(path))
    return parts.build(), CanaryTokenizer(parts.tokenizers)


def transcribe_manifests(spec: TranscriptionSpec, console: Console) -> Summary:
    """Write `spec.output`. Raises `RaytrainError` for what no row is at fault for; a row's faults are in its line."""
    overlap_s = checked_overlap(spec.window_s, spec.overlap_s)
    chunks = spec.chunks()
    _check_output(spec, chunks)
    config, tokenizer = _model(spec)
    language = spec.language or (tokenizer.languages[0] if len(tokenizer.languages) == 1 else None)
    chunks = [replace(chunk, language=language, target_language=spec.target_language) for chunk in chunks]
    prompts = Prompts(tokenizer, config.prompt_format, config.max_positions, spec.pnc)
    load = partial(load_parts, str(spec.model_path))
    job = RecognitionJob(
        load, spec.settings, config.sample_rate, tokenizer.pad_id, spec.window_s, overlap_s, spec.precision
    )
    with ray_session(spec.cluster), console.progress("transcribing", None) as update:
        parts = _start(spec, config, job, update)
        summary = parts.transcribe(read_requests(chunks, prompts), spec.part_rows)
    if not summary.rows:
        raise _no_rows(parts.store, chunks)
    parts.store.join(summary.parts)
    return summary


def _start(spec: TranscriptionSpec, config: ModelConfig, job: RecognitionJob, update: Progress) -> PartTranscriber:
    """The parts of the output, and the workers to fill them."""
    pool = find_pool(spec.workers, spec.device, spec.device_memory, spec.cluster)
    sizes = batch_sizes(config, spec.settings, pool, spec.max_batch)
    if spec.device_memory is not None:
        _check_memory(sizes)
    stamp = model_stamp(spec.model_path)
    key = content_id([stamp, asdict(spec.settings), spec.window_s, job.overlap_s, spec.precision])
    store = FinishedParts(spec.output, key, spec.overwrite)
    return PartTranscriber(store, job, pool, sizes, update)


def _no_rows(store: FinishedParts, chunks: Sequence[Chunk]) -> ManifestError:
    """Remove the parts' folder, and raise an error that says why there is no output."""
    with contextlib.suppress(OSError):  # not empty: it has parts of other rows, which are not ours to remove
        store.folder.rmdir()
    return ManifestError(
        "the manifests have no rows",
        got=", ".join(chunk.path for chunk in chunks[:3]),
        remedy="check that these are the right files and that they are not empty",
    )


def _model(spec: TranscriptionSpec) -> tuple[ModelConfig, CanaryTokenizer]:
    """The model's settings and tokenizer; workers read its weights themselves."""
    parts = load_model(spec.checkpoint)
    vocab = parts.config.padded_vocab_size
    if spec.settings.beam_size > vocab:
        raise ConfigError(
            "the beam is larger than the vocabulary",
            got=spec.settings.beam_size,
            allowed=vocab,
            remedy="lower --beam-size",
        )
    return parts.config, CanaryTokenizer(parts.tokenizers)


def _check_output(spec: TranscriptionSpec, chunks: Sequence[Chunk]) -> None:
    """Raises `ConfigError` if the output is one of the command's inputs, and `StorageError` if it exists and must not
    be overwritten."""
    inputs = {name.removeprefix("file://") for chunk in chunks for name in (chunk.path, chunk.audio) if name}
    for name in sorted(inputs | {str(spec.checkpoint.expanduser())}):
        with contextlib.suppress(OSError):  # one of the two does not exist
            if os.path.samefile(name, spec.output):
                raise output_is_input(spec.output)
    model, output = (os.path.realpath(path.expanduser()) for path in (spec.checkpoint, spec.output))
    if output.startswith(f"{model}{os.sep}") and spec.output.exists() and spec.output.suffix != ".jsonl":
        raise output_is_input(spec.output)
    check_absent(spec.output, spec.overwrite)


def _check_memory(sizes: BatchSizes) -> None:
    prediction = sizes.prediction(_SHORT_MS)
    if prediction.batch_size is None:
        raise ConfigError(
            "the model and one second of audio do not fit in --device-memory",
            got=f"{sizes.budget_bytes / 2**20:.0f} MiB",
            allowed=f"at least {prediction.peak_bytes / 2**20:.0f} MiB",
            remedy="raise --device-memory",
        )
