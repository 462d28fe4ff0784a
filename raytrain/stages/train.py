"""Stage `train`: plan the training from the artifacts, run it on the cluster, and record its final checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from raytrain.cluster.trainer import run_training
from raytrain.config import Config
from raytrain.errors import TrainingError
from raytrain.run_folder.checkpoint_mirror import mirror_of
from raytrain.run_folder.lineage import training_key, training_lineage
from raytrain.run_folder.previous import set_aside_stale
from raytrain.run_folder.quarantine import gather_quarantine, num_quarantined
from raytrain.run_folder.trained import TrainedNote
from raytrain.run_folder.training_plan import plan_training
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.context import Context
from raytrain.storage.artifacts import make_folder
from raytrain.storage.run_files import LOWERED_PROFILE, METRICS, QUARANTINE, TRAINED_NOTE
from raytrain.training.checkpoint import Checkpoint, CheckpointFolder
from raytrain.training.data_wait import DataPath, DataWaitMonitor

_SHOWN_METRICS = ("loss", "wer", "bleu")


def key(workspace: Workspace) -> object:
    """What the stage depends on, as JSON values."""
    return training_key(workspace)


def resumes(workspace: Workspace) -> bool:
    """Whether there is a checkpoint with these settings to resume from."""
    newest = workspace.checkpoints().about("newest")
    return newest is not None and newest.lineage == training_lineage(workspace)


def run(context: Context) -> str:
    """Write checkpoints, and `checkpoints/last.json` that names the last and the best."""
    workspace = context.workspace
    lineage = training_lineage(workspace)
    if set_aside_stale(workspace, lineage):
        context.console.say("  settings changed: training starts from scratch, the old checkpoints are in previous/")
    step = _resumed_step(context, lineage)
    plan = plan_training(workspace, context.tracking.training_run())
    with _training_progress(context, step) as on_metrics:
        run_training(plan, on_metrics, context.console.say)
    _gather(context)
    last, best = _checkpoints_of(workspace.checkpoints(), lineage)
    TrainedNote.of(lineage, last, best).write(context.path(TRAINED_NOTE))
    return f"{last.step} steps, {last.meta.get('seconds', 0.0) / 60:.1f} min; best checkpoint at step {best.step}"


def _resumed_step(context: Context, lineage: str) -> int:
    """The step that training resumes from, 0 if it starts. Raises `CheckpointError` if that checkpoint is of another
    lineage."""
    newest = _newest_checkpoint(context, lineage)
    if newest is None:
        return 0
    newest.check_lineage(lineage)
    context.console.say(f"  training resumes from step {newest.step}")
    return newest.step


def _newest_checkpoint(context: Context, lineage: str) -> Checkpoint | None:
    """The run's newest checkpoint, fetched from the mirror where the run folder has none."""
    folder = context.workspace.checkpoints()
    newest, mirror = folder.about("newest"), mirror_of(context.config)
    if newest is None and mirror is not None:
        newest = mirror.fetch_newest(make_folder(folder.folder), lineage)
        if newest is not None:
            context.console.say(f"  found the checkpoint of step {newest.step} in {mirror.path}")
    return newest


def _gather(context: Context) -> None:
    """Fetch what the workers wrote besides checkpoints."""
    lowered, store = context.path(LOWERED_PROFILE), context.workspace.store
    if lowered.exists():
        context.tracker.log_artifact(lowered)
    store.refresh(METRICS)
    gather_quarantine(store)
    if broken := num_quarantined(context.path(QUARANTINE)):
        context.console.warn(
            f"{broken} recording(s) can't be read (quarantine.jsonl names them); training replaces them with others"
        )


def _checkpoints_of(folder: CheckpointFolder, lineage: str) -> tuple[Checkpoint, Checkpoint]:
    """The last and the best checkpoint of a finished training."""
    last = folder.about("newest")
    if last is None:
        raise TrainingError("training ended without a checkpoint", remedy="see the messages above")
    best = folder.about("best") or last
    for checkpoint in (last, best):
        checkpoint.check_lineage(lineage)
    return last, best


@contextlib.contextmanager
def _training_progress(context: Context, step: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A progress bar that starts at `step`; yields the function that receives lines of metrics."""
    total, monitor = context.config.train.max_steps, DataWaitMonitor(_data_path(context.config))
    with context.console.progress("training", total) as update:
        update(completed=step)
        shown: dict[str, float] = {}

        def on_metrics(line: Mapping[str, float]) -> None:
            shown.update({name: line[name] for name in _SHOWN_METRICS if name in line})
            text = "training  " + "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
            update(completed=line["step"], text=text)
            # When a run resumes, its earlier lines come first.
            if line["step"] > step and (warning := monitor.check(line)) is not None:
                context.console.warn(warning)

        yield on_metrics


def _data_path(config: Config) -> DataPath:
    return DataPath(
        config.train.num_loader_threads, config.data.workers, config.assign.materialize, config.data.stream is not None
    )
