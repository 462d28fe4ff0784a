"""Stage `oomptimize`: the largest batch of every bucket that fits the memory budget, predicted and then confirmed.

The prediction traces training steps on meta tensors, bucket by bucket, on Ray Data's workers. Where there are GPUs, a
process on each of them then runs real steps (`raytrain.cluster.probing`): searches that start at the prediction and
narrow each other, timing of smaller batches, and a soak that mixes all buckets as training does. Each kind of GPU in
the cluster gets a profile.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from raytrain.cluster.gpus import GpuKind, find_gpus, has_gpus, least_bytes
from raytrain.cluster.placement import Placement
from raytrain.cluster.probing import MakeMeter, Progress, probe_all, step_meter
from raytrain.cluster.session import map_on_workers
from raytrain.config import Config
from raytrain.errors import ConfigError, ProfileError
from raytrain.lengths.plan import BucketPlan
from raytrain.lengths.profile import BatchProfile, ProbeSetting
from raytrain.model.config import ModelConfig
from raytrain.storage.artifacts import content_id
from raytrain.training.memory.coordinator import ProbeJob, ProbeOutcome
from raytrain.training.settings import TrainSettings

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What to find batch sizes for: GPUs of the cluster (`kinds`), or (without) one that is only named.

    There are several kinds where weights are sharded over all of them: sizes must then fit the smallest.
    """

    name: str
    total_bytes: int
    kinds: tuple[GpuKind, ...] = ()

    @property
    def is_real(self) -> bool:
        """Whether it is there."""
        return bool(self.kinds)

    def budget(self, config: Config) -> int:
        """Bytes that a training step may take."""
        return int(self.total_bytes * config.oomptimize.memory_fraction)


def traced_device(total_bytes: int) -> Device:
    """A device that is not there."""
    return Device(f"traced for {total_bytes / GIB:g} GiB", total_bytes)


def find_devices(config: Config) -> list[Device]:
    """The kinds of GPU in the nodes that are for training, or the named device where there is none.

    Raises `ConfigError` with neither a GPU nor a named device, for an objective that needs a GPU's time, and where no
    node is for training; `ClusterError` where torch can't use a node's GPUs.
    """
    named = config.oomptimize.device_memory
    if config.train.device != "cpu" and has_gpus(Placement.train(config.cluster)):
        return _real_devices(config, find_gpus(Placement.train(config.cluster)))
    if named is None:
        raise ConfigError(
            "there is no GPU here to measure memory on",
            remedy="name the device to plan for, for example oomptimize.device_memory: 16GiB",
        )
    if config.oomptimize.objective == "throughput":
        raise ConfigError(
            "oomptimize.objective: throughput needs a GPU",
            why="without one the memory of a step is traced, but nobody knows its time",
            remedy="set it to memory, or run where the GPUs are",
        )
    return [traced_device(named)]


def _real_devices(config: Config, kinds: list[GpuKind]) -> list[Device]:
    def planned(total_bytes: int) -> int:
        return min(config.oomptimize.device_memory or total_bytes, total_bytes)

    if sharded_world(config) == 1:
        return [Device(kind.name, planned(kind.total_bytes), (kind,)) for kind in kinds]
    gpus, world_size = sum(kind.num_gpus for kind in kinds), sharded_world(config)
    if gpus < world_size:
        raise ConfigError(
            "train.shard spreads the model over more workers than there are GPUs to probe it on",
            got=f"train.num_workers {world_size}, {gpus} GPUs",
            remedy="lower train.num_workers, or add GPUs",
        )
    smallest = min(kinds, key=lambda kind: kind.total_bytes)
    return [Device(smallest.name, planned(least_bytes(kinds)), tuple(kinds))]


def sharded_world(config: Config) -> int:
    """Over how many workers the model's weights are spread, at the least; 1 where each has all of them."""
    return config.train.least_workers if config.train.shard else 1


# --- prediction


_TRACERS: dict[str, tuple[Any, Any]] = {}


def _predict(
    cells: list[tuple[int, int]],
    *,
    model: ModelConfig,
    train: TrainSettings,
    precision: str,
    device_type: str,
    budget: int,
    max_size: int,
) -> list[Any]:
    """Predictions for some buckets; runs on a worker, which keeps what it learns for the next."""
    import torch

    from raytrain.training.memory.prediction import predict_batch_size
    from raytrain.training.memory.surface import NeighborLines
    from raytrain.training.memory.tracer import StepTracer

    torch.set_num_threads(1)
    key = content_id([asdict(model), asdict(train), precision, device_type, budget])
    if key not in _TRACERS:
        _TRACERS.clear()
        # Of the numbers of workers that training may have, the one in which a rank takes most.
        world_size = train.least_workers if train.shard else train.most_workers
        options = {"precision": precision, "world_size": world_size, "device_type": device_type}
        _TRACERS[key] = StepTracer(model, train, **options), NeighborLines()
    tracer, neighbours = _TRACERS[key]
    found = []
    for cell in cells:
        found.append(predict_batch_size(tracer, *cell, budget, max_size, neighbours.guess(*cell)))
        neighbours.add(*cell, found[-1].line)
    return found


def _device_type(config: Config, device: Device) -> str:
    return "cuda" if device.is_real or config.train.device == "cuda" else "cpu"


def predict(
    config: Config,
    model: ModelConfig,
    plan: BucketPlan,
    device: Device,
    on_progress: Progress,
    device_type: str | None = None,
) -> list[Any]:
    """A `training.memory.Prediction` for each bucket. Raises `ProfileError` where not even one utterance fits."""
    from raytrain.training.step import resolve_precision

    kind = device_type or _device_type(config, device)
    edges = [(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets]
    function = partial(
        _predict,
        model=model,
        train=config.train,
        precision=resolve_precision(config.train.precision, kind),
        device_type=kind,
        budget=device.budget(config),
        max_size=config.oomptimize.max_batch_size,
    )
    found: list[Any] = []
    data = Placement.data(config.cluster)
    for part in map_on_workers(edges, function, 4, data):
        found += part
        on_progress("tracing buckets", len(found), len(edges))
    for number, prediction in enumerate(found):
        if prediction.batch_size is None and not device.is_real:
            alternative = None
            if not config.train.activation_checkpointing:
                saving = partial(function, train=replace(config.train, activation_checkpointing=True))
                alternative = next(map_on_workers([edges[number]], saving, 1, data))[0].peak_bytes
            raise _does_not_fit(number, edges[number], prediction.peak_bytes, device, config, alternative)
    return [_at_least(number, found, edges) for number in range(len(found))]


def _at_least(number: int, found: list[Any], edges: list[tuple[int, int]]) -> Any:
    """A bucket's prediction, with what a bucket of longer edges can take: traces end a little below the largest."""
    one, (duration, tokens) = found[number], edges[number]
    size = max(
        (
            other.batch_size or 0
            for other, (long, many) in zip(found, edges, strict=True)
            if long >= duration and many >= tokens
        )
    )
    if size <= (one.batch_size or 0):
        return one
    return replace(one, batch_size=size, peak_bytes=round(one.line.base_bytes + size * one.line.slope_bytes))


def _does_not_fit(
    number: int,
    edges: tuple[int, int],
    need: int,
    device: Device,
    config: Config,
    alternative: int | None = None,
    why: str | None = None,
) -> ProfileError:
    budget = device.budget(config)
    remedies = ["lower buckets.max_duration_ms or buckets.max_tokens", "take a smaller model"]
    if not config.train.activation_checkpointing:
        saved = f" (it then needs {alternative / GIB:.2f} GiB)" if alternative else ""
        remedies.insert(0, f"set train.activation_checkpointing: true{saved}")
    remedies.append("raise oomptimize.memory_fraction" if device.is_real else "raise oomptimize.device_memory")
    return ProfileError(
        f"bucket {number} (≤ {edges[0]} ms, ≤ {edges[1]} tokens): batch size 1 needs {need / GIB:.2f} GiB of "
        f"{budget / GIB:.2f} GiB",
        why=why,
        remedy=", ".join(remedies[:-1]) + ", or " + remedies[-1],
    )


# --- confirmation


def confirm(
    config: Config,
    model: ModelConfig,
    plan: BucketPlan,
    device: Device,
    needs: list[tuple[float, float]],
    kept: Path,
    on_progress: Progress,
    make_meter: MakeMeter = step_meter,
) -> ProbeOutcome:
    """What probes on the device's GPUs came to. `needs` is the predicted memory of each bucket's step as (bytes, bytes
    per utterance).

    A stopped search resumes with the answers in the file `kept`. Raises `ProfileError` where a process fails, and where
    not even one utterance of a bucket fits.
    """
    section = config.oomptimize
    edges = [(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets]
    job = ProbeJob(
        model=model,
        train=config.train,
        device_name=device.name,
        budget_bytes=device.budget(config),
        edges=tuple(edges),
        needs=tuple(needs),
        max_size=section.max_batch_size,
        tolerance=section.tolerance,
        steps_per_probe=section.steps_per_probe,
        soak_steps=section.soak_steps,
        seed=config.seed,
        times=section.time_smaller_batches,
        throughput=section.objective == "throughput",
    )
    world_size = sharded_world(config)
    data, places = Placement.data(config.cluster), placements(config, device, len(edges))
    outcome = probe_all(job, places, kept, data, on_progress, world_size=world_size, make_meter=make_meter)
    if outcome.failed is not None:
        number, why = outcome.failed
        raise _does_not_fit(number, edges[number], device.budget(config), device, config, why=why)
    return outcome


def placements(config: Config, device: Device, num_buckets: int) -> list[Placement]:
    """Where the processes run: one for each GPU, no more than there are buckets; one group for sharded weights."""
    train = Placement.train(config.cluster)
    if sharded_world(config) > 1:
        return [train]
    (kind,) = device.kinds
    return kind.placements(train)[:num_buckets]


# --- profiles


def find_profiles(
    config: Config,
    model: ModelConfig,
    model_id: str,
    plan: BucketPlan,
    plan_id: str,
    device: Device,
    kept: Path,
    on_progress: Progress,
    make_meter: MakeMeter = step_meter,
) -> tuple[list[BatchProfile], ProbeOutcome | None]:
    """The profiles of a device, one for each name of its GPUs, and what was probed (None where it is only named)."""
    began = time.monotonic()
    predictions = predict(config, model, plan, device, on_progress)
    setting = probe_setting(config, model_id, device, _device_type(config, device))
    traced = BatchProfile(
        plan_id=plan_id,
        setting=setting,
        batch_sizes=tuple(prediction.batch_size or 1 for prediction in predictions),
        predicted_gib=tuple(_gib(prediction.peak_bytes) for prediction in predictions),
        num_probes=(0,) * len(predictions),
    )
    if not device.is_real:
        return [traced], None
    needs = [(prediction.line.base_bytes, prediction.line.slope_bytes) for prediction in predictions]
    tracing = time.monotonic() - began
    outcome = confirm(config, model, plan, device, needs, kept, on_progress, make_meter)
    seconds = {"tracing": tracing, **outcome.seconds, "all": time.monotonic() - began}
    confirmed = _confirmed(traced, outcome, needs, plan)
    names = dict.fromkeys(kind.name for kind in device.kinds)
    profiles = [replace(confirmed, setting=replace(setting, device_name=name)) for name in names]
    return profiles, replace(outcome, seconds=seconds)


def _confirmed(
    traced: BatchProfile, outcome: ProbeOutcome, needs: list[tuple[float, float]], plan: BucketPlan
) -> BatchProfile:
    """The profile with what probes found."""
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


def probe_setting(config: Config, model_id: str, device: Device, device_type: str) -> ProbeSetting:
    """Under what a device's sizes hold."""
    import torch

    from raytrain.training.step import resolve_precision

    return ProbeSetting(
        model_id=model_id,
        optimizer="adamw",
        precision=resolve_precision(config.train.precision, device_type),
        activation_checkpointing=config.train.activation_checkpointing,
        device_name=device.name,
        device_gib=round(device.total_bytes / GIB, 3),
        memory_fraction=config.oomptimize.memory_fraction,
        world_size=config.train.most_workers,
        torch_version=torch.__version__.split("+")[0],
        objective=config.oomptimize.objective,
        shard=config.train.shard,
    )


def _gib(size: float) -> float:
    return round(size / GIB, 4)
