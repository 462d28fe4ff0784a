"""Artifacts: equal bytes for equal content, complete or absent files, and readable errors."""

import os
import pickle
import resource
import signal

import pytest

from raytrain.errors import ArtifactError, PlanError, RaytrainError, StorageError
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, make_folder, read_json, write_json


def test_round_trip_and_equal_bytes(tmp_path):
    first = write_json(tmp_path / "a.json", "x/1", {"b": 1, "a": [1.5, None]}, {"p": "q"})
    second = write_json(tmp_path / "b.json", "x/1", {"a": [1.5, None], "b": 1}, {"p": "q"})
    assert first == second
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json", "x/1")["body"] == {"b": 1, "a": [1.5, None]}


def test_reading_names_what_is_wrong(tmp_path):
    with pytest.raises(ArtifactError, match="missing"):
        read_json(tmp_path / "none.json", "x/1")
    write_json(tmp_path / "a.json", "x/1", {"n": 1})
    with pytest.raises(ArtifactError, match=r"got x/1; allowed: y/1"):
        read_json(tmp_path / "a.json", "y/1")
    (tmp_path / "a.json").write_bytes((tmp_path / "a.json").read_bytes().replace(b'"n": 1', b'"n": 2'))
    with pytest.raises(ArtifactError, match="changed after"):
        read_json(tmp_path / "a.json", "x/1")
    (tmp_path / "a.json").write_bytes(b"{")
    with pytest.raises(ArtifactError, match="can't be read"):
        read_json(tmp_path / "a.json", "x/1")


def test_nan_is_refused():
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_a_full_disk_keeps_the_old_file_and_leaves_no_scraps(tmp_path):
    path = tmp_path / "a.bin"
    atomic_write_bytes(path, b"old")
    # A file-size limit makes the kernel refuse the write, like a full disk.
    old_limit, old_handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old_limit[1]))
    try:
        with pytest.raises(StorageError, match="can't write .*a.bin; because file too large; to do: free space"):
            atomic_write_bytes(path, b"n" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not a directory"):
        make_folder(tmp_path / "file" / "run")


def test_errors_survive_pickle():
    error = PlanError("bad", got=3, allowed="1, 2", why="of x", remedy="fix")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is PlanError and str(copy) == str(error)
    assert isinstance(copy, RaytrainError)
