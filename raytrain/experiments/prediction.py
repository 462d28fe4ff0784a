"""The paper's batching schemes by prediction: a model's memory is traced for a few shapes, batches are drawn from a
length histogram, and no device and no audio are needed.

    surface = trace_surface(histogram, model, settings, precision="bf16", budget=int(0.9 * 80 * 2**30))
    rows = predict_schemes(histogram, BucketSettings(), model, surface, budget)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.plan import BucketPlan, BucketSettings, make_plan
from raytrain.lengths.schemes import (
    PENALTY_SECONDS,
    SCHEMES,
    SchemeRow,
    by_seconds,
    largest_batch_seconds,
    scheme_settings,
    simulate_scheme,
    sizes_by_memory,
    sizes_by_seconds,
)
from raytrain.model.config import ModelConfig
from raytrain.model.cost import cost_of
from raytrain.training.memory.prediction import predict_batch_size
from raytrain.training.memory.surface import MemorySurface, NeighborLines
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.settings import TrainSettings

_DURATIONS = (0.05, 0.125, 0.25, 0.5, 0.75, 1.0)  # of the longest
_RATES = (0.5, 0.9, 1.0)  # quantiles of tokens per second; the last is the fastest talker
_LARGEST_BATCH = 4096


def fit_limits(base: BucketSettings, model: ModelConfig) -> BucketSettings:
    """The settings, with no more tokens than the model has positions for."""
    return replace(base, max_tokens=min(base.max_tokens, model.max_positions + 1))


def trace_surface(
    histogram: LengthHistogram,
    settings: BucketSettings,
    model: ModelConfig,
    train: TrainSettings,
    *,
    precision: str,
    device_type: str,
    budget: int,
    on_shape: Callable[[int, int], None] = lambda done, total: None,
) -> MemorySurface:
    """A training step's memory through 18 shapes between the corpus' shortest and longest utterances, slow and fast
    talkers; about half a second each for a large model."""
    usable = (histogram.cells <= settings.max_duration_ms) & (histogram.tokens <= settings.max_tokens)
    kept = histogram.select(usable)
    longest, most = int(kept.cells.max()), int(kept.tokens.max())
    rate = kept.tokens / kept.cells
    order = np.argsort(rate)
    reached = np.cumsum(kept.counts[order]) / kept.total
    rates = [float(rate[order][np.searchsorted(reached, q).clip(max=len(order) - 1)]) for q in _RATES]
    shapes = sorted(
        {
            (duration := max(160, int(longest * share)), int(np.clip(duration * one, 2, most)))
            for share in _DURATIONS
            for one in rates
        }
        | {(longest, most)}
    )
    tracer = StepTracer(model, train, precision=precision, world_size=train.most_workers, device_type=device_type)
    lines, known = [], NeighborLines()
    for number, shape in enumerate(shapes):
        line = predict_batch_size(tracer, *shape, budget, _LARGEST_BATCH, known.guess(*shape)).line
        known.add(*shape, line)
        lines.append(line)
        on_shape(number + 1, len(shapes))
    return MemorySurface.through(shapes, lines)


@dataclass(frozen=True)
class SchemePlan:
    """A scheme's plan and batch sizes; `batch_seconds` where sizes follow from seconds of audio."""

    scheme: str
    plan: BucketPlan
    sizes: tuple[int, ...]
    batch_seconds: float | None


def plan_scheme(
    scheme: str,
    histogram: LengthHistogram,
    base: BucketSettings,
    model: ModelConfig,
    surface: MemorySurface,
    budget: int,
    *,
    batch_seconds: float | None = None,
    most: int = _LARGEST_BATCH,
) -> SchemePlan:
    """Plan and sizes of one scheme. Without `batch_seconds` A and B get the most seconds that fit the memory."""
    plan = make_plan(histogram, scheme_settings(scheme, base), "", cost_of(model))
    if not by_seconds(scheme):
        return SchemePlan(scheme, plan, sizes_by_memory(plan, surface, budget, most), None)
    seconds = batch_seconds or largest_batch_seconds(histogram, plan, surface, budget)
    sizes = tuple(min(most, size) for size in sizes_by_seconds(histogram, plan, seconds, PENALTY_SECONDS))
    return SchemePlan(scheme, plan, sizes, seconds)


def predict_schemes(
    histogram: LengthHistogram,
    base: BucketSettings,
    model: ModelConfig,
    surface: MemorySurface,
    budget: int,
    *,
    schemes: Sequence[str] = SCHEMES,
    batch_seconds: float | None = None,
    seed: int = 0,
) -> list[SchemeRow]:
    """A row for each scheme on a device with `budget` bytes for a step."""
    cost, rows = cost_of(model), []
    for scheme in schemes:
        one = plan_scheme(scheme, histogram, base, model, surface, budget, batch_seconds=batch_seconds)
        rows.append(
            simulate_scheme(
                scheme,
                histogram,
                one.plan,
                one.sizes,
                cost,
                surface,
                budget,
                batch_seconds=one.batch_seconds,
                seed=seed,
            )
        )
    return rows
