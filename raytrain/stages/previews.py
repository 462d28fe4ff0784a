"""Plans to inspect before anything runs: policies side by side, batch sizes for a GPU that need not be present, and the
schedule. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raytrain.cluster.session import ray_session
from raytrain.config import Config
from raytrain.console import Console
from raytrain.errors import ArtifactError, ConfigError
from raytrain.lengths.compare import PolicyRow, compare_policies
from raytrain.lengths.grid import Bucket
from raytrain.lengths.simulate import Simulation, simulate
from raytrain.model.cost import cost_of
from raytrain.run_folder.batches import make_schedule
from raytrain.run_folder.histograms import read_histogram
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.devices import GIB, traced_device
from raytrain.stages.oomptimize import tracing_progress
from raytrain.stages.predicted_sizes import predict
from raytrain.storage.run_files import HISTOGRAM
from raytrain.training.memory.prediction import Prediction


def compare_plans(config: Config) -> list[PolicyRow]:
    """Policies side by side on the run's histogram. Raises `ArtifactError` if statistics has not run."""
    workspace = Workspace(config, config.run_dir)
    workspace.store.fetch(HISTOGRAM)
    path = workspace.path(HISTOGRAM)
    if not path.exists():
        raise ArtifactError(f"{path} is missing", remedy="run `raytrain statistics` first")
    return compare_policies(read_histogram(path), config.buckets, cost_of(workspace.model_config()))


@dataclass(frozen=True)
class DryBucket:
    """A bucket's predicted batch size, and the live memory at its step's peak, by phase and by module (MiB)."""

    bucket: int
    max_duration_ms: int
    max_tokens: int
    batch_size: int
    audio_seconds: float
    predicted_gib: float
    traced_batch_size: int
    mib_by_phase: dict[str, float]
    mib_by_module: dict[str, float]


def plan_dry(config: Config, console: Console, device_memory: int) -> list[DryBucket]:
    """Batch sizes for a GPU of `device_memory` bytes that need not be present, bucket by bucket.

    Raises `ArtifactError` if there is no bucket plan yet, and `ProfileError` if not even one utterance fits.
    """
    workspace = Workspace(config, config.run_dir)
    kind = "cpu" if config.train.device == "cpu" else "cuda"
    plan, device = workspace.plan, traced_device(device_memory)
    with ray_session(config.cluster), tracing_progress(console) as show:
        predictions = predict(config, workspace.model_config(), plan, device, show, kind)
    return [
        _dry_bucket(number, bucket, prediction)
        for number, (bucket, prediction) in enumerate(zip(plan.grid.buckets, predictions, strict=True))
    ]


def _dry_bucket(number: int, bucket: Bucket, prediction: Prediction) -> DryBucket:
    size = prediction.batch_size or 0
    return DryBucket(
        bucket=number,
        max_duration_ms=bucket.max_duration_ms,
        max_tokens=bucket.max_tokens,
        batch_size=size,
        audio_seconds=round(size * bucket.max_duration_ms / 1000, 1),
        predicted_gib=round(prediction.peak_bytes / GIB, 3),
        traced_batch_size=prediction.traced_size,
        mib_by_phase=_in_mib(prediction.step.by_phase()),
        mib_by_module=_in_mib(prediction.step.by_module()),
    )


def _in_mib(sizes: Mapping[str, int]) -> dict[str, float]:
    return {name: round(size / 2**20, 1) for name, size in sizes.items()}


@dataclass(frozen=True)
class ScheduledCorpus:
    """How often an epoch repeats a corpus, and its number of assigned rows."""

    corpus: str
    rows: int
    repeats: float


def describe_schedule(
    config: Config, console: Console, world_size: int, steps: int
) -> tuple[list[ScheduledCorpus], Simulation | None]:
    """Rows and repeats of each corpus, and `steps` simulated steps (None for 0) with the first batch profile.

    Raises `ArtifactError` if assign or oomptimize has not run, and `ConfigError` for a stream.
    """
    if config.data.stream is not None:
        raise ConfigError(
            "a stream has no schedule",
            why="its batches depend on the buffer's contents when they are drawn",
            remedy="unset data.stream and run assign",
        )
    workspace = Workspace(config, config.run_dir)
    assignment = workspace.assignment()
    schedule = make_schedule(workspace, assignment, workspace.profiles()[0].batch_sizes)
    rows = [sum(column) for column in zip(*assignment.rows_by_corpus, strict=True)]
    corpora = [
        ScheduledCorpus(name, number, round(repeat, 4))
        for name, number, repeat in zip(assignment.corpora, rows, schedule.mixture.repeats, strict=True)
    ]
    if not steps:
        return corpora, None
    with console.progress("simulating", steps) as update:
        lengths = [assignment.lengths(bucket) for bucket in range(len(assignment.rows_per_bucket))]
        return corpora, simulate(schedule, lengths, world_size, steps, lambda done: update(completed=done))
