"""A local Ray ends with its driver, and the sessions of killed drivers are distinguished from others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import wait_for

from raytrain.cluster import supervisor
from raytrain.cluster.supervision import NOTE, dead_sessions
from raytrain.storage.owner import Owner, start_of, write_owner


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
    agent, *servers, _ = children = list(map(int, driver.stdout.readline().split()))
    try:
        if not ends:
            driver.kill()
            driver.wait()
        wait_for(lambda: not _lives(agent), "the agent has ended", 10)
        wait_for(lambda: ends != any(tmp_path.glob("session_*")), "logs stay where something went wrong", 10)
        assert all(map(_lives, servers))
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
