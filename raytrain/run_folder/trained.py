"""The final checkpoints of training, as recorded in `checkpoints/last.json`, and the model to decode with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from raytrain.config import check_config
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.errors import CheckpointError
from raytrain.model.canary import Canary
from raytrain.run_folder.workspace import Workspace
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, read_state
from raytrain.storage.run_files import TRAINED_NOTE
from raytrain.training.checkpoint import Checkpoint

_TRAIN_AGAIN = "run `raytrain train` with this configuration, then `raytrain evaluate`"


@dataclass(frozen=True)
class TrainedNote:
    """The body of `last.json` about training's final checkpoints: steps, and file ids by name; `files` belong to the
    best checkpoint."""

    lineage: str
    last_step: int
    last_files: dict[str, str]
    best_step: int
    files: dict[str, str]

    @classmethod
    def of(cls, lineage: str, last: Checkpoint, best: Checkpoint) -> TrainedNote:
        """The note for these two checkpoints."""
        return cls(lineage, last.step, last.meta["files"], best.step, best.meta["files"])

    @classmethod
    def read(cls, path: Path) -> TrainedNote:
        """Read a note from a file. Raises `CheckpointError`."""
        note = read_state(path, cls)
        if note is None:
            raise CheckpointError(
                f"{path} can't be read", why="it is not in the format that training writes", remedy=_TRAIN_AGAIN
            )
        return cls(**{field.name: note[field.name] for field in fields(cls)})

    def write(self, path: Path) -> None:
        """Write the note that `read` reads."""
        atomic_write_bytes(path, canonical_json(asdict(self)))


def trained_checkpoint(workspace: Workspace, which: str) -> Checkpoint:
    """The `best` or `last` checkpoint that training recorded when it ended, or the newest if there is no note, as in a
    trial's folder. Raises `CheckpointError` if it is not what training wrote."""
    folder = workspace.checkpoints()
    workspace.store.fetch(TRAINED_NOTE)
    path = workspace.path(TRAINED_NOTE)
    if not path.exists():
        checkpoint = folder.to_decode(which)
        if checkpoint is None:
            raise CheckpointError(f"{folder.folder} has no complete checkpoint", remedy=_TRAIN_AGAIN)
        return checkpoint
    note = TrainedNote.read(path)
    step, files = (note.best_step, note.files) if which == "best" else (note.last_step, note.last_files)
    checkpoint = folder.weights_of(step)
    if checkpoint.meta["files"] != files:
        raise CheckpointError(
            f"{checkpoint.folder} is not the checkpoint that training wrote",
            why=f"its files' ids differ from those in {TRAINED_NOTE}; another process may have written them",
            remedy=_TRAIN_AGAIN,
        )
    return checkpoint


def load_run(config: dict[str, Any], location: str, checkpoint: str) -> tuple[Canary, CanaryTokenizer]:
    """The model of a run's `best` or `last` checkpoint and its tokenizer, for a worker."""
    workspace = Workspace(check_config(config), location)
    model = Canary(workspace.model_config())
    model.load_state_dict(trained_checkpoint(workspace, checkpoint).load_weights())
    return model, workspace.tokenizer
