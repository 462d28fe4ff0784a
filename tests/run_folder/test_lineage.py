"""A checkpoint is of the training that loads it, and what is evaluated is what training wrote."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from raytrain.cluster.ranks import agree_on_checkpoint
from raytrain.cluster.trainer import run_training
from raytrain.errors import CheckpointError
from raytrain.run_folder.trained import trained_checkpoint
from raytrain.run_folder.training_plan import TrainingPlan
from raytrain.storage.artifacts import canonical_json
from raytrain.storage.run_store import RunStore
from raytrain.training.checkpoint import CheckpointFolder
from raytrain.training.limits import GaveUp


def save(folder: CheckpointFolder, step: int, lineage: str, value: float = 0.0):
    return folder.save(step, {"model": {"w": torch.tensor(value)}}, {"ids": {"lineage": lineage}})


@pytest.mark.parametrize("rank", [0, 1])
def test_checkpoint_of_another_lineage_is_refused_by_all_ranks(rank, tmp_path, monkeypatch):
    values = []

    def broadcast(value):
        values.append(value)
        return values[0]

    monkeypatch.setattr("ray.train.collective.broadcast_from_rank_zero", broadcast)
    folder = CheckpointFolder(tmp_path, keep=9)
    save(folder, 3, "mine")
    assert agree_on_checkpoint(folder, 0, {"ids": {"lineage": "mine"}}).step == 3
    assert agree_on_checkpoint(folder, 1, {"ids": {"lineage": "mine"}}).step == 3
    values.clear()
    save(folder, 5, "theirs")
    with pytest.raises(GaveUp, match=r"step_00000005.*got lineage theirs; allowed: lineage mine"):
        agree_on_checkpoint(folder, 0, {"ids": {"lineage": "mine"}})
    with pytest.raises(GaveUp, match="lineage theirs"):
        agree_on_checkpoint(folder, rank, {"ids": {"lineage": "mine"}})


def test_without_a_checkpoint_training_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("ray.train.collective.broadcast_from_rank_zero", lambda value: value)
    assert agree_on_checkpoint(CheckpointFolder(tmp_path), 0, {"ids": {"lineage": "mine"}}) is None


@pytest.fixture
def run(tmp_path):
    """A run folder after training: the last checkpoint is that of step 4, the best that of step 2."""
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=9)
    best, last = save(folder, 2, "mine", 2.0), save(folder, 4, "mine", 4.0)
    folder.mark_best(2, 0.1)
    note = {
        "lineage": "mine",
        "last_step": 4,
        "last_files": last.meta["files"],
        "best_step": 2,
        "files": best.meta["files"],
    }
    (folder.folder / "last.json").write_bytes(canonical_json(note))
    store = RunStore(tmp_path)
    return SimpleNamespace(checkpoints=lambda: folder, store=store, path=lambda name: tmp_path / name)


def test_what_training_wrote_is_evaluated(run):
    folder = run.checkpoints()
    save(folder, 6, "theirs", 6.0)
    folder.mark_best(6, 0.0)
    assert trained_checkpoint(run, "best").load_weights() == {"w": torch.tensor(2.0)}
    assert trained_checkpoint(run, "last").load_weights() == {"w": torch.tensor(4.0)}


@pytest.mark.parametrize("which", ["best", "last"])
def test_checkpoint_that_was_written_over_is_refused(run, which):
    for step in (2, 4):
        save(run.checkpoints(), step, "mine", 7.0)
    with pytest.raises(CheckpointError, match="is not the checkpoint that training wrote.*to do"):
        trained_checkpoint(run, which)


@pytest.mark.parametrize("damaged", [b"7", b"[]", b"{}", b"\xff", b'"best_step"'])
def test_damaged_note_is_a_readable_error(run, damaged):
    run.path("checkpoints/last.json").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"last.json can't be read.*to do"):
        trained_checkpoint(run, "best")


def test_trial_without_a_note_is_as_its_checkpoints_say(run):
    run.path("checkpoints/last.json").unlink()
    assert trained_checkpoint(run, "best").step == 2 and trained_checkpoint(run, "last").step == 4


def test_worker_refuses_and_training_is_not_tried_again(copy_of):
    """The checkpoint was put there after the driver had checked."""
    config = copy_of("refused", train={"num_workers": 1, "max_failures": 3})
    folder = CheckpointFolder(config.run_dir / "checkpoints")
    folder.save(3, {"model": {}, "optimizer": {}}, {"ids": {"lineage": "theirs"}})
    lines: list[str] = []
    with pytest.raises(CheckpointError, match=r"got lineage theirs; allowed: lineage mine.*to do"):
        plan = TrainingPlan(config, str(config.run_dir), {"ids": {"lineage": "mine"}})
        run_training(plan, lambda line: None, lines.append)
    assert lines == [] and json.loads((folder.folder / "step_00000003" / "meta.json").read_bytes())["step"] == 3
    assert not (config.run_dir / "metrics.jsonl").exists()
