"""A function called once on a worker of the kind that training has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from raytrain.cluster.placement import Placement
from raytrain.cluster.room import trains_on_gpus
from raytrain.config import Config

_Result = TypeVar("_Result")


def call_on_training_worker(config: Config, function: Callable[..., _Result], *arguments: Any) -> _Result:
    """What `function` returns for the `arguments` and the keyword `cuda`, which says whether it has a GPU: the driver
    may have none, or one that Ray has assigned to others. Its process ends with it."""
    import ray

    cuda = trains_on_gpus(config)
    options = Placement.train(config.cluster).remote_options(gpus=1.0 if cuda else 0.0)
    result: _Result = ray.get(ray.remote(max_calls=1, **options)(function).remote(*arguments, cuda=cuda))
    return result
