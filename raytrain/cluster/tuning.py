"""A search over training settings with Ray Tune: trials with sampled settings (`trials`), the worst of which ASHA stops
early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raytrain.cluster.running_trial import training_inputs
from raytrain.cluster.trials import concurrent_trials, run_trials
from raytrain.config import Config, Distribution
from raytrain.console import Console
from raytrain.errors import last_line
from raytrain.storage.artifacts import content_id, make_folder
from raytrain.tracking.runs import tracking_uri

if TYPE_CHECKING:
    from ray.tune import Result, TuneConfig


@dataclass(frozen=True)
class TuneTrial:
    """A trial of a search: its `settings` by dotted name, the lowest validation `error` and the last WER, if there are
    any, whether ASHA stopped it, and `why` it failed if it did."""

    settings: dict[str, object]
    error: float | None
    wer: float | None
    steps: int
    stopped_early: bool
    why: str | None


def search_settings(config: Config, console: Console, parent_run_id: str | None) -> list[TuneTrial]:
    """Train with settings sampled as `config.tune` says; returns all trials, in no particular order. An interrupted
    search resumes."""
    steps = config.tune.max_steps or config.train.max_steps
    config = config.model_copy(update={"train": replace(config.train, max_steps=steps)})
    folder = make_folder(config.run_dir / "tune")
    identity = content_id([config.tune.model_dump(mode="json"), training_inputs(config, config.run_dir)])
    name = f"search-{identity}"
    space = {
        "job": {
            "config": config.model_dump(mode="json"),
            "run_dir": str(config.run_dir),
            "trials_dir": str(folder),
            "tracking_uri": tracking_uri(config, config.run_dir),
            "parent_run_id": parent_run_id,
        },
        "settings": {key: _domain(distribution) for key, distribution in config.tune.space.items()},
    }
    results = run_trials(console, name, folder, space, lambda: _tune_config(config), num_trials=config.tune.num_trials)
    return [_trial_of(result, steps) for result in results]


def _tune_config(config: Config) -> TuneConfig:
    from ray import tune

    section, steps = config.tune, config.train.max_steps
    return tune.TuneConfig(
        metric="error",
        mode="min",
        num_samples=section.num_trials,
        search_alg=tune.search.BasicVariantGenerator(
            max_concurrent=concurrent_trials(config, section.max_concurrent), random_state=config.seed
        ),
        scheduler=tune.schedulers.ASHAScheduler(
            time_attr="step",
            max_t=steps,
            grace_period=min(steps, section.grace_steps or max(1, steps // 9)),
            reduction_factor=section.reduction_factor,
        ),
    )


def _domain(distribution: Distribution) -> object:
    from ray import tune

    if distribution.choice is not None:
        return tune.choice(distribution.choice)
    low, high = distribution.ends()
    return tune.loguniform(low, high) if distribution.log_uniform is not None else tune.uniform(low, high)


def _trial_of(result: Result, steps: int) -> TuneTrial:
    """Convert Tune's `result` of a trial that may have had `steps`."""
    metrics = result.metrics or {}
    why = None if result.error is None else last_line(result.error)
    return TuneTrial(
        settings=(result.config or {}).get("settings", {}),
        error=score_of(metrics),
        wer=metrics.get("wer"),
        steps=metrics.get("step", 0),
        stopped_early=why is None and metrics.get("step", 0) < steps,
        why=why,
    )


def score_of(metrics: Mapping[str, float | None]) -> float | None:
    """A trial's lowest validation error, or None if no validation had a score."""
    error = metrics.get("best_error")
    return error if error is not None and math.isfinite(error) else None
