"""What a killed command leaves behind is told from what is a run's, and a local Ray ends with its driver."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import orjson
import psutil
import pytest
from conftest import wait_for
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from raytrain.cli.app import app
from raytrain.cluster import supervisor
from raytrain.cluster.supervision import NOTE, dead_sessions
from raytrain.storage.artifacts import atomic_write
from raytrain.storage.leftovers import previous, remove_temporaries, temporaries, trainings
from raytrain.storage.owner import Owner, start_of, write_owner
from raytrain.storage.ownership import owned

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..")
)


@given(NAMES)
def test_every_unfinished_file_is_told_from_finished_ones(name):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if len(os.fsencode(name)) < 200:
            with atomic_write(root / "deep" / name) as file:
                file.write(b"half")
                assert [leftover.bytes for leftover in temporaries(root, time.time() + 1)] == [0]
            is_like_one = name.startswith(".")  # raytrain gives no artefact such a name
            assert is_like_one or list(temporaries(root, time.time() + 1)) == []


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
    """A run folder with all that a run has and all that may be left over."""
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


def test_only_what_was_never_finished_goes(run):
    assert len(list(temporaries(run, time.time()))) == len(LEFT)
    assert list(temporaries(run, time.time() - 100)) == []  # the owner writes them now
    remove_temporaries(run, time.time())
    assert files(run) - {"link"} == {*RUN, *TRAININGS}
    assert files(run.parents[1] / "outside") == set(LEFT)


def test_what_is_a_users_or_another_runs_stays(run):
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
    found = list(trainings(location))
    assert [(one.path, one.bytes) for one in found] == [(f"{location}/ray/train-17640", 8)]
    found[0].remove()
    assert list(trainings(location)) == []


def clean(run: Path, *arguments: str):
    return CliRunner().invoke(app, ["clean", "-c", str(run.parents[1] / "mine.yaml"), *arguments])


def test_clean_lists_and_removes_only_when_told(run):
    before = files(run)
    listed = clean(run, "--json")
    assert listed.exit_code == 0 and files(run) == before
    paths = {line["path"] for line in map(orjson.loads, listed.stdout.splitlines())}
    assert len(paths) == len(LEFT) + len(TRAININGS)
    assert "total" in clean(run).stdout
    assert clean(run, "--yes").exit_code == 0
    assert files(run) - {"link"} == set(RUN)
    assert clean(run, "--yes", "--previous").exit_code == 0
    assert not list(previous(run)) and files(run) - {"link"} == {one for one in RUN if not one.startswith("previous/")}


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
    with owned(str(run)):  # whoever comes next clears up after it
        assert not list(temporaries(run, time.time() + 1))


# --- Ray


def test_sessions_of_the_living_and_of_others_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("raytrain.cluster.supervision.ray_folders", lambda: [tmp_path])
    dead = replace(Owner.here(), pid=os.getppid(), start="1")
    living = replace(dead, start=start_of(os.getppid()))
    notes = {
        "session_dead": dead,
        "session_living": living,
        "session_own": Owner.here(),
        "session_not_ours": None,
        "session_elsewhere": replace(dead, host="elsewhere"),
        "session_in_use": dead,
        "session_before_boot": replace(dead, machine="another pid:[1]"),
    }
    for name, owner in notes.items():
        (tmp_path / name / "logs").mkdir(parents=True)
        if owner is not None:
            (tmp_path / name / NOTE).write_bytes(write_owner(owner))
    (tmp_path / "session_latest").symlink_to(tmp_path / "session_dead")
    with open(tmp_path / "session_in_use" / "logs" / "raylet.out", "w") as log:
        agent = subprocess.Popen(["sleep", "60"], stdout=log)
    try:
        assert {Path(one.path).name for one in dead_sessions()} == {"session_dead", "session_before_boot"}
    finally:
        agent.kill()
        agent.wait()


DRIVER = """
import os, subprocess, sys, time
from pathlib import Path
from raytrain.cluster.supervision import supervised
tells, ends = {tells}, {ends}
session = Path({root!r}) / f"session_2026-01-01_00-00-00_000000_{{os.getpid()}}"
(session / "logs").mkdir(parents=True)
def child(path, mode):
    with open(path, mode) as file:
        return subprocess.Popen(["sleep", "60"], stdout=file, start_new_session=True).pid
(session / "logs" / "raylet.err").touch()
with supervised(True) as tell:
    time.sleep(0.2)
    if tells:
        tell(str(session))
    pids = [
        child(session / "logs" / "agent.out", "w"), child(session / "logs" / "python-core-driver-1.log", "w"),
        child(session / "logs" / "raylet.err", "r"), child({root!r} + "/agent.out", "w"),
    ]
    print(*pids, os.getpid(), flush=True)
    if not ends:
        time.sleep(60)
if ends:
    time.sleep(60)
"""


@pytest.mark.parametrize(("tells", "ends"), [(True, False), (False, False), (True, True)])
def test_processes_of_a_session_end_with_it_and_no_others(tells, ends, tmp_path, monkeypatch):
    """Killed, killed while Ray starts, or shut down."""
    code = textwrap.dedent(DRIVER).format(root=str(tmp_path), tells=tells, ends=ends)
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    agent, *others, _ = children = list(map(int, driver.stdout.readline().split()))
    try:
        if not ends:
            driver.kill()
            driver.wait()
        wait_for(lambda: not _lives(agent), "the agent has ended", 10)
        wait_for(lambda: ends != any(tmp_path.glob("session_*")), "logs stay where something went wrong", 10)
        assert all(map(_lives, others))
    finally:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        driver.wait()
        driver.stdout.close()


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


RAY_DRIVER = """
import os, time
from raytrain.cluster.session import ray_session
from raytrain.config import ClusterSection
with ray_session(ClusterSection(num_cpus=1)):
    import ray
    worker = ray.remote(num_cpus=1)(lambda: time.sleep(600)).remote()
    started = ray.remote(num_cpus=0)(lambda: 0)
    ray.get(started.remote())
    print(ray._private.worker.global_worker.node.get_session_dir_path(), flush=True)
    time.sleep(600)
"""


def test_local_ray_ends_with_a_driver_that_is_killed():
    driver = subprocess.Popen([sys.executable, "-c", RAY_DRIVER], stdout=subprocess.PIPE, text=True)
    try:
        session = driver.stdout.readline().strip()
        family = psutil.Process(driver.pid).children(recursive=True)
        names = {process.name() for process in family}
        assert {"raylet", "gcs_server"} <= names and any("Agent" in name for name in names)
        assert len({process for process, _ in supervisor.written(session)}) > 4
        driver.kill()
        wait_for(lambda: not any(_lives(process.pid) for process in family), "all have ended", 10)
        assert session in {leftover.path for leftover in dead_sessions()}
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
    for leftover in dead_sessions():
        if leftover.path == session:
            leftover.remove()
    assert not Path(session).exists()
