"""Where a configuration keeps copies of its checkpoints (`train.storage_path`)."""

from __future__ import annotations

from raytrain.config import Config
from raytrain.storage.locations import absolute
from raytrain.training.mirror import CheckpointMirror


def mirror_of(config: Config) -> CheckpointMirror | None:
    """The copies of the run's checkpoints, or None if the configuration keeps none."""
    path = config.train.storage_path
    return CheckpointMirror(absolute(f"{path.rstrip('/')}/{config.name}/checkpoints")) if path else None
