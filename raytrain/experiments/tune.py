"""`raytrain tune`: whole training runs with sampled settings, the worst of which ASHA stops early.

Every trial is a training run (`raytrain.cluster.trials`) on the artifacts of the tuned run. The same command resumes an
interrupted search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from raytrain.cluster.session import ray_session
from raytrain.cluster.tuning import TuneTrial, search_settings
from raytrain.config import Config
from raytrain.console import Console
from raytrain.errors import ArtifactError, ConfigError, TrainingError
from raytrain.run_folder.trial_folder import SHARED, check_on_disk, with_settings
from raytrain.storage.artifacts import atomic_write_bytes, write_json
from raytrain.storage.ownership import owned
from raytrain.storage.run_files import TUNE
from raytrain.tracking.runs import RunTracking

TUNE_FORMAT = "raytrain.tune/1"


def run_tune(config: Config, console: Console, take_over: bool = False) -> list[TuneTrial]:
    """Search as configured in `config.tune`; returns the trials, best first, as stored in `tune.json`.

    Raises `ConfigError` if the space names a setting that can't be searched, `ArtifactError` if the stages up to
    oomptimize have not run, and `TrainingError` if no trial reached a validation.
    """
    _check_tunable(config)
    with (
        owned(config.run_location, console.say, take_over),
        RunTracking(config, config.run_dir) as tracking,
        console.stage("tune") as finish,
        tracking.stage("tune", resumes=(config.run_dir / "tune").exists()),
        ray_session(config.cluster),
    ):
        trials = _best_first(search_settings(config, console, tracking.child_id))
        best = trials[0]
        write_json(config.run_dir / TUNE, TUNE_FORMAT, [asdict(trial) for trial in trials], {})
        atomic_write_bytes(config.run_dir / "tune_best.yaml", yaml.safe_dump(nested(best.settings)).encode())
        tracking.current.log_metrics({"best_error": _error(best)}, 0, 0.0)
        for name in (TUNE, "tune_best.yaml"):
            tracking.current.log_artifact(config.run_dir / name)
        finish(f"{len(trials)} trials; lowest validation error {_error(best):.1%}")
    return trials


def _check_tunable(config: Config) -> None:
    check_on_disk(config, "raytrain tune")
    needed = [name for name in SHARED if name != "assignment" or config.data.stream is None]
    missing = [name for name in needed if not (config.run_dir / name).exists()]
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
    ends = {name: distribution.ends() for name, distribution in config.tune.space.items()}
    for number in range(2):  # both ends of every range: invalid settings are reported before Ray starts
        with_settings(config, {name: values[number] for name, values in ends.items()}, "tune.space")


def _best_first(trials: list[TuneTrial]) -> list[TuneTrial]:
    """Raises `TrainingError` if no trial has a score."""
    if all(trial.error is None for trial in trials):
        raise TrainingError(
            "no trial reached a validation with a score",
            why=next((trial.why for trial in trials if trial.why), None),
            remedy="fix what stopped the trials, or give them more steps than train.validate_every_steps",
        )
    return sorted(trials, key=_error)


def _error(trial: TuneTrial) -> float:
    """Trials without a score rank last."""
    return math.inf if trial.error is None else trial.error


def nested(settings: Mapping[str, object]) -> dict[str, Any]:
    """{"train.learning_rate": 1} → {"train": {"learning_rate": 1}}, as in a configuration file."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        node = result
        *parents, last = name.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return result
