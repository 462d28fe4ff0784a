"""`raytrain tune`: whole training runs with drawn settings, of which ASHA ends the worse ones early.

Every trial is a training run (`trials`) on the artefacts of the run that is tuned. A stopped search goes on where it
was.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import yaml

from raytrain.cluster.running_trial import training_inputs
from raytrain.cluster.session import ray_session
from raytrain.cluster.trials import concurrent_trials, restored, trial_progress
from raytrain.config import Config, Distribution
from raytrain.console import Console
from raytrain.errors import ArtifactError, ConfigError, TrainingError, last_line
from raytrain.run_folder.trial_folder import SHARED, check_on_disk, with_settings
from raytrain.storage.artifacts import atomic_write_bytes, content_id, make_folder, write_json
from raytrain.storage.ownership import owned
from raytrain.tracking.runs import RunTracking, tracking_uri

TUNE_FORMAT = "raytrain.tune/1"


def run_tune(config: Config, console: Console, take_over: bool = False) -> list[dict[str, Any]]:
    """Search as `config.tune` says; returns the trials, best first, as `tune.json` keeps them.

    Raises `ConfigError` where the space names what can't be set, `ArtifactError` before the stages up to oomptimize
    have run, and `TrainingError` where no trial got as far as a validation.
    """
    check_on_disk(config, "raytrain tune")
    missing = [name for name in SHARED if name != "assignment" or config.data.stream is None]
    missing = [name for name in missing if not (config.run_dir / name).exists()]
    if missing:
        raise ArtifactError(
            f"tuning needs {', '.join(missing)} in {config.run_dir}",
            remedy="run `raytrain statistics`, `buckets`, `assign` and `oomptimize` with this configuration first",
        )
    if not config.data.dev:
        raise ConfigError(
            "tuning needs data.dev",
            why="trials are compared by their validation error",
            remedy="list dev manifests under data.dev",
        )
    for number in range(2):  # both ends of every range: what can't be set is found before Ray starts
        with_settings(config, {name: one.ends()[number] for name, one in config.tune.space.items()}, "tune.space")
    with (
        owned(config.run_location, console.say, take_over),
        RunTracking(config, config.run_dir) as tracking,
        console.stage("tune") as finish,
        tracking.stage("tune", goes_on=(config.run_dir / "tune").exists()),
        ray_session(config.cluster),
    ):
        trials = _search(config, console, tracking.child_id)
        write_json(config.run_dir / "tune.json", TUNE_FORMAT, trials, {})
        best = trials[0]
        atomic_write_bytes(config.run_dir / "tune_best.yaml", yaml.safe_dump(nested(best["settings"])).encode())
        tracking.current.log_metrics({"best_error": best["error"]}, 0, 0.0)
        for name in ("tune.json", "tune_best.yaml"):
            tracking.current.log_artifact(config.run_dir / name)
        finish(f"{len(trials)} trials; lowest validation error {best['error']:.1%}")
    return trials


def _search(config: Config, console: Console, parent_run_id: str | None) -> list[dict[str, Any]]:
    from ray import tune

    section = config.tune
    steps = section.max_steps or config.train.max_steps
    folder = make_folder(config.run_dir / "tune")
    config = config.model_copy(update={"train": replace(config.train, max_steps=steps)})
    job = {
        "config": config.model_dump(mode="json"),
        "run_dir": str(config.run_dir),
        "trials_dir": str(folder),
        "tracking_uri": tracking_uri(config, config.run_dir),
        "parent_run_id": parent_run_id,
    }
    space = {"job": job, "settings": {name: _domain(one) for name, one in section.space.items()}}
    name = f"search-{content_id([section.model_dump(mode='json'), training_inputs(config, config.run_dir)])}"

    def make(trainable: Any) -> Any:
        return tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
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
            ),
            run_config=tune.RunConfig(name=name, storage_path=str(folder), verbose=0),
        )

    tuner = restored(folder, name, space, make)
    with trial_progress(console, section.num_trials, folder), contextlib.redirect_stdout(None):
        grid = tuner.fit()
    trials = []
    for result in grid:
        found = dict(result.metrics or {})
        settings = (result.config or {}).get("settings", {})
        why = None if result.error is None else last_line(result.error)
        stopped = why is None and found.get("step", 0) < steps
        trials.append(
            {
                "settings": settings,
                "error": score_of(found),
                "wer": found.get("wer"),
                "steps": found.get("step", 0),
                "stopped_early": stopped,
                "why": why,
            }
        )
    if all(one["error"] is None for one in trials):
        raise TrainingError(
            "no trial got as far as a validation with a score",
            why=next((one["why"] for one in trials if one["why"]), None),
            remedy="mend what ended the trials, or give them more steps than train.validate_every_steps",
        )
    return sorted(trials, key=lambda one: (one["error"] is None, one["error"]))


def score_of(metrics: dict[str, Any]) -> float | None:
    """A trial's lowest validation error, None where no validation had a score."""
    error = metrics.get("best_error")
    return error if error is not None and math.isfinite(error) else None


def _domain(one: Distribution) -> Any:
    from ray import tune

    if one.choice is not None:
        return tune.choice(one.choice)
    return tune.loguniform(*one.log_uniform) if one.log_uniform is not None else tune.uniform(*one.uniform)


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """{"train.learning_rate": 1} → {"train": {"learning_rate": 1}}, as a configuration file has it."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        node = result
        *parents, last = name.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return result
