"""Call a function on lists of items on Ray Data's workers."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from raytrain.cluster.placement import ANYWHERE, Placement, total
from raytrain.errors import RaytrainError
from raytrain.waiting import report_waits

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_workers(
    items: list[Item], function: Callable[[list[Item]], Result], tasks_per_cpu: int, placement: Placement = ANYWHERE
) -> Iterator[Result]:
    """Call `function` on lists of items on Ray Data's workers; yields what it returns, in order.

    There are `tasks_per_cpu` lists per CPU of the nodes of `placement`. A worker's `RaytrainError` is raised here
    unchanged; Ray Data would bury it in its own error. Raises `ConfigError` if no node fits.
    """
    import ray

    def work(batch: dict[str, Any]) -> dict[str, list[bytes]]:
        try:
            result: Result | RaytrainError = function([pickle.loads(item) for item in batch["item"]])
        except RaytrainError as error:
            result = error
        return {"result": [pickle.dumps(result)]}

    tasks = min(len(items), tasks_per_cpu * max(1, int(total(placement.nodes(), "CPU"))))
    data = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=tasks)
    rows = data.map_batches(work, batch_size=None, **placement.remote_options()).iter_rows()
    for row in report_waits(rows, results_of_workers):
        result = pickle.loads(row["result"])  # made by our own workers a moment ago
        if isinstance(result, RaytrainError):
            raise result
        yield result


def results_of_workers() -> str:
    """What a Ray Data job is waiting for, and how many CPUs are free for it."""
    import ray

    free, there = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
    return f"results of Ray's workers ({free:g} of {there:g} CPUs are free)"
