"""Failures of the disk and MLflow's database are reported with their reason, and training continues if it can."""

import errno
import logging
import os
import resource
import signal
import sqlite3
from pathlib import Path

import pytest
import torch

from raytrain.config import check_config
from raytrain.errors import StorageError
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json
from raytrain.storage.run_files import MLFLOW_RUN
from raytrain.tracking.mlflow import MlflowTracker, _damage
from raytrain.tracking.runs import RunTracking, tracking_uri
from raytrain.training import checkpoint
from raytrain.training.checkpoint import CheckpointFolder, CheckpointWriter

PARTS = {"model": {"w": torch.ones(1 << 16)}, "optimizer": {"m": torch.zeros(1 << 16)}}


class FullDisk(checkpoint._CheckedFile):
    """A file on a disk with room for some bytes."""

    room = 0

    def write(self, data) -> int:
        FullDisk.room -= memoryview(data).nbytes
        if FullDisk.room < 0:
            self.refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.refused
        return super().write(data)


@pytest.mark.parametrize("room", [0, 1, 300, 5_000, 200_000, 270_000, 400_000, 520_000])
def test_a_full_disk_says_so_and_older_checkpoints_stay(tmp_path, monkeypatch, room):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, PARTS, {})
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(checkpoint, "_CheckedFile", FullDisk)
    with (
        pytest.raises(StorageError, match="no space left on device.*free space") as caught,
        CheckpointWriter(folder) as writer,
    ):
        writer.save(2, PARTS, {}, None, wait=True)
    assert "unexpected pos" not in str(caught.value)
    assert folder.newest().step == 1
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_a_limit_of_the_system_says_so_too(tmp_path):
    kept, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, kept[1]))
    try:
        with pytest.raises(StorageError, match="file too large"):
            CheckpointFolder(tmp_path).save(1, PARTS, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device /dev/full")
def test_a_device_that_is_full_says_so():
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint._save(PARTS["model"], Path("/dev/full"))


def test_what_is_saved_is_loaded(tmp_path):
    saved = CheckpointFolder(tmp_path).save(1, PARTS, {})
    assert torch.equal(saved.load("model")["w"], PARTS["model"]["w"])


@pytest.mark.parametrize("content", [b"garbage " * 1000, b"SQLite format 3\0" + b"\xff" * 5000], ids=["text", "torn"])
def test_a_damaged_database_is_reported_at_once(tmp_path, caplog, content):
    (tmp_path / "mlflow.db").write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="raytrain.tracking"):
        tracker = MlflowTracker.open(f"sqlite:///{tmp_path / 'mlflow.db'}", "e", "r", patience=60.0)
        for step in range(3):
            tracker.log_metrics({"loss": 1.0}, step, 0.0)
        tracker.close()
    text = " ".join(record.getMessage() for record in caplog.records)
    assert "damaged" in text and "move it away" in text and "metrics.jsonl keeps everything" in text
    assert "is unavailable" not in text
    assert tracker.run_id is None and (tmp_path / "mlflow.db").read_bytes() == content


def test_runs_start_over_after_the_database_was_moved_away(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    values = {"name": "a", "run": {"root": str(tmp_path)}, "data": {"train": ["a.jsonl"]}}
    config, ids = check_config(values), []
    uri = tracking_uri(config, config.run_dir)
    lost = {"uri": uri, "run_id": "0" * 32, "stages": {"train": "1" * 32}}
    atomic_write_bytes(config.run_dir / MLFLOW_RUN, canonical_json(lost))
    for _ in range(2):
        with RunTracking(config, config.run_dir) as tracking, tracking.stage("train", resumes=True):
            note = tracking._note()
            ids.append((note.run_id, note.stages["train"]))
    assert ids[0] == ids[1] and not {*ids[0]} & {"0" * 32, "1" * 32}
    assert MlflowClient(tracking_uri=uri).get_run(ids[0][1]).data.tags["mlflow.parentRunId"] == ids[0][0]


def test_a_locked_database_is_not_a_damaged_one():
    locked = sqlite3.OperationalError("database is locked")
    assert _damage(locked) is None and _damage(None) is None
    broken = RuntimeError("wrapped")
    broken.__cause__ = sqlite3.DatabaseError("file is not a database")
    assert str(_damage(broken)) == "file is not a database"
