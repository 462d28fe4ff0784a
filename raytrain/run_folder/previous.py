"""`previous/`: checkpoints and metrics of earlier settings are kept here until newer ones replace them."""

from __future__ import annotations

import shutil

from raytrain.run_folder.lineage import noted_lineage
from raytrain.run_folder.workspace import Workspace
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, make_folder
from raytrain.storage.run_files import LINEAGE_NOTE, METRICS

_MOVED = ("checkpoints", METRICS)


def set_aside_stale(workspace: Workspace, lineage: str) -> bool:
    """Move checkpoints and metrics of another lineage to `previous/`, and record `lineage` for the coming ones; returns
    whether anything was moved."""
    store = workspace.store
    note = store.refresh(LINEAGE_NOTE)
    moved = False
    if store.is_remote:
        moved = noted_lineage(note) != lineage and _set_aside_remote(workspace)
    elif not workspace.path("checkpoints").exists():
        workspace.path(METRICS).unlink(missing_ok=True)
    elif noted_lineage(note) == lineage:
        return False
    else:
        _set_aside_local(workspace)
        moved = True
    atomic_write_bytes(note, canonical_json({"lineage": lineage}))
    store.share(LINEAGE_NOTE)
    return moved


def _set_aside_local(workspace: Workspace) -> None:
    previous = workspace.path("previous")
    if any(workspace.path("checkpoints").glob("step_*")):  # otherwise nothing would replace the older ones
        shutil.rmtree(previous, ignore_errors=True)
    make_folder(previous)
    for name in _MOVED:
        if workspace.path(name).exists() and not (previous / name).exists():
            shutil.move(workspace.path(name), previous / name)
    shutil.rmtree(workspace.path("checkpoints"), ignore_errors=True)


def _set_aside_remote(workspace: Workspace) -> bool:
    store = workspace.store
    if workspace.checkpoints().about("newest") is None:
        store.clear("checkpoints")
        store.discard(METRICS)
        return False
    store.clear("previous")
    store.set_aside(*_MOVED)
    return True
