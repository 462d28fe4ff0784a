"""The batch profile of a device: predicted sizes, confirmed by real steps if the device is available, and how they are
displayed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from raytrain.cluster.placement import Placement
from raytrain.cluster.probing import Progress, probe_all, step_meter
from raytrain.cluster.probing_groups import MakeMeter
from raytrain.config import Config
from raytrain.lengths.plan import BucketPlan
from raytrain.lengths.profile import BatchProfile, ProbeSetting
from raytrain.model.config import ModelConfig
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.devices import GIB, TargetDevice, probe_placements, sharded_world
from raytrain.stages.predicted_sizes import does_not_fit, edges_of, predict
from raytrain.training.acceleration import compiles
from raytrain.training.memory.coordinator import ProbeJob, ProbeOutcome
from raytrain.training.memory.prediction import Prediction
from raytrain.training.settings import CHECKPOINTING
from raytrain.training.step import resolve_precision

Needs = list[tuple[float, float]]  # the predicted memory of each bucket's step: bytes, and bytes per utterance


def find_profiles(
    workspace: Workspace, device: TargetDevice, kept: Path, on_progress: Progress, make_meter: MakeMeter = step_meter
) -> tuple[list[BatchProfile], ProbeOutcome | None]:
    """The profiles of a device, one per GPU name, and the outcome of probing (None if the device is not in the
    cluster).

    An interrupted search resumes with the answers in the file `kept`.
    """
    began = time.monotonic()
    config, plan, model = workspace.config, workspace.plan, workspace.model_config()
    predictions = predict(config, model, plan, device, on_progress)
    setting = probe_setting(config, workspace.model_id(), device)
    traced = traced_profile(workspace.plan_id, setting, predictions)
    if not device.is_real:
        return [traced], None
    needs = [(prediction.line.base_bytes, prediction.line.slope_bytes) for prediction in predictions]
    tracing = time.monotonic() - began
    job = probe_job(config, model, plan, device, needs)
    outcome = confirm(config, job, device, kept, on_progress, make_meter)
    seconds = {"tracing": tracing, **outcome.seconds, "all": time.monotonic() - began}
    confirmed = _confirmed(traced, outcome, needs, plan)
    names = dict.fromkeys(kind.name for kind in device.kinds)
    profiles = [replace(confirmed, setting=replace(setting, device_name=name)) for name in names]
    return profiles, replace(outcome, seconds=seconds)


def traced_profile(plan_id: str, setting: ProbeSetting, predictions: Sequence[Prediction]) -> BatchProfile:
    """The profile from predictions alone."""
    return BatchProfile(
        plan_id=plan_id,
        setting=setting,
        batch_sizes=tuple(prediction.batch_size or 1 for prediction in predictions),
        predicted_gib=tuple(_gib(prediction.peak_bytes) for prediction in predictions),
        num_probes=(0,) * len(predictions),
    )


def probe_job(config: Config, model: ModelConfig, plan: BucketPlan, device: TargetDevice, needs: Needs) -> ProbeJob:
    """The job for the probing processes."""
    section = config.oomptimize
    return ProbeJob(
        model=model,
        train=config.train,
        device_name=device.name,
        budget_bytes=device.budget(config),
        edges=tuple(edges_of(plan)),
        needs=tuple(needs),
        max_size=section.max_batch_size,
        tolerance=section.tolerance,
        steps_per_probe=section.steps_per_probe,
        soak_steps=section.soak_steps,
        seed=config.seed,
        times=section.time_smaller_batches,
        throughput=section.objective == "throughput",
    )


def confirm(
    config: Config,
    job: ProbeJob,
    device: TargetDevice,
    kept: Path,
    on_progress: Progress,
    make_meter: MakeMeter = step_meter,
) -> ProbeOutcome:
    """The outcome of probes on the device's GPUs.

    Raises `ProfileError` if a process fails, or if not even one utterance of a bucket fits.
    """
    outcome = probe_all(
        job,
        probe_placements(config, device, len(job.edges)),
        kept,
        Placement.data(config.cluster),
        on_progress,
        world_size=sharded_world(config),
        make_meter=make_meter,
    )
    if outcome.failed is not None:
        number, why = outcome.failed
        raise does_not_fit(number, job.edges[number], device.budget(config), device, config, why=why)
    return outcome


def _confirmed(traced: BatchProfile, outcome: ProbeOutcome, needs: Needs, plan: BucketPlan) -> BatchProfile:
    """The profile from the outcome of probing."""
    sizes, buckets = outcome.batch_sizes, outcome.buckets
    seconds = [bucket.seconds_at(size) for bucket, size in zip(buckets, sizes, strict=True)]
    durations = [bucket.max_duration_ms / 1000 for bucket in plan.grid.buckets]
    return replace(
        traced,
        batch_sizes=sizes,
        predicted_gib=tuple(_gib(base + size * slope) for (base, slope), size in zip(needs, sizes, strict=True)),
        num_probes=tuple(len(bucket.probes) for bucket in buckets),
        measured_gib=tuple(
            _gib(outcome.peaks[number]) if number in outcome.peaks else None for number in range(len(sizes))
        ),
        step_seconds=tuple(seconds),
        audio_seconds_per_second=tuple(
            round(size * duration / spent, 1) if spent else None
            for size, duration, spent in zip(sizes, durations, seconds, strict=True)
        ),
        smallest_as_fast=tuple(bucket.smallest_as_fast for bucket in buckets),
    )


def probe_setting(config: Config, model_id: str, device: TargetDevice) -> ProbeSetting:
    """The conditions for which a device's sizes are valid."""
    import torch

    return ProbeSetting(
        model_id=model_id,
        optimizer="adamw",
        precision=resolve_precision(config.train.precision, device.step_device(config)),
        activation_checkpointing=CHECKPOINTING.earlier(config.train.activation_checkpointing),
        device_name=device.name,
        device_gib=round(device.total_bytes / GIB, 3),
        memory_fraction=config.oomptimize.memory_fraction,
        world_size=config.train.most_workers,
        torch_version=torch.__version__.split("+")[0],
        objective=config.oomptimize.objective,
        shard=config.train.shard,
        compiled=compiles(config.train, device.step_device(config)),
    )


def _gib(size: float) -> float:
    return round(size / GIB, 4)


Cell = str | int | float | None


def profile_table(plan: BucketPlan, profile: BatchProfile) -> list[dict[str, Cell]]:
    """One row per bucket: edges, batch size, and the predicted and measured values."""
    rows = []
    for number, bucket in enumerate(plan.grid.buckets):
        row: dict[str, Cell] = {
            "bucket": number,
            "max_duration_ms": bucket.max_duration_ms,
            "max_tokens": bucket.max_tokens,
            "batch_size": profile.batch_sizes[number],
            "audio_seconds": round(profile.batch_sizes[number] * bucket.max_duration_ms / 1000, 1),
            "predicted_gib": profile.predicted_gib[number],
            "probes": profile.num_probes[number],
        }
        for name in ("measured_gib", "step_seconds", "audio_seconds_per_second", "smallest_as_fast"):
            values = getattr(profile, name)
            row[name] = values[number] if values is not None else None
        rows.append(row)
    return rows


def profile_summary(profile: BatchProfile) -> str:
    """A line for the terminal."""
    sizes = profile.batch_sizes
    text = f"batch sizes {max(sizes)} … {min(sizes)}, {profile.setting.device_name}"
    if profile.confirmed:
        text += f", {sum(profile.num_probes) / len(sizes):.1f} probes per bucket"
    halves = sum(
        fast is not None and fast < size for fast, size in zip(profile.smallest_as_fast or sizes, sizes, strict=True)
    )
    if halves:
        text += f"; in {halves} of {len(sizes)} buckets a smaller batch is as fast (oomptimize.objective: throughput)"
    return text
