"""Calling a function once on a worker like those of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from raytrain.cluster.placement import Placement
from raytrain.cluster.room import trains_on_gpus
from raytrain.config import Config

_Result = TypeVar("_Result")


def call_on_training_worker(config: Config, function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call `function` with the `arguments` and the keyword `cuda`, which says whether it has a GPU. The driver itself
    may have none, or one that Ray has assigned to other work. The worker process ends after the call."""
    import ray

    cuda = trains_on_gpus(config)
    options = Placement.train(config.cluster).remote_options(gpus=1.0 if cuda else 0.0)
    result: _Result = ray.get(ray.remote(max_calls=1, **options)(function).remote(*arguments, cuda=cuda))
    return result
