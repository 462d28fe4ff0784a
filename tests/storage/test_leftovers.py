"""Files that a killed command leaves behind are distinguished from a run's files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from raytrain.cli.app import app
from raytrain.storage.artifacts import atomic_write
from raytrain.storage.leftovers import previous, remove_temporaries, temporaries, trainings
from raytrain.storage.ownership import owned

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..")
)


@given(NAMES)
def test_unfinished_files_are_distinguished_from_finished_files(name):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if len(os.fsencode(name)) < 200:
            with atomic_write(root / "deep" / name) as file:
                file.write(b"half")
                assert [leftover.bytes for leftover in temporaries(root, time.time() + 1)] == [0]
            looks_temporary = name.startswith(".")  # raytrain gives no artifact such a name
            assert looks_temporary or list(temporaries(root, time.time() + 1)) == []


RUN = (
    "config.yaml",
    "stages.json",
    "tokenizer/tokenizer.json",
    "tokenizer/de.model",
    "assignment/index.json",
    "assignment/bucket=000/part-0.arrow",
    "checkpoints/step_00000500/meta.json",
    "checkpoints/best.json",
    "metrics.jsonl",
    "mlflow.db",
    "faults/kill-abcdefgh.json",
    "previous/checkpoints/step_00000001/model.pt",
    ".hidden",
    ".nfs00000000012345670000abcd",
    ".report.html.swp",
    "tune/trial-0a1b2c3d/metrics.jsonl",
    "tune/search-abc/train-1/result.json",
    "ray-notes/train-1/x",
)
LEFT = (
    "tokenizer/.de.model.q_x81k2z",
    ".report.html.abcd1234",
    "checkpoints/.writing.aaaaaaaa/model.pt",
    "checkpoints/.fetching.bbbbbbbb/step_00000001/meta.json",
)
TRAININGS = ("ray/train-17640/snapshot.json", "tune/trial-0a1b2c3d/ray/train-17641/snapshot.json")


def fill(folder: Path, names) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345678")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with everything that a run has and everything that may be left over."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "no sessions"))
    monkeypatch.setattr("raytrain.cluster.supervision.ray_folders", lambda: [tmp_path / "sessions"])
    folder = tmp_path / "runs" / "mine"
    fill(folder, (*RUN, *LEFT, *TRAININGS))
    (tmp_path / "outside").mkdir()
    fill(tmp_path / "outside", LEFT)
    (folder / "link").symlink_to(tmp_path / "outside")
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nrun: {{root: {tmp_path}/runs}}\ndata: {{train: [a.jsonl]}}\n")
    time.sleep(0.01)
    return folder


def test_only_unfinished_files_are_removed(run):
    assert len(list(temporaries(run, time.time()))) == len(LEFT)
    assert list(temporaries(run, time.time() - 100)) == []  # the owner writes them now
    remove_temporaries(run, time.time())
    assert files(run) - {"link"} == {*RUN, *TRAININGS}
    assert files(run.parents[1] / "outside") == set(LEFT)


def test_files_of_users_and_other_runs_stay(run):
    kept = (".env.template", "notes/.vimrc.original", *(f"inside/{name}" for name in (*LEFT, *TRAININGS, "owner.json")))
    fill(run, kept)
    os.chmod(run / ".env.template", 0o644)
    os.chmod(run / "notes/.vimrc.original", 0o644)
    time.sleep(0.01)
    assert clean(run, "--yes").exit_code == 0
    assert files(run) - {"link"} == {*RUN, *kept}


def test_trainings_of_the_run_and_its_trials_are_named(run):
    assert {leftover.path for leftover in trainings(str(run))} == {str((run / name).parent) for name in TRAININGS}


def test_trainings_of_a_run_at_a_uri(run, s3):
    from conftest import upload

    location = upload(run, f"{s3}/leftovers/mine")
    leftovers = list(trainings(location))
    assert [(entry.path, entry.bytes) for entry in leftovers] == [(f"{location}/ray/train-17640", 8)]
    leftovers[0].remove()
    assert list(trainings(location)) == []


def clean(run: Path, *arguments: str):
    return CliRunner().invoke(app, ["clean", "-c", str(run.parents[1] / "mine.yaml"), *arguments])


def test_clean_lists_and_removes_only_with_yes(run):
    before = files(run)
    listed = clean(run, "--json")
    assert listed.exit_code == 0 and files(run) == before
    paths = {line["path"] for line in map(orjson.loads, listed.stdout.splitlines())}
    assert len(paths) == len(LEFT) + len(TRAININGS)
    assert "total" in clean(run).stdout
    assert clean(run, "--yes").exit_code == 0
    assert files(run) - {"link"} == set(RUN)
    assert clean(run, "--yes", "--previous").exit_code == 0
    assert not list(previous(run)) and files(run) - {"link"} == {
        name for name in RUN if not name.startswith("previous/")
    }


HOLD = """
import time
from raytrain.storage.ownership import owned
with owned({!r}):
    print("owns", flush=True)
    time.sleep(60)
"""


def test_clean_leaves_a_run_with_an_owner_alone(run):
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(str(run))], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "owns\n"
        before = files(run)
        assert clean(run, "--json").stdout == ""
        refused = clean(run, "--yes")
        assert refused.exit_code == 1 and f"process {process.pid}" in str(refused.exception) and files(run) == before
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with owned(str(run)):  # the next owner cleans up after it
        assert not list(temporaries(run, time.time() + 1))
