"""Training runs as Ray Tune trials, for searches (`tune`) and comparisons (`ablate`).

A trial is a Ray Train run in a folder of its own that sees the artefacts of the run that it belongs to. It resumes as
any training does, and one that is done is not done again.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raytrain.cluster.nodes import last_line
from raytrain.cluster.room import find_room, trains_on_gpus
from raytrain.cluster.trainer import STOP
from raytrain.config import Config, check_config
from raytrain.console import Console
from raytrain.errors import ConfigError
from raytrain.run_folder.lineage import training_key, training_meta
from raytrain.run_folder.workspace import Workspace
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, content_id, file_id, make_folder, read_state
from raytrain.storage.filesystem import is_uri
from raytrain.tracking import read_metrics
from raytrain.waiting import repeating

SHARED = (
    "tokenizer",
    "chunks.json",
    "statistics.json",
    "bucket_plan.json",
    "batch_profile.json",
    "assignment",
)
_DONE = "trial.json"


def with_settings(config: Config, settings: dict[str, Any], source: str = "trial") -> Config:
    """The configuration with a trial's settings by their dotted names. Raises `ConfigError` for those that would
    change the artefacts that trials share."""
    values = config.model_dump(mode="json")
    values["train"]["storage_path"] = None  # the best settings are trained again; trials are not worth keeping
    for name, value in settings.items():
        section, _, rest = name.partition(".")
        if section not in ("train", "model", "augment") or (section == "model" and "spec_augment" not in rest):
            raise ConfigError(
                f"{source} can't search {name}",
                allowed="train.…, augment.… and model.spec_augment.…",
                why="anything else changes the artefacts that trials share",
                remedy=f"take {name} out of tune.space, and set it for the whole run instead",
            )
        node = values
        *parents, last = name.split(".")
        for part in parents:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[last] = value
    return check_config(values, source=f"{source} with {settings}")


def check_on_disk(config: Config, what: str) -> None:
    """Raises `ConfigError` for a run folder at a URI, where trials can't read each other's artefacts."""
    if is_uri(config.run_location):
        raise ConfigError(
            f"{what} needs a run folder on a disk that all nodes share",
            got=f"run.root {config.run_location.rpartition('/')[0]}",
            why="its trials read one another's artefacts in place",
            remedy="set run.root to a shared folder for this command",
        )


def training_inputs(config: Config, run_dir: Path, files: dict[str, str] | None = None) -> list[Any]:
    """Names all that a training on the artefacts in `run_dir` depends on; `files` stand for artefacts there."""
    profile = Path((files or {}).get("batch_profile.json", run_dir / "batch_profile.json"))
    return [training_key(Workspace(config, run_dir)), file_id(profile)]


class RunningTrial:
    """One trial: a training run in a thread, read validation by validation.

    `params` has a `job` (the configuration, `run_dir` whose artefacts it sees, `trials_dir`, `tracking_uri`, and what
    there is of `label`, `settings`, `files` that stand for artefacts, and `parent_run_id`) and more `settings`.
    """

    def __init__(self, params: dict[str, Any]) -> None:
        job = params["job"]
        settings = {**job.get("settings", {}), **params["settings"]}
        config = with_settings(check_config(job["config"]), settings)
        meta = training_meta(Workspace(config, Path(job["run_dir"])))
        self.folder = _trial_folder(job, settings, meta["ids"]["lineage"])
        self._key = content_id(training_inputs(config, Path(job["run_dir"]), job.get("files")))
        self._lines: queue.Queue = queue.Queue()
        self._max_steps = config.train.max_steps
        self._said: dict[str, Any] = {"error": math.inf, "best_error": math.inf, "folder": str(self.folder)}
        self._tracker, self._status, mlflow = None, "FINISHED", None
        if self._is_done():
            for line in read_metrics(self.folder / "metrics.jsonl"):
                self._hear(line)
            self._lines.put(None)
            return
        if config.tracking.enabled and job.get("parent_run_id"):
            self._tracker, mlflow = _open_run(config, job, self.folder, settings)
        self._status = "KILLED"
        self._thread = threading.Thread(target=self._train, args=(config, meta, mlflow), name="training", daemon=True)
        self._thread.start()

    def next(self) -> dict[str, Any]:
        """The newest validation and the best so far; `done` where training is over. Raises what training raised."""
        while (line := self._lines.get()) is not None:
            if isinstance(line, Exception):
                self._status = "FAILED"
                raise line
            if self._hear(line):
                return {**self._said, "done": False}
        self._finish()
        return {**self._said, "done": True}

    def end(self) -> None:
        """Stop training where it has not ended, so that nothing of it is left when the next trial begins."""
        if self._status == "KILLED":
            (self.folder / STOP).touch()
            self._thread.join(timeout=180)
            if self._said.get("step", 0) >= self._max_steps:  # Tune may end it before it says that it is done
                self._finish()
        if self._tracker is not None:
            self._tracker.close(self._status)

    def _finish(self) -> None:
        if self._status == "KILLED":
            self._status = "FINISHED"
            said = {name: value for name, value in self._said.items() if value != math.inf}
            atomic_write_bytes(self.folder / _DONE, canonical_json({**said, "key": self._key}))

    def _is_done(self) -> bool:
        done = read_state(self.folder / _DONE, dict[str, Any])
        return done is not None and done.get("key") == self._key

    def _train(self, config: Config, meta: dict[str, Any], mlflow: dict[str, Any] | None) -> None:
        from raytrain.cluster.trainer import run_training

        try:
            run_training(config, self.folder, meta=meta, mlflow=mlflow, on_metrics=self._lines.put)
            self._lines.put(None)
        except Exception as error:
            self._lines.put(error)

    def _hear(self, line: dict[str, Any]) -> bool:
        """Take in a line of metrics; true if it is a validation's."""
        if "error" not in line:
            return False
        self._said |= {name: line[name] for name in ("step", "error", "wer", "bleu", "val_loss") if name in line}
        self._said["best_error"] = min(self._said["best_error"], line["error"])
        return True


def _trainable() -> Any:
    """`RunningTrial` as Ray Tune wants it. Tune tells a trial that it ends, which it does not do for a function."""
    from ray import tune

    class TrainingTrial(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self._trial = RunningTrial(config)

        def step(self) -> dict[str, Any]:
            return self._trial.next()

        def cleanup(self) -> None:
            self._trial.end()

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            return {}  # the training's own checkpoints say where to go on

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

    # It only waits for its workers, which need all CPUs; but a request of nothing at all is refused.
    return tune.with_resources(TrainingTrial, {"CPU": 0, "memory": 1 << 20})


def _trial_folder(job: dict[str, Any], settings: dict[str, Any], lineage: str) -> Path:
    """A run folder that sees the artefacts of the run; the same one for the same settings and inputs."""
    files = {name: Path(job["run_dir"]) / name for name in SHARED}
    files |= {name: Path(path) for name, path in job.get("files", {}).items()}
    identity = content_id([settings, lineage, job.get("label"), file_id(files["batch_profile.json"])])
    folder = make_folder(Path(job["trials_dir"]) / f"trial-{identity[:12]}")
    for name, path in files.items():
        with contextlib.suppress(FileExistsError):
            if path.exists():
                (folder / name).symlink_to(path)
    return folder


def _open_run(
    config: Config, job: dict[str, Any], folder: Path, settings: dict[str, Any]
) -> tuple[Any, dict[str, Any] | None]:
    """The trial's MLflow run, the same one where the trial is resumed, and what training needs to write into it."""
    from raytrain.tracking.mlflow import MlflowTracker

    note = folder / "mlflow_run_id"
    known = note.read_bytes().decode(errors="replace") if note.exists() else None
    name, uri = job.get("label") or folder.name, job["tracking_uri"]
    tracker = MlflowTracker.open(
        uri, config.tracking.experiment, name, run_id=known, parent_run_id=job["parent_run_id"]
    )
    if known is None and tracker.run_id:
        tracker.log_params(settings)
        atomic_write_bytes(note, tracker.run_id.encode())
    arguments = {
        "tracking_uri": uri,
        "experiment": config.tracking.experiment,
        "run_name": name,
        "run_id": tracker.run_id,
    }
    return tracker, arguments if tracker.run_id else None


def concurrent_trials(config: Config, most: int | None = None) -> int:
    """Trials at a time: as many as the cluster has room for. Each waits for all of its workers, and more trials than
    fit would wait for each other."""
    room = find_room(config, trains_on_gpus(config)).workers // config.train.most_workers
    return max(1, min(room, most or room))


def restored(folder: Path, name: str, param_space: dict[str, Any], make: Callable[..., Any]) -> Any:
    """The Tuner of `name` in a folder, where it was stopped; else what `make(trainable)` gives."""
    from ray import tune

    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # else a stopped search loses ten seconds of results
    trainable = _trainable()
    if tune.Tuner.can_restore(str(folder / name)):
        return tune.Tuner.restore(
            str(folder / name), trainable, resume_unfinished=True, restart_errored=True, param_space=param_space
        )
    return make(trainable)


def run_grid(
    config: Config, console: Console, jobs: list[dict[str, Any]], folder: Path, parent_run_id: str | None
) -> list[dict[str, Any]]:
    """Train every job (see `RunningTrial`; each has its own label) as far as it goes; each `job` with its `folder`, and
    `why` it failed where it did, in the order of jobs."""
    from ray import tune

    trials_dir = make_folder(folder / "trials")
    full = [{**job, "trials_dir": str(trials_dir), "parent_run_id": parent_run_id} for job in jobs]
    inputs = [
        training_inputs(
            with_settings(check_config(job["config"]), job.get("settings", {})), Path(job["run_dir"]), job.get("files")
        )
        for job in jobs
    ]
    name = f"grid-{content_id([jobs, inputs])[:16]}"
    space = {"job": tune.grid_search(full), "settings": {}}

    def make(trainable: Any) -> Any:
        return tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="best_error", mode="min", max_concurrent_trials=concurrent_trials(config)
            ),
            run_config=tune.RunConfig(name=name, storage_path=str(folder), verbose=0),
        )

    tuner = restored(folder, name, space, make)
    with trial_progress(console, len(full), trials_dir), contextlib.redirect_stdout(None):
        grid = tuner.fit()
    found = {}
    for result in grid:
        why = None if result.error is None else last_line(result.error)
        found[result.config["job"]["label"]] = {"folder": (result.metrics or {}).get("folder"), "why": why}
    return [{"job": job, **found[job["label"]]} for job in full]


@contextlib.contextmanager
def trial_progress(console: Console, total: int, folder: Path) -> Iterator[None]:
    """A bar of trials that are over, read from their folders, for Tune's own table does not belong among stages."""
    with console.progress("trials", total) as update:

        def look() -> None:
            begun, done = len(list(folder.glob("trial-*"))), len(list(folder.glob(f"trial-*/{_DONE}")))
            update(completed=done, text=f"trials  {begun} begun")

        with repeating(look, 1.0):
            yield
