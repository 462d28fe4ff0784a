"""The pipeline: stages in order, each run only if its settings or inputs changed.

A stage has a key: a hash of the settings and the ids of the artifacts it reads. `stages.json` keeps each finished
stage's key and the ids of its outputs. If the key and the files are unchanged there is nothing to do, and a stage that
runs again but writes the same output does not invalidate later stages.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from raytrain.cluster.gpus import may_train_on_gpus
from raytrain.cluster.session import ray_session
from raytrain.config import Config
from raytrain.console import Console
from raytrain.errors import ArtifactError
from raytrain.redaction import redacted
from raytrain.run_folder.workspace import Workspace
from raytrain.stages import assign, buckets, evaluate, oomptimize, report, statistics, train
from raytrain.stages.context import Context
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, content_id, file_id, make_folder, read_state
from raytrain.storage.ownership import owning
from raytrain.storage.run_files import (
    BATCH_PROFILE,
    BUCKET_PLAN,
    CONFIG,
    ERRORS_PAGE,
    HYPOTHESES,
    MLFLOW_RUN,
    REPORT,
    SCORES,
    STAGE_RECORDS,
    TRAINED_NOTE,
)
from raytrain.storage.run_store import RunStore
from raytrain.tracking.runs import RunTracking


@dataclass(frozen=True)
class Stage:
    """`key` returns what the stage depends on (JSON values), including the cluster's GPUs if `key_names_gpus` is set;
    `run` runs it; `outputs` are the files it writes, by name or pattern; `is_whole` checks that the outputs are intact;
    `resumes` checks whether the stage can continue an earlier attempt."""

    name: str
    needs: tuple[str, ...]
    outputs: tuple[str, ...]
    key: Callable[[Workspace], object]
    run: Callable[[Context], str]
    uses_ray: bool = True
    key_names_gpus: bool = False
    resumes: Callable[[Workspace], bool] = lambda workspace: False
    applies: Callable[[Config], bool] = lambda config: True
    is_whole: Callable[[Workspace], bool] = lambda workspace: True


STAGES: tuple[Stage, ...] = (
    Stage(
        "statistics",
        (),
        statistics.OUTPUTS,
        statistics.key,
        statistics.run,
        is_whole=statistics.is_whole,
    ),
    Stage("buckets", ("statistics",), (BUCKET_PLAN,), buckets.key, buckets.run, uses_ray=False),
    Stage(
        "assign",
        ("statistics", "buckets"),
        (assign.INDEX,),
        assign.key,
        assign.run,
        applies=lambda config: config.data.stream is None,
        is_whole=assign.is_whole,
    ),
    Stage("oomptimize", ("buckets",), (BATCH_PROFILE,), oomptimize.key, oomptimize.run, key_names_gpus=True),
    Stage("train", ("assign", "oomptimize"), (TRAINED_NOTE,), train.key, train.run, resumes=train.resumes),
    Stage(
        "evaluate",
        ("train",),
        (HYPOTHESES, SCORES, ERRORS_PAGE),
        evaluate.key,
        evaluate.run,
    ),
    Stage(
        "report",
        ("statistics", "buckets", "assign", "oomptimize", "train", "evaluate"),
        (REPORT,),
        report.key,
        report.run,
        uses_ray=False,
    ),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


@dataclass(frozen=True)
class StageRecord:
    """A finished stage's entry in `stages.json`: its key, and the ids of its outputs by name."""

    key: str
    outputs: dict[str, str]


Records = Mapping[str, StageRecord]  # by stage name


@owning
def run_pipeline(config: Config, console: Console, names: tuple[str, ...] = STAGE_NAMES) -> list[str]:
    """Run the named stages that are not up to date; returns the names of those that ran.

    Raises `ArtifactError` if an earlier stage that is not among `names` has not run, and `OwnedError` if another
    process owns the run folder, unless `take_over` is set.
    """
    store = RunStore(config.run_location, config.run.cache_size)
    store.sync()
    run_dir = make_folder(config.run_dir)
    resolved = yaml.safe_dump(redacted(config.model_dump(mode="json")), sort_keys=False)
    atomic_write_bytes(run_dir / CONFIG, resolved.encode())
    store.share(CONFIG)
    # Ray starts with the first stage that needs it and stays up until the last: each start costs seconds, and a
    # shutdown in mid-run can catch a thread of Ray Data or Tune that still calls Ray, which kills the process.
    with RunTracking(config, run_dir) as tracking, contextlib.ExitStack() as ray:
        pipeline = _Pipeline(config, console, store, tracking, ray, names)
        ran = [stage.name for stage in STAGES if stage.name in names and pipeline.refresh(stage)]
    if not ran:
        console.say(f"nothing to do: {', '.join(names)} up to date in {config.run_location}")
    return ran


class _Pipeline:
    """Runs the stages `names` of one run folder."""

    def __init__(
        self,
        config: Config,
        console: Console,
        store: RunStore,
        tracking: RunTracking,
        ray: contextlib.ExitStack,
        names: tuple[str, ...],
    ) -> None:
        self._config, self._console, self._store = config, console, store
        self._tracking, self._ray, self._names = tracking, ray, names
        self._run_dir = config.run_dir
        self._done = read_stages(self._run_dir)

    def refresh(self, stage: Stage) -> bool:
        """Run a stage if it is not up to date; returns whether it ran."""
        config = self._config
        if not stage.applies(config):
            self._console.say(f"  {stage.name} is skipped: with data.stream, training reads the corpora directly")
            return False
        _check_needs(stage, config, self._done)
        kept = {name: record for name, record in self._done.items() if name not in self._names}
        _check_unchanged(stage, self._run_dir, kept)
        workspace = Workspace(config, self._run_dir)  # the previous stage may have changed artifacts
        if stage.key_names_gpus and may_train_on_gpus(config):
            self._ray.enter_context(ray_session(config.cluster))
        key = content_id({"stage": stage.name, "depends_on": stage.key(workspace)})
        if _is_current(self._run_dir, stage, self._done.get(stage.name), key) and stage.is_whole(workspace):
            self._console.skipped(stage.name)
            return False
        # From here on the old result is invalid; a stage that is interrupted runs again.
        self._done.pop(stage.name, None)
        _write_state(self._store, self._done)
        self._run(stage, Context(workspace, self._console, self._tracking, key))
        self._done[stage.name] = StageRecord(key, _identities(self._run_dir, stage))
        _write_state(self._store, self._done)
        return True

    def _run(self, stage: Stage, context: Context) -> None:
        if stage.uses_ray:
            self._ray.enter_context(ray_session(self._config.cluster))
        resumes = stage.resumes(context.workspace)
        with self._console.stage(stage.name) as finish, self._tracking.stage(stage.name, resumes):
            if (self._run_dir / MLFLOW_RUN).exists():
                self._store.share(MLFLOW_RUN)
            finish(stage.run(context))
            self._store.publish()


def _check_needs(stage: Stage, config: Config, done: Records) -> None:
    left_out = {stage.name for stage in STAGES if not stage.applies(config)}
    missing = [name for name in stage.needs if name not in done and name not in left_out]
    if missing:
        raise ArtifactError(
            f"{stage.name} needs the output of {', '.join(missing)} in {config.run_location}",
            remedy=f"run `raytrain {missing[0]}` with this configuration first, or `raytrain run` for all stages",
        )


def _check_unchanged(stage: Stage, run_dir: Path, records: Records) -> None:
    """Raise `ArtifactError` if a file is no longer what an earlier stage wrote. `records` are those of stages that do
    not run now; the others rewrite their files."""
    for writer in (before.name for before in STAGES[: STAGES.index(stage)] if before.name in records):
        for name, identity in records[writer].outputs.items():
            if not _is_same(run_dir / name, identity):
                raise ArtifactError(
                    f"{run_dir / name} is not what {writer} wrote",
                    why="it was changed, damaged or removed since",
                    remedy=f"run `raytrain {writer}` with this configuration, or `raytrain run` for all stages",
                )


def _is_same(path: Path, identity: str) -> bool:
    try:
        return file_id(path) == identity
    except (OSError, ValueError):  # ValueError: an invalid file name
        return False


def _is_current(run_dir: Path, stage: Stage, record: StageRecord | None, key: str) -> bool:
    if record is None or record.key != key or not _has_all(record.outputs, stage):
        return False
    return all(_is_same(run_dir / name, identity) for name, identity in record.outputs.items())


def _has_all(outputs: Mapping[str, str], stage: Stage) -> bool:
    """Whether a record names every file that the stage writes, and at least one file per pattern."""
    return all(fnmatch.filter(outputs, name) for name in stage.outputs)


def _identities(run_dir: Path, stage: Stage) -> dict[str, str]:
    named = [run_dir / name for name in stage.outputs if "*" not in name]
    matching = [path for name in stage.outputs if "*" in name for path in run_dir.glob(name)]
    return {path.relative_to(run_dir).as_posix(): file_id(path) for path in (*named, *matching)}


def read_stages(run_dir: Path) -> dict[str, StageRecord]:
    """The finished stages' records by name; empty if they can't be read, in which case all stages run again."""
    records = read_state(run_dir / STAGE_RECORDS, dict[str, StageRecord]) or {}
    return {name: StageRecord(record["key"], record["outputs"]) for name, record in records.items()}


def write_stages(run_dir: Path, records: Records) -> None:
    """Write the records that `read_stages` reads."""
    atomic_write_bytes(
        run_dir / STAGE_RECORDS, canonical_json({name: asdict(record) for name, record in records.items()})
    )


def _write_state(store: RunStore, done: Records) -> None:
    write_stages(store.local, done)
    store.share(STAGE_RECORDS)
