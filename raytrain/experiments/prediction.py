"""Predicting batching schemes: a model's memory is traced for a few shapes, and batches are drawn from a length
histogram; neither a device nor audio is needed.

    surface = trace_surface(histogram, settings, model, train, precision="bf16", device_type="cuda", budget=budget)
    simulator = SchemeSimulator(histogram, settings, model, surface, budget)
    rows = [simulator.simulate(simulator.plan(scheme)) for scheme in SCHEMES]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.plan import BucketPlan, BucketSettings, make_plan
from raytrain.lengths.schemes import (
    PENALTY_SECONDS,
    Memory,
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
_RATES = (0.5, 0.9, 1.0)  # quantiles of tokens per second; the last is the fastest speaker
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
    """A training step's memory, fitted to 18 shapes between the corpus' shortest and longest utterances, slow and fast
    speakers; tracing takes about half a second per shape for a large model."""
    usable = (histogram.cells <= settings.max_duration_ms) & (histogram.tokens <= settings.max_tokens)
    shapes = _shapes(histogram.select(usable))
    tracer = StepTracer(model, train, precision=precision, world_size=train.most_workers, device_type=device_type)
    lines, neighbors = [], NeighborLines()
    for number, shape in enumerate(shapes):
        line = predict_batch_size(tracer, *shape, budget, _LARGEST_BATCH, neighbors.guess(*shape)).line
        neighbors.add(*shape, line)
        lines.append(line)
        on_shape(number + 1, len(shapes))
    return MemorySurface.through(shapes, lines)


def _shapes(histogram: LengthHistogram) -> list[tuple[int, int]]:
    """(duration in ms, tokens) for a few durations at a few speaking rates, plus the maximum of both."""
    longest, most = int(histogram.cells.max()), int(histogram.tokens.max())
    rate = histogram.tokens / histogram.cells
    order = np.argsort(rate)
    reached = np.cumsum(histogram.counts[order]) / histogram.total
    rates = [float(rate[order][np.searchsorted(reached, q).clip(max=len(order) - 1)]) for q in _RATES]
    durations = [max(160, int(longest * share)) for share in _DURATIONS]
    grid = {
        (duration, int(np.clip(duration * tokens_per_ms, 2, most))) for duration in durations for tokens_per_ms in rates
    }
    return sorted(grid | {(longest, most)})


@dataclass(frozen=True)
class SchemePlan:
    """A scheme's plan and batch sizes; `batch_seconds` is set if sizes follow from seconds of audio."""

    scheme: str
    plan: BucketPlan
    sizes: tuple[int, ...]
    batch_seconds: float | None


@dataclass(frozen=True)
class SchemeSimulator:
    """Schemes for a corpus' lengths and a model, on a device with `budget` bytes for a step. `base` sets the number of
    buckets, `max_batch_size` bounds all sizes."""

    histogram: LengthHistogram
    base: BucketSettings
    model: ModelConfig
    memory: Memory
    budget: int
    max_batch_size: int = _LARGEST_BATCH
    seed: int = 0

    def plan(self, scheme: str, batch_seconds: float | None = None) -> SchemePlan:
        """Plan and sizes of a scheme. Without `batch_seconds`, A and B get as many seconds as fit in memory."""
        plan = make_plan(self.histogram, scheme_settings(scheme, self.base), "", cost_of(self.model))
        if not by_seconds(scheme):
            sizes = sizes_by_memory(plan, self.memory, self.budget, self.max_batch_size)
            return SchemePlan(scheme, plan, sizes, None)
        seconds = batch_seconds or largest_batch_seconds(self.histogram, plan, self.memory, self.budget)
        unbounded = sizes_by_seconds(self.histogram, plan, seconds, PENALTY_SECONDS)
        return SchemePlan(scheme, plan, tuple(min(self.max_batch_size, size) for size in unbounded), seconds)

    def simulate(self, planned: SchemePlan) -> SchemeRow:
        """Padding, contents and memory of the plan's batches."""
        return simulate_scheme(
            planned.scheme,
            self.histogram,
            planned.plan,
            planned.sizes,
            cost_of(self.model),
            self.memory,
            self.budget,
            batch_seconds=planned.batch_seconds,
            seed=self.seed,
        )
