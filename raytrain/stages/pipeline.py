"""The pipeline: stages in order, each run only where its settings or inputs changed.

A stage has a key: a hash of the settings it reads and the ids of the artefacts it reads. `stages.json` keeps
each finished stage's key and the ids of what it wrote. The same key and the same files mean there is nothing
to do; and a stage that runs again but writes what it wrote before leaves the stages after it alone.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raytrain.cluster.gpus import may_train_on_gpus
from raytrain.cluster.session import ray_session
from raytrain.config import Config
from raytrain.console import Console
from raytrain.errors import ArtifactError
from raytrain.redaction import redacted
from raytrain.run_folder.lineage import training_key
from raytrain.run_folder.workspace import Workspace
from raytrain.stages import stages
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, content_id, file_id, make_folder, read_state
from raytrain.storage.ownership import owning
from raytrain.storage.run_store import RunStore
from raytrain.tracking.runs import RUN_NOTE, RunTracking

_STATE = "stages.json"


@dataclass(frozen=True)
class Stage:
    """`key` names what the stage depends on (JSON values), with `key_names_gpus` also the cluster's GPUs; `run` does
    it; `outputs` are files it writes, by name or pattern; `is_whole` tells whether what these name is as it was."""

    name: str
    needs: tuple[str, ...]
    outputs: tuple[str, ...]
    key: Callable[[Workspace], Any]
    run: Callable[[stages.Context], str]
    uses_ray: bool = True
    key_names_gpus: bool = False
    goes_on: Callable[[Workspace], bool] = lambda workspace: False
    applies: Callable[[Config], bool] = lambda config: True
    is_whole: Callable[[Workspace], bool] = lambda workspace: True


STAGES: tuple[Stage, ...] = (
    Stage(
        "statistics",
        (),
        ("tokenizer/tokenizer.json", "tokenizer/*.model", "histogram.parquet", "statistics.json", "chunks.json"),
        stages.statistics_key,
        stages.run_statistics,
        is_whole=stages.statistics_are_whole,
    ),
    Stage("buckets", ("statistics",), ("bucket_plan.json",), stages.buckets_key, stages.run_buckets, uses_ray=False),
    Stage(
        "assign",
        ("statistics", "buckets"),
        ("assignment/index.json",),
        stages.assign_key,
        stages.run_assign,
        applies=lambda config: config.data.stream is None,
        is_whole=stages.assign_is_whole,
    ),
    Stage(
        "oomptimize",
        ("buckets",),
        ("batch_profile.json",),
        stages.oomptimize_key,
        stages.run_oomptimize,
        key_names_gpus=True,
    ),
    Stage(
        "train",
        ("assign", "oomptimize"),
        ("checkpoints/last.json",),
        training_key,
        stages.run_train,
        goes_on=stages.train_goes_on,
    ),
    Stage(
        "evaluate",
        ("train",),
        ("hypotheses.jsonl", "scores.json", "errors.html"),
        stages.evaluate_key,
        stages.run_evaluate,
    ),
    Stage(
        "report",
        ("statistics", "buckets", "assign", "oomptimize", "train", "evaluate"),
        ("report.html",),
        stages.report_key,
        stages.run_report,
        uses_ray=False,
    ),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


@dataclass(frozen=True)
class StageRecord:
    """What `stages.json` keeps of a finished stage: its key, and the ids of its outputs by name."""

    key: str
    outputs: dict[str, str]


@owning
def run_pipeline(config: Config, console: Console, names: tuple[str, ...] = STAGE_NAMES) -> list[str]:
    """Run the named stages that are not up to date; returns the names of those that ran.

    Raises `ArtifactError` where a stage that is not among `names` has not run before, and `OwnedError` where another
    process owns the run folder, unless it is told to `take_over`.
    """
    store = RunStore(config.run_location, config.run.cache_size)
    store.adopt()
    run_dir = make_folder(config.run_dir)
    resolved = yaml.safe_dump(redacted(config.model_dump(mode="json")), sort_keys=False)
    atomic_write_bytes(run_dir / "config.yaml", resolved.encode())
    store.share("config.yaml")
    done = read_stages(run_dir)
    ran: list[str] = []
    # Ray starts with the first stage that needs it and stays until the last: each start costs seconds, and a shutdown
    # in mid-run can catch a thread of Ray Data or Tune that still asks for something, which ends the process.
    with RunTracking(config, run_dir) as tracking, contextlib.ExitStack() as ray:
        for stage in STAGES:
            if stage.name not in names:
                continue
            if not stage.applies(config):
                console.say(f"  {stage.name} is left out: with data.stream training reads the corpora as they are")
                continue
            _check_needs(stage, config, done)
            _check_unchanged(stage, run_dir, {name: done[name] for name in done if name not in names})
            workspace = Workspace(config, run_dir)  # artefacts may have changed since the stage before
            if stage.key_names_gpus and may_train_on_gpus(config):
                ray.enter_context(ray_session(config.cluster))
            key = content_id({"stage": stage.name, "depends_on": stage.key(workspace)})
            if _is_current(run_dir, stage, done.get(stage.name), key) and stage.is_whole(workspace):
                console.skipped(stage.name)
                continue
            # From here on the old result is void; a stage that is stopped half-way runs again.
            done.pop(stage.name, None)
            _write_state(store, done)
            if stage.uses_ray:
                ray.enter_context(ray_session(config.cluster))
            context = stages.Context(workspace, console, tracking, key)
            with console.stage(stage.name) as finish, tracking.stage(stage.name, stage.goes_on(workspace)):
                if (run_dir / RUN_NOTE).exists():
                    store.share(RUN_NOTE)
                finish(stage.run(context))
                store.publish()
            done[stage.name] = {"key": key, "outputs": _identities(run_dir, stage)}
            _write_state(store, done)
            ran.append(stage.name)
    if not ran:
        console.say(f"nothing to do: {', '.join(names)} up to date in {config.run_location}")
    return ran


def _check_needs(stage: Stage, config: Config, done: dict[str, Any]) -> None:
    left_out = {other.name for other in STAGES if not other.applies(config)}
    missing = [name for name in stage.needs if name not in done and name not in left_out]
    if missing:
        raise ArtifactError(
            f"{stage.name} needs what {', '.join(missing)} would have written to {config.run_location}",
            remedy=f"run `raytrain {missing[0]}` with this configuration first, or `raytrain run` for all stages",
        )


def _check_unchanged(stage: Stage, run_dir: Path, records: dict[str, Any]) -> None:
    """Raise `ArtifactError` where a file is no longer what a stage before this one wrote. `records` are those of stages
    that do not run now; one that does writes its files anew."""
    for before in STAGES[: STAGES.index(stage)]:
        for name, identity in records.get(before.name, {"outputs": {}})["outputs"].items():
            if not _is_same(run_dir / name, identity):
                raise ArtifactError(
                    f"{run_dir / name} is not what {before.name} wrote",
                    why="it was changed, damaged or removed since",
                    remedy=f"run `raytrain {before.name}` with this configuration, or `raytrain run` for all stages",
                )


def _is_same(path: Path, identity: str) -> bool:
    try:
        return file_id(path) == identity
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return False


def _is_current(run_dir: Path, stage: Stage, record: dict[str, Any] | None, key: str) -> bool:
    if record is None or record["key"] != key or not _has_all(record["outputs"], stage):
        return False
    return all(_is_same(run_dir / name, identity) for name, identity in record["outputs"].items())


def _has_all(outputs: dict[str, str], stage: Stage) -> bool:
    """Whether a record names every file that the stage writes, and some file for each of its patterns."""
    return all(fnmatch.filter(outputs, name) for name in stage.outputs)


def _identities(run_dir: Path, stage: Stage) -> dict[str, str]:
    named = [run_dir / name for name in stage.outputs if "*" not in name]
    found = [path for name in stage.outputs if "*" in name for path in run_dir.glob(name)]
    return {path.relative_to(run_dir).as_posix(): file_id(path) for path in (*named, *found)}


def read_stages(run_dir: Path) -> dict[str, Any]:
    """The finished stages' records (see `StageRecord`) by name; none where they can't be read, and all run again."""
    return read_state(run_dir / _STATE, dict[str, StageRecord]) or {}


def _write_state(store: RunStore, done: dict[str, Any]) -> None:
    atomic_write_bytes(store.local / _STATE, canonical_json(done))
    store.share(_STATE)
