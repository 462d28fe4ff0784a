"""What is trained, as a value: `plan_training` makes it, `cluster.trainer.run_training` carries it out."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain.config import Config
from raytrain.run_folder.lineage import training_meta
from raytrain.run_folder.scored_rows import check_dev_split
from raytrain.run_folder.workspace import Workspace
from raytrain.tracking.base import MlflowRun
from raytrain.training.checkpoint_meta import CheckpointMeta


@dataclass(frozen=True)
class TrainingPlan:
    """A training of `config` in the run folder at `location`, a path or a URI. Each checkpoint records `meta`; `mlflow`
    is the run that metrics are logged to, if any."""

    config: Config
    location: str
    meta: CheckpointMeta
    mlflow: MlflowRun | None = None


def plan_training(workspace: Workspace, mlflow: MlflowRun | None = None) -> TrainingPlan:
    """The training of a run folder. Raises `ManifestError` if nothing in the dev manifests can be scored."""
    check_dev_split(workspace)
    return TrainingPlan(workspace.config, workspace.store.location, training_meta(workspace), mlflow)
