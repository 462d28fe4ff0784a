"""Predicted batch sizes: training steps are traced on meta tensors, bucket by bucket, on Ray Data's workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial

from raytrain.cluster.mapping import map_on_workers
from raytrain.cluster.placement import Placement
from raytrain.cluster.probing import Progress
from raytrain.config import Config
from raytrain.errors import ProfileError
from raytrain.lengths.plan import BucketPlan
from raytrain.model.config import ModelConfig
from raytrain.stages.devices import GIB, TargetDevice
from raytrain.storage.artifacts import content_id
from raytrain.training.memory.prediction import Prediction, predict_batch_size
from raytrain.training.memory.surface import NeighborLines
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.settings import TrainSettings
from raytrain.training.step import resolve_precision

Edges = tuple[int, int]  # max_duration_ms, max_tokens
_TRACERS: dict[str, tuple[StepTracer, NeighborLines]] = {}


def predict_buckets(
    cells: list[Edges],
    *,
    model: ModelConfig,
    train: TrainSettings,
    precision: str,
    device_type: str,
    budget: int,
    max_size: int,
) -> list[Prediction]:
    """Predictions for a few buckets; runs on a worker, which caches traces for the next call."""
    import torch

    torch.set_num_threads(1)
    key = content_id([asdict(model), asdict(train), precision, device_type, budget])
    if key not in _TRACERS:
        _TRACERS.clear()
        # The permitted number of workers for which a rank needs the most memory.
        world_size = train.least_workers if train.shard else train.most_workers
        tracer = StepTracer(model, train, precision=precision, world_size=world_size, device_type=device_type)
        _TRACERS[key] = tracer, NeighborLines()
    tracer, neighbors = _TRACERS[key]
    predictions = []
    for cell in cells:
        prediction = predict_batch_size(tracer, *cell, budget, max_size, neighbors.guess(*cell))
        predictions.append(prediction)
        neighbors.add(*cell, prediction.line)
    return predictions


def predict(
    config: Config,
    model: ModelConfig,
    plan: BucketPlan,
    device: TargetDevice,
    on_progress: Progress,
    device_type: str | None = None,
) -> list[Prediction]:
    """A prediction per bucket. Raises `ProfileError` if not even one utterance fits."""
    kind = device_type or device.step_device(config)
    edges = edges_of(plan)
    function = partial(
        predict_buckets,
        model=model,
        train=config.train,
        precision=resolve_precision(config.train.precision, kind),
        device_type=kind,
        budget=device.budget(config),
        max_size=config.oomptimize.max_batch_size,
    )
    predictions: list[Prediction] = []
    for part in map_on_workers(edges, function, 4, Placement.data(config.cluster)):
        predictions += part
        on_progress("tracing buckets", len(predictions), len(edges))
    for number, prediction in enumerate(predictions):
        if prediction.batch_size is None and not device.is_real:
            alternative = _bytes_with_checkpointing(config, function, edges[number])
            raise does_not_fit(number, edges[number], prediction.peak_bytes, device, config, alternative)
    return [_at_least(number, predictions, edges) for number in range(len(predictions))]


def edges_of(plan: BucketPlan) -> list[Edges]:
    """(max_duration_ms, max_tokens) of each bucket."""
    return [(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets]


def _bytes_with_checkpointing(config: Config, function: Callable[..., list[Prediction]], edges: Edges) -> int | None:
    """What one utterance of a bucket needs with activation checkpointing; None if that is already on."""
    if config.train.activation_checkpointing == "full":
        return None
    saving = partial(function, train=replace(config.train, activation_checkpointing="full"))
    predictions: list[Prediction] = next(map_on_workers([edges], saving, 1, Placement.data(config.cluster)))
    return predictions[0].peak_bytes


def _at_least(number: int, predictions: Sequence[Prediction], edges: Sequence[Edges]) -> Prediction:
    """A bucket's prediction, raised to what a bucket with longer edges can hold: traces stop slightly below the
    maximum."""
    prediction, (duration, tokens) = predictions[number], edges[number]
    size = max(
        longer.batch_size or 0
        for longer, (max_duration_ms, max_tokens) in zip(predictions, edges, strict=True)
        if max_duration_ms >= duration and max_tokens >= tokens
    )
    if size <= (prediction.batch_size or 0):
        return prediction
    line = prediction.line
    return replace(prediction, batch_size=size, peak_bytes=round(line.base_bytes + size * line.slope_bytes))


def does_not_fit(
    number: int,
    edges: Edges,
    need: int,
    device: TargetDevice,
    config: Config,
    alternative: int | None = None,
    why: str | None = None,
) -> ProfileError:
    """The error for a bucket in which not even one utterance fits; with activation checkpointing it would need
    `alternative` bytes."""
    budget = device.budget(config)
    remedies = ["lower buckets.max_duration_ms or buckets.max_tokens", "use a smaller model"]
    if config.train.activation_checkpointing != "full":
        saved = f" (it then needs {alternative / GIB:.2f} GiB)" if alternative else ""
        remedies.insert(0, f"set train.activation_checkpointing: full{saved}")
    remedies.append("raise oomptimize.memory_fraction" if device.is_real else "raise oomptimize.device_memory")
    return ProfileError(
        f"bucket {number} (≤ {edges[0]} ms, ≤ {edges[1]} tokens): batch size 1 needs {need / GIB:.2f} GiB of "
        f"{budget / GIB:.2f} GiB",
        why=why,
        remedy=", ".join(remedies[:-1]) + ", or " + remedies[-1],
    )
