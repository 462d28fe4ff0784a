"""Sections about a run and its environment: where results go, memory, evaluation, tracking and the cluster."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from raytrain.config.selectors import check_labels, check_resources
from raytrain.config.values import Amount, BatchSize, Bytes, Section
from raytrain.decoding.settings import BeamSize, CtcWeight, GenerationDelta, LengthPenalty
from raytrain.redaction import TRACKING_VARIABLE, holds_credentials, without_credentials
from raytrain.settings import Range, Setting, refuse
from raytrain.storage.run_store import DEFAULT_CACHE_BYTES
from raytrain.training.settings import MAX_WORKERS


class RunSection(Section):
    """Where results go: `<root>/<name>/`."""

    root: Annotated[
        str | None,
        Setting("A folder shared by all nodes, or a URI (s3://…); defaults to $RAYTRAIN_RUN_ROOT, or else runs."),
    ] = None
    cache_size: Annotated[
        Bytes,
        Setting(
            "With a root at a URI: how much of the assignment each node keeps in its cache, $RAYTRAIN_CACHE or "
            "~/.cache/raytrain. The least recently used parts are evicted.",
            unit="bytes",
        ),
    ] = DEFAULT_CACHE_BYTES


class OomptimizeSection(Section):
    """The memory budget of a step, and the search for the largest batch sizes."""

    device_memory: Annotated[
        Bytes | None, Setting("Memory of the device to plan for; by default measured on a GPU.", unit="bytes")
    ] = None
    memory_fraction: Annotated[
        float, Range(0, 1, above=True), Setting("The fraction of the device's memory that a step may use.")
    ] = 0.9
    max_batch_size: Annotated[BatchSize, Setting("Largest batch of any bucket.", unit="utterances")] = 4096
    tolerance: Annotated[
        float,
        Range(0, 1, below=True),
        Setting("A search ends at (smallest that fails − largest that fits) / smallest that fails."),
    ] = 0.05
    objective: Annotated[
        Literal["memory", "throughput"],
        Setting("The largest batch that fits, or the smallest that is as fast per second of audio."),
    ] = "memory"
    time_smaller_batches: Annotated[
        bool, Setting("Also measure the speed of smaller batches, which the objective throughput needs.")
    ] = True
    steps_per_probe: Annotated[int, Range(1, 10**6), Setting("Steps of each probe.", unit="steps")] = 3
    soak_steps: Annotated[
        int, Range(1, 10**9), Setting("Minimum steps with mixed buckets that follow the probes.", unit="steps")
    ] = 200

    @model_validator(mode="after")
    def _throughput_needs_times(self) -> OomptimizeSection:
        if self.objective == "throughput" and not self.time_smaller_batches:
            raise ValueError("objective throughput needs time_smaller_batches")
        return self


class EvaluateSection(Section):
    """Decoding of the dev and test manifests; see `raytrain.decoding.settings.DecodeSettings`."""

    batch_size: Annotated[
        BatchSize,
        Setting(
            "Maximum utterances per batch; batches of the test manifests are smaller if memory is short.",
            unit="utterances",
        ),
    ] = 32
    beam_size: BeamSize = 1
    length_penalty: LengthPenalty = 0.0
    ctc_weight: CtcWeight = 0.0
    num_workers: Annotated[
        int, Range(1, MAX_WORKERS), Setting("Workers that transcribe the test manifests.", unit="workers")
    ] = 1
    max_generation_delta: GenerationDelta = 50
    checkpoint: Annotated[Literal["best", "last"], Setting("The checkpoint that is evaluated.")] = "best"
    normalizer: Annotated[
        Literal["none", "whisper"],
        Setting("With whisper, the scores also include a WER of texts normalized as in Whisper's evaluation."),
    ] = "none"
    precision: Annotated[Literal["fp32", "bf16", "int8"], Setting("Precision of linear layers; int8 is for CPUs.")] = (
        "fp32"
    )


class TrackingSection(Section):
    """MLflow."""

    enabled: Annotated[bool, Setting("Log runs to MLflow.")] = True
    uri: Annotated[
        str | None,
        Setting(
            "The tracking server; defaults to $MLFLOW_TRACKING_URI, or else a SQLite file in the run folder. User "
            "and password in it are moved to $RAYTRAIN_TRACKING_URI, so that no copy of the settings has them."
        ),
    ] = None
    experiment: Annotated[str, Setting("The MLflow experiment.")] = "raytrain"

    @field_validator("uri")
    @classmethod
    def _credentials_apart(cls, value: str | None) -> str | None:
        if value is None or not holds_credentials(value):
            return value
        os.environ[TRACKING_VARIABLE] = value
        return without_credentials(value)


class ClusterSection(Section):
    """Ray, and which of its nodes do what: `train_…` places training and batch size probes; `data_…` places reading,
    counting, assigning and decoding audio."""

    address: Annotated[
        str | None,
        Setting(
            "Ray's address; defaults to $RAY_ADDRESS, or else a local Ray is started. An http address is "
            "a Jobs server, for raytrain submit."
        ),
    ] = None
    num_cpus: Annotated[int | None, Range(1, MAX_WORKERS), Setting("CPUs of a local Ray.", unit="CPUs")] = None
    train_labels: Annotated[
        dict[str, str],
        Setting(
            "Labels of nodes to train on, such as {role: train}: value, !value, in(value, value) or !in(value, value)."
        ),
    ] = {}
    data_labels: Annotated[dict[str, str], Setting("Labels of nodes to read, count, assign and decode audio on.")] = {}
    train_resources: Annotated[
        dict[str, Amount],
        Setting(
            "Custom resources that each training worker reserves, such as {gpu_host: 1}; CPU is its number of CPUs."
        ),
    ] = {}
    data_resources: Annotated[
        dict[str, Amount],
        Setting("Custom resources that each reading or decoding task reserves, such as {cpu_host: 0.01}."),
    ] = {}
    accelerator_type: Annotated[str | None, Setting("Ray's name for the kind of GPU to train on, such as A100.")] = (
        Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    )

    @field_validator("train_labels", "data_labels")
    @classmethod
    def _labels(cls, value: dict[str, str]) -> dict[str, str]:
        refuse(check_labels(value))
        # Ray treats the space after a comma as part of the next value.
        return {key: selector.replace(" ", "") for key, selector in value.items()}

    @field_validator("train_resources", "data_resources")
    @classmethod
    def _resources(cls, value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        refuse(check_resources(value, ("CPU",) if info.field_name == "train_resources" else ()))
        return value
