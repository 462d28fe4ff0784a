"""Training runs as Ray Tune trials, for searches (`tune`) and comparisons (`ablate`).

A trial is a training run in its own run folder (`running_trial`); the same call resumes interrupted trials.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from raytrain.cluster.room import find_room, trains_on_gpus
from raytrain.cluster.running_trial import DONE_NOTE, RunningTrial, training_inputs
from raytrain.config import Config, check_config
from raytrain.console import Console
from raytrain.errors import last_line
from raytrain.run_folder.trial_folder import TrialJob, with_settings
from raytrain.storage.artifacts import content_id, make_folder
from raytrain.waiting import repeating

if TYPE_CHECKING:
    from ray.tune import Result, Trainable, TuneConfig, Tuner

_LEAST_MEMORY = 1 << 20  # bytes: an empty request is refused


class GridTrial(TypedDict):
    """A job that was trained, the trial's folder if it got one, and `why` it failed if it did."""

    job: Mapping[str, Any]
    folder: str | None
    why: str | None


def _trainable() -> type[Trainable]:
    """`RunningTrial` as a Ray Tune class trainable; Tune notifies a class when its trial ends, but not a function."""
    from ray import tune

    class TrainingTrial(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self._trial = RunningTrial(config)

        def step(self) -> dict[str, Any]:
            return self._trial.next()

        def cleanup(self) -> None:
            self._trial.end()

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            return {}  # the training's own checkpoints say where to resume

        def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
            pass

    # The trial only waits for its workers, which need all CPUs.
    return tune.with_resources(TrainingTrial, {"CPU": 0, "memory": _LEAST_MEMORY})


def concurrent_trials(config: Config, most: int | None = None) -> int:
    """Concurrent trials: as many as the cluster has room for. Each waits for all of its workers, so more trials than
    fit would deadlock."""
    room = find_room(config, trains_on_gpus(config)).workers // config.train.most_workers
    return max(1, min(room, most or room))


def restored(folder: Path, name: str, param_space: dict[str, Any], make: Callable[[type[Trainable]], Tuner]) -> Tuner:
    """The interrupted Tuner of `name` restored from a folder, or else `make(trainable)`."""
    from ray import tune

    os.environ.setdefault(
        "TUNE_GLOBAL_CHECKPOINT_S", "1"
    )  # otherwise an interrupted search loses ten seconds of results
    trainable, path = _trainable(), str(folder / name)
    if tune.Tuner.can_restore(path):
        return tune.Tuner.restore(
            path, trainable, resume_unfinished=True, restart_errored=True, param_space=param_space
        )
    return make(trainable)


def run_trials(
    console: Console,
    name: str,
    folder: Path,
    param_space: dict[str, Any],
    tune_config: Callable[[], TuneConfig],
    *,
    num_trials: int,
    trials_dir: Path | None = None,
) -> list[Result]:
    """Run the trials `name` of a parameter space in Tune to completion; interrupted ones resume. Tune keeps its state
    in `folder`, and the trials' run folders are in `trials_dir`, by default also `folder`."""
    from ray import tune

    def make(trainable: type[Trainable]) -> Tuner:
        run_config = tune.RunConfig(name=name, storage_path=str(folder), verbose=0)
        return tune.Tuner(trainable, param_space=param_space, tune_config=tune_config(), run_config=run_config)

    tuner = restored(folder, name, param_space, make)
    with trial_progress(console, num_trials, trials_dir or folder), contextlib.redirect_stdout(None):
        grid = tuner.fit()
    return [grid[index] for index in range(len(grid))]


def run_grid(
    config: Config, console: Console, jobs: Sequence[Mapping[str, Any]], folder: Path, parent_run_id: str | None
) -> list[GridTrial]:
    """Train every job (the JSON of a `TrialJob` without `trials_dir` and `parent_run_id`, each with its own label) as
    far as possible; returns each outcome, in the order of jobs."""
    from ray import tune

    trials_dir = make_folder(folder / "trials")
    full = [{**job, "trials_dir": str(trials_dir), "parent_run_id": parent_run_id} for job in jobs]
    results = run_trials(
        console,
        f"grid-{content_id([list(jobs), [_inputs(TrialJob.from_json(job)) for job in full]])[:16]}",
        folder,
        {"job": tune.grid_search(full), "settings": {}},
        lambda: tune.TuneConfig(metric="best_error", mode="min", max_concurrent_trials=concurrent_trials(config)),
        num_trials=len(full),
        trials_dir=trials_dir,
    )
    by_label = {_label(result): result for result in results}
    return [_grid_trial(job, by_label[job["label"]]) for job in full]


def _inputs(job: TrialJob) -> list[Any]:
    return training_inputs(with_settings(check_config(job.config), job.settings), Path(job.run_dir), job.files)


def _label(result: Result) -> str:
    """The label of the job that a Tune result belongs to."""
    return (result.config or {})["job"]["label"]


def _grid_trial(job: Mapping[str, Any], result: Result) -> GridTrial:
    why = None if result.error is None else last_line(result.error)
    return {"job": job, "folder": (result.metrics or {}).get("folder"), "why": why}


@contextlib.contextmanager
def trial_progress(console: Console, total: int, folder: Path) -> Iterator[None]:
    """A progress bar of finished trials, read from their folders; replaces Tune's own table."""
    with console.progress("trials", total) as update:

        def read() -> None:
            begun, done = len(list(folder.glob("trial-*"))), len(list(folder.glob(f"trial-*/{DONE_NOTE}")))
            update(completed=done, text=f"trials  {begun} started")

        with repeating(read, 1.0):
            yield
