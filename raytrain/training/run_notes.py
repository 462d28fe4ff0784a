"""Notes that training leaves in the run folder, local or remote: for the driver, and for the next attempt.

gave_up.json                  the error with which training gave up: another attempt would fail the same way
batch_profile_lowered.json    the batch sizes that training used instead of the profile's
stop                          a request to training: end soon, as at the last step
faults/                       what the next attempt learns from, see `raytrain.training.faults`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from raytrain.errors import CheckpointError, RaytrainError, TrainingError
from raytrain.storage.artifacts import atomic_write_bytes, read_state
from raytrain.storage.run_files import LOWERED_PROFILE
from raytrain.storage.run_store import RunStore
from raytrain.training.faults import KILLED_FOR_MEMORY, FaultNotes

GAVE_UP = "gave_up.json"
STOP = "stop"
_FAULTS = "faults"


@dataclass(frozen=True)
class GaveUpNote:
    """The parts of the error with which training gave up, see `RaytrainError.to_dict`, and its class."""

    what: str
    got: str | None = None
    allowed: str | None = None
    why: str | None = None
    remedy: str | None = None
    kind: str = TrainingError.__name__

    def error(self) -> TrainingError:
        """The recorded error."""
        kind = CheckpointError if self.kind == CheckpointError.__name__ else TrainingError
        return kind(self.what, got=self.got, allowed=self.allowed, why=self.why, remedy=self.remedy)


def note_giving_up(store: RunStore, error: RaytrainError, kind: type[TrainingError] = TrainingError) -> None:
    """Record an error that another attempt would repeat; the driver raises it as `kind`."""
    _write(store, GAVE_UP, {**error.to_dict(), "kind": kind.__name__})


def noted_error(store: RunStore) -> TrainingError | None:
    """The error with which training gave up, None if it did not."""
    path = store.refresh(GAVE_UP)
    return error_in_note(path) if path.exists() else None


def error_in_note(path: Path) -> TrainingError:
    """The error in a note at `path`, or an error that the note can't be read."""
    note = read_state(path, GaveUpNote)
    if note is None:
        return TrainingError(
            "training gave up",
            why=f"its reason in {path} can't be read",
            remedy="see the messages above, and train again",
        )
    fields = GaveUpNote.__dataclass_fields__
    return GaveUpNote(**{name: value for name, value in note.items() if name in fields}).error()


@dataclass(frozen=True)
class LoweredNote:
    """Batch sizes by bucket that training uses, those of the profile, and why they differ."""

    batch_sizes: Sequence[int]
    instead_of: Sequence[int]
    notes: Sequence[str]


def note_lowered(store: RunStore, note: LoweredNote) -> None:
    """Record that training uses smaller batches than the profile's."""
    _write(store, LOWERED_PROFILE, asdict(note))


def _write(store: RunStore, name: str, body: object) -> None:
    atomic_write_bytes(store.local / name, json.dumps(body, indent=1).encode())
    store.share(name)


# --- notes of faults


def shared_fault_notes(store: RunStore, profile_id: str, rank: int = 0) -> FaultNotes:
    """The fault notes of a run; this rank's writes and removals are replicated to the run's storage."""
    return FaultNotes(
        store.local / _FAULTS,
        profile_id,
        rank,
        on_written=lambda path: store.share(f"{_FAULTS}/{path.name}"),
        on_removed=lambda path: store.discard(f"{_FAULTS}/{path.name}"),
    )


def fetch_fault_notes(store: RunStore) -> None:
    """Fetch the notes of other machines."""
    if store.is_remote:
        store.refresh(f"{_FAULTS}/{KILLED_FOR_MEMORY}")
        store.refresh_all(_FAULTS, "*.json")
