"""Notes that training leaves in the run folder are read back unchanged, here and on another filesystem."""

import json
import uuid

import pytest

from raytrain.errors import CheckpointError, DataError, TrainingError
from raytrain.storage.run_files import LOWERED_PROFILE
from raytrain.storage.run_store import RunStore
from raytrain.training.faults import KILLED_FOR_MEMORY
from raytrain.training.run_notes import (
    GAVE_UP,
    LoweredNote,
    fetch_fault_notes,
    note_giving_up,
    note_lowered,
    noted_error,
    shared_fault_notes,
)


@pytest.fixture(params=["path", "URI"])
def store(request, tmp_path, monkeypatch) -> RunStore:
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "cache"))
    store = RunStore(tmp_path / "run" if request.param == "path" else f"memory://runs/{uuid.uuid4()}")
    store.local.mkdir(parents=True)
    return store


@pytest.mark.parametrize("kind", [TrainingError, CheckpointError])
def test_the_error_that_training_gave_up_with_is_raised_by_the_driver(store, kind):
    assert noted_error(store) is None
    error = DataError("rows are damaged", got=3, allowed=0, why="a disk", remedy="run assign again")
    note_giving_up(store, error, kind)
    noted = noted_error(RunStore(store.location))
    assert type(noted) is kind and str(noted) == str(error)


def test_lowered_batches_are_listed_next_to_those_of_the_profile(store):
    note_lowered(store, LoweredNote((9, 4), (10, 4), ["bucket 0 takes 9"]))
    assert json.loads(store.refresh(LOWERED_PROFILE).read_bytes()) == {
        "batch_sizes": [9, 4],
        "instead_of": [10, 4],
        "notes": ["bucket 0 takes 9"],
    }
    store.discard(GAVE_UP)  # a missing note is not an error


def test_fault_notes_of_one_machine_are_read_on_another(store, tmp_path, monkeypatch):
    shared_fault_notes(store, "p", rank=1).lower(2, 100, "memory")
    shared_fault_notes(store, "p").note_kill_for_memory()
    if store.is_remote:
        monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "another"))
    there = RunStore(store.location)
    notes = shared_fault_notes(there, "p")
    fetch_fault_notes(there)
    assert notes.lowered((100, 100, 100)) == (100, 100, 95)
    assert (there.local / "faults" / KILLED_FOR_MEMORY).exists()
