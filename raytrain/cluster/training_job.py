"""What a Ray Train worker receives: frozen values, from which it builds everything else."""

from __future__ import annotations

from dataclasses import dataclass, replace

from raytrain.cluster.gpus import backend
from raytrain.cluster.ingest import free_cpus
from raytrain.cluster.placement import Placement, total
from raytrain.cluster.room import trains_on_gpus
from raytrain.config import Config
from raytrain.errors import TrainingError
from raytrain.run_folder.training_plan import TrainingPlan
from raytrain.storage.artifacts import file_id
from raytrain.storage.locations import absolute
from raytrain.storage.run_files import BATCH_PROFILE
from raytrain.storage.run_store import RunStore
from raytrain.tracking.base import MlflowRun
from raytrain.training.checkpoint_meta import CheckpointMeta


@dataclass(frozen=True)
class TrainingJob:
    """A training run, for all of its workers.

    `location` is the run folder's path or URI, `meta` what every checkpoint records about its origin, `mlflow` the
    arguments of `MlflowTracker.open` if the run is tracked, `backend` the `torch.distributed` backend, `cpus` the CPUs
    of all training nodes, `num_shares` the shares of each step, and `profile_id` the id of the batch profile.
    """

    config: Config
    location: str
    meta: CheckpointMeta
    mlflow: MlflowRun | None
    cuda: bool
    backend: str
    cpus: int
    num_shares: int
    profile_id: str


def make_job(plan: TrainingPlan, store: RunStore) -> TrainingJob:
    """What the workers of a training get. Raises `TrainingError` if the cluster can't train like this."""
    config = plan.config
    cuda = trains_on_gpus(config)
    cpus = int(total(Placement.train(config.cluster).nodes(), "CPU"))
    if config.data.workers == "ray" and free_cpus(config, config.train.most_workers) < 1:
        raise TrainingError(
            "data.workers is ray, but training leaves no CPU to decode audio",
            got=f"{cpus} CPUs for {config.train.most_workers} training workers",
            allowed="one CPU per worker and at least one more",
            remedy="add CPU nodes, or unset data.workers",
        )
    return TrainingJob(
        config=_with_absolute_paths(config),
        location=store.location,
        meta=plan.meta,
        mlflow=plan.mlflow,
        cuda=cuda,
        backend=backend(config, cuda),
        cpus=cpus,
        num_shares=config.train.most_workers * config.train.accumulate,
        profile_id=file_id(store.local / BATCH_PROFILE),
    )


def _with_absolute_paths(config: Config) -> Config:
    """Workers have different working directories."""
    init_from, storage_path = config.train.init_from, config.train.storage_path
    train = replace(
        config.train,
        init_from=absolute(init_from) if init_from else init_from,
        storage_path=absolute(storage_path) if storage_path else storage_path,
    )
    return config.model_copy(update={"train": train})
