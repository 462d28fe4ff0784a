"""The pipeline in this process: no Ray, and stages that need a model only write down what they depend on."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytrain.cluster import assigning as assign
from raytrain.cluster import counting as statistics
from raytrain.config import Config
from raytrain.console import Console
from raytrain.run_folder.lineage import training_lineage
from raytrain.run_folder.workspace import Workspace
from raytrain.stages import oomptimize, pipeline
from raytrain.stages.context import Context
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, content_id


@contextlib.contextmanager
def pipeline_in_process() -> Iterator[Callable[..., list[str]]]:
    """`run(config)`: the stages that ran."""

    def map_here(items: list[Any], function: Callable, tasks_per_cpu: int, placement: Any) -> Iterator[Any]:
        yield function(items)

    def stand_in(stage: pipeline.Stage) -> pipeline.Stage:
        if stage.name in ("statistics", "buckets", "assign"):
            return stage

        def run(context: Context) -> str:
            # What a training learns follows from its lineage.
            value = training_lineage(context.workspace) if stage.name == "train" else context.key
            for name in stage.outputs:
                atomic_write_bytes(context.path(name), canonical_json([name, value]))
            return "done"

        return replace(stage, run=run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.put", lambda value: value)
        patch.setattr("ray.get", lambda value: value)
        for module in (statistics, assign):
            patch.setattr(module, "map_on_workers", map_here)
        patch.setattr(pipeline, "ray_session", lambda section: contextlib.nullcontext())
        patch.setattr(pipeline, "may_train_on_gpus", lambda config: False)
        patch.setattr(oomptimize, "device_names", lambda config: ["cpu"])
        patch.setattr(pipeline, "STAGES", tuple(map(stand_in, pipeline.STAGES)))
        yield lambda config: pipeline.run_pipeline(config, Console(quiet=True))


def keys_of(config: Config, run_dir: Path) -> dict[str, str]:
    """Each stage's key in a run folder, and as `anew` the lineage; training resumes unless that changes."""
    keys = {
        stage.name: content_id(stage.key(Workspace(config, run_dir)))
        for stage in pipeline.STAGES
        if stage.applies(config)
    }
    return {**keys, "anew": training_lineage(Workspace(config, run_dir))}
