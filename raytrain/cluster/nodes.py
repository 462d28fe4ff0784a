"""Run a small function on every node of a cluster, whatever else they do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from raytrain.errors import last_line


def ask_nodes(
    function: Callable[[Any], Any], arguments: Mapping[str, Any], seconds: float
) -> Iterator[tuple[str, Any, float]]:
    """Call `function` with its argument once on each node of `arguments` (node id → argument), in a process that ends
    afterwards, and takes neither CPUs nor GPUs.

    Yields node, answer, and when it came (`time.time()`), in the order of answers; the answer is a text that says what
    went wrong where the function raised, the node went away, or `seconds` were over.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pending = {}
    for node_id, argument in arguments.items():
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        # A process that looked at GPUs must not serve a task that Ray gives some of them.
        task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(function).options(scheduling_strategy=strategy)
        pending[task.remote(argument)] = node_id
    deadline = time.monotonic() + seconds
    while pending and (left := deadline - time.monotonic()) > 0:
        ready, _ = ray.wait(list(pending), timeout=left)
        received = time.time()
        for reference in ready:
            node_id = pending.pop(reference)
            try:
                yield node_id, ray.get(reference), received
            except Exception as error:
                yield node_id, last_line(error), received
    for reference, node_id in pending.items():
        with contextlib.suppress(Exception):
            ray.cancel(reference, force=True)
        yield node_id, f"no answer within {seconds:.0f} s", time.time()
