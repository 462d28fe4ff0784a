"""Reservations left by training workers that have ended: placement groups that still hold their CPUs and GPUs.

Ray Train usually frees them, but not if the memory monitor killed the process responsible, nor if a run is aborted
while still waiting for resources; the next job that needs these GPUs would then wait forever.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import time

from raytrain.storage.artifacts import atomic_write_bytes, read_state
from raytrain.storage.run_store import RunStore

_NOTE = "faults/placement-group"
_DEATH_SECONDS = 5.0


def note_reservation(store: RunStore) -> None:
    """Record the placement group of the current workers; called by one of them."""
    import ray

    group = ray.util.get_current_placement_group()
    if group is not None:
        atomic_write_bytes(store.local / _NOTE, json.dumps(group.id.hex()).encode())
        store.share(_NOTE)


def free_noted(store: RunStore) -> None:
    """Free the resources that the last attempt's workers had reserved."""
    import ray

    group = read_state(store.refresh(_NOTE), str)
    with contextlib.suppress(ValueError, ray.exceptions.RayError):
        if group is not None:
            _remove(bytes.fromhex(group))
    store.discard(_NOTE)


def free_orphans(seconds: float = _DEATH_SECONDS) -> None:
    """Free the resources that dead actors of this job had reserved; waits up to `seconds` for the first of them to
    die."""
    until = time.monotonic() + seconds
    while True:
        orphans = _orphans()
        for group in orphans:
            _remove(group)
        if orphans or time.monotonic() > until:
            return
        time.sleep(0.25)


def _orphans() -> list[bytes]:
    """This job's placement groups whose creator, an actor, is dead; Ray's public table does not name creators."""
    import ray
    from ray._private.state import state

    table = importlib.import_module("ray.core.generated.gcs_pb2").PlacementGroupTableData  # generated, without types
    job = ray.get_runtime_context().get_job_id()
    groups = map(table.FromString, state._connect_and_get_accessor().get_placement_group_table())
    return [
        group.placement_group_id
        for group in groups
        if group.creator_actor_dead  # also true of the driver's groups, which have no creator
        and any(byte != 0xFF for byte in group.creator_actor_id)
        and group.creator_job_id.hex() == job
        and group.state != table.REMOVED
    ]


def _remove(group_id: bytes) -> None:
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID(group_id)))
