"""A run folder has one owner at a time, no matter which process is killed and where it ran."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from raytrain.errors import OwnedError
from raytrain.storage import ownership
from raytrain.storage.leftovers import OWNER_FILE
from raytrain.storage.locations import StorageReadError
from raytrain.storage.owner import Owner, read_owner, read_record, write_owner
from raytrain.storage.ownership import describe_owner, owned


def write_record(folder: Path, owner: Owner, age: float = 0.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / OWNER_FILE
    path.write_bytes(write_owner(owner))
    os.utime(path, (time.time() - age,) * 2)


def elsewhere() -> Owner:
    return replace(Owner.here(), host="elsewhere", pid=1)


HOLD = """
import sys, time
from raytrain.storage.ownership import owned
from raytrain.storage.filesystem import StorageReadError
from raytrain.errors import OwnedError
try:
    with owned({folder!r}, take_over={take_over}):
        print("owns", flush=True)
        time.sleep({seconds})
except OwnedError as error:
    print(f"error: {{error}}", flush=True)
    sys.exit(3)
"""


@contextlib.contextmanager
def holder(folder: Path, seconds: float = 60, take_over: bool = False):
    code = textwrap.dedent(HOLD).format(folder=str(folder), seconds=seconds, take_over=take_over)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def short(monkeypatch):
    """Leases of a second."""
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(ownership, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(ownership, "STOP_SECONDS", 0.3)
    monkeypatch.setattr(ownership, "_CHECK_SECONDS", 0.1)
    monkeypatch.setattr(ownership, "_SETTLE_SECONDS", 0.05)


def test_owner_is_named_and_gone_afterwards(tmp_path):
    with owned(str(tmp_path / "run")):
        assert str(os.getpid()) in str(read_record(str(tmp_path / "run")))
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(ZeroDivisionError), owned(str(tmp_path / "run")):
        raise ZeroDivisionError
    assert describe_owner(str(tmp_path / "run")) is None


def test_ownership_nests_in_one_process_also_below_the_folder(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "run")
    with owned(str(tmp_path / "run")):
        with owned(str(link)), owned(str(tmp_path / "run" / "ablate" / "A")):
            pass
        assert read_record(str(tmp_path / "run")) is not None
        assert read_record(str(tmp_path / "run" / "ablate" / "A")) is None
        with owned(str(tmp_path / "run-2")):
            assert read_record(str(tmp_path / "run-2")) is not None


def test_live_owner_is_named_and_its_death_frees_the_folder(tmp_path):
    with holder(tmp_path) as first:
        assert first.stdout.readline() == "owns\n"
        with (
            pytest.raises(OwnedError, match=rf"process {first.pid} on .*-c.* since .*--take-over"),
            owned(str(tmp_path)),
        ):
            pass
        assert describe_owner(str(tmp_path))[1]
        first.kill()
        # Not waited for: a dead process that has not been reaped is still dead.
        lines: list[str] = []
        (tmp_path / "tokenizer").mkdir()
        for name in (".report.html.abcd1234", "tokenizer/.de.model.q_x81k2z"):
            (tmp_path / name).write_bytes(b"half")
        time.sleep(0.2)
        assert not describe_owner(str(tmp_path))[1]
        with owned(str(tmp_path), lines.append):
            assert "gone" in lines[0]
            assert sorted(path.name for path in tmp_path.rglob("*")) == [OWNER_FILE, "tokenizer"]


def test_reused_process_id_is_not_the_owner(tmp_path):
    write_record(tmp_path, replace(Owner.here(), pid=os.getppid(), start="1"))
    with owned(str(tmp_path)):
        pass


def test_displaced_owner_stops(tmp_path):
    with holder(tmp_path) as first:
        assert first.stdout.readline() == "owns\n"
        with owned(str(tmp_path), take_over=True):
            assert first.wait(10) == 3
            assert f"taken over while this command wrote to it; it has stopped; got process {os.getpid()}" in (
                first.stdout.read()
            )
        assert read_record(str(tmp_path)) is None


def test_displaced_owner_stops_even_if_the_new_owner_has_ended(tmp_path):
    with holder(tmp_path) as first:
        assert first.stdout.readline() == "owns\n"
        (tmp_path / OWNER_FILE).unlink()
        assert first.wait(10) == 3


@pytest.mark.parametrize("location", ["disk", "s3"])
def test_lease_of_an_owner_elsewhere(location, tmp_path, short, request):
    """A renewed lease is respected; one that has expired by the storage's clock is taken at once; else it is waited
    for."""
    lines: list[str] = []
    if location == "s3":
        run = request.getfixturevalue("s3") + "/owner/run"
        ownership.LEASE_SECONDS = 3.0  # clocks of object stores have whole seconds
        put = lambda: ownership.write_bytes(f"{run}/{OWNER_FILE}", record)  # noqa: E731
    else:
        run = str(tmp_path)
        put = lambda: (tmp_path / OWNER_FILE).write_bytes(record)  # noqa: E731
    owner = elsewhere()
    record = write_owner(owner)
    put()
    began = time.monotonic()
    with owned(run, lines.append):
        assert time.monotonic() - began > ownership.LEASE_SECONDS - 1.2
    assert "waiting for the lease of process 1 on elsewhere" in lines[0] and "gone" in lines[1]
    put()
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.3):
            put()

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(OwnedError, match="elsewhere"), owned(run):
            pass
    finally:
        ended.set()
        thread.join()
    with owned(run, take_over=True):
        assert read_record(run).owner.pid == os.getpid()
    assert read_record(run) is None


def test_expired_record_has_no_owner(tmp_path, short):
    write_record(tmp_path, elsewhere(), age=1000)
    began = time.monotonic()
    with owned(str(tmp_path)):
        assert time.monotonic() - began < 0.5


def test_owner_renews_its_record(tmp_path, short):
    with owned(str(tmp_path)):
        before = read_record(str(tmp_path))
        time.sleep(0.6)
        after = read_record(str(tmp_path))
        assert before.owner == after.owner and before.stamp != after.stamp


@pytest.mark.parametrize("damaged", [b"", b"7", b"{}", b'{"pid": "x"}', b"\xff\xfe{", b"[" * 5000])
def test_damaged_record_counts_as_an_owner_to_wait_for(damaged, tmp_path, short):
    (tmp_path / OWNER_FILE).write_bytes(damaged)
    assert read_owner(damaged) is None
    with owned(str(tmp_path)):
        assert read_record(str(tmp_path)).owner.pid == os.getpid()


def test_of_many_concurrent_processes_one_owns(tmp_path):
    with contextlib.ExitStack() as stack:
        write_record(tmp_path, replace(Owner.here(), pid=os.getppid(), start="1"))  # whose end is visible to all
        all_of_them = [stack.enter_context(holder(tmp_path, 3)) for _ in range(4)]
        lines = [process.stdout.readline() for process in all_of_them]
    assert sorted(line[:5] for line in lines) == ["error", "error", "error", "owns\n"]


def test_full_disk_leaves_no_record(tmp_path, monkeypatch):
    from raytrain.errors import StorageError

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            raise OSError(28, "No space left on device")

    def full(path, mode):
        Path(path).touch()
        return Full()

    monkeypatch.setattr(ownership, "open", full, raising=False)
    with pytest.raises(StorageError, match="no space left"), owned(str(tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []


# --- commands

READING = {"config", "schedule", "ui", "status", "logs", "stop", "doctor", "clean"}  # `clean` skips owned folders


def test_every_command_that_writes_to_a_run_folder_can_take_it_over():
    from typer.main import get_command

    from raytrain.cli.app import app

    commands = get_command(app).commands
    with_config = {name for name, command in commands.items() if any(p.name == "config" for p in command.params)}
    taking_over = {name for name, command in commands.items() if any(p.name == "take_over" for p in command.params)}
    assert taking_over == (with_config - READING) | {"demo"}


@pytest.fixture
def config(tmp_path):
    from raytrain.config import check_config

    values = {
        "name": "mine",
        "run": {"root": str(tmp_path)},
        "data": {"train": ["a.jsonl"], "dev": ["a.jsonl"]},
        "ablate": {"device_memory": "1GiB"},
    }
    return check_config(values)


def test_commands_leave_the_folder_of_a_live_owner_alone(config):
    from raytrain.console import Console
    from raytrain.experiments.ablate import PredictOptions, predict_ablation, run_ablation
    from raytrain.experiments.depths import run_depths
    from raytrain.experiments.tune import run_tune
    from raytrain.run_folder.trial_folder import SHARED
    from raytrain.stages.pipeline import STAGE_NAMES, run_pipeline

    console = Console(quiet=True)
    commands = [
        *(lambda name=name: run_pipeline(config, console, (name,)) for name in STAGE_NAMES),
        lambda: run_tune(config, console),
        lambda: run_ablation(config, console),
        lambda: predict_ablation(config, console, {}, PredictOptions()),
        lambda: run_depths(config, console, [1], [], train=True),
        lambda: run_depths(config, console, [1], [], train=False),
    ]
    config.run_dir.mkdir()
    for name in SHARED:
        (config.run_dir / name).touch()
    with holder(config.run_dir) as owner:
        assert owner.stdout.readline() == "owns\n"
        before = sorted(config.run_dir.rglob("*"))
        for command in commands:
            with pytest.raises(OwnedError, match=f"process {owner.pid} "):
                command()
        assert sorted(config.run_dir.rglob("*")) == before


def test_status_and_doctor_show_the_owner(config):
    from raytrain.operations.checks import OK, WARN, check_owner

    def check():
        return check_owner(config.run_location, describe_owner(config.run_location))[0]

    assert check().status == OK
    with holder(config.run_dir) as owner:
        assert owner.stdout.readline() == "owns\n"
        assert check().status == WARN and f"process {owner.pid}" in check().seen and "--take-over" in check().remedy
    assert check().status == OK and "gone" in check().seen


def test_take_over_is_passed_on_with_a_job():
    from raytrain.operations.submission import entrypoint

    assert entrypoint(["train"], "python", take_over=True).endswith("--config config.yaml --take-over train")


def test_status_shows_the_owner_also_without_jobs(config, tmp_path, monkeypatch):
    from conftest import free_port
    from typer.testing import CliRunner

    from raytrain.cli.app import app

    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    nowhere = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr("raytrain.cluster.jobs.DEFAULT_ADDRESS", nowhere)
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nrun: {{root: {tmp_path}}}\ndata: {{train: [a.jsonl]}}\n")
    with owned(config.run_location):
        result = CliRunner().invoke(app, ["status", "--config", str(path)])
        assert result.exit_code == 0 and f"process {os.getpid()}" in result.output
        assert CliRunner().invoke(app, ["status", "--address", nowhere]).exit_code == 1


def test_only_a_file_is_a_record(tmp_path):
    kinds = {
        "folder": lambda path: path.mkdir(),
        "nowhere": lambda path: path.symlink_to("nowhere"),
        "device": lambda path: path.symlink_to("/dev/zero"),
        "pipe": os.mkfifo,
    }
    for name, make in kinds.items():
        folder = tmp_path / name
        folder.mkdir()
        make(folder / OWNER_FILE)
        for take_over in (False, True):
            with (
                pytest.raises(StorageReadError, match=f"{OWNER_FILE} is not a file.*remove it"),
                owned(str(folder), take_over=take_over),
            ):
                pass
        assert [path.name for path in folder.iterdir()] == [OWNER_FILE] and os.path.lexists(folder / OWNER_FILE)


def test_a_record_that_no_process_wrote_names_nobody():
    owner = Owner.here()
    assert read_owner(write_owner(owner)) == owner
    assert read_owner(write_owner(replace(owner, pid=-1))) is None
    late = write_owner(owner).replace(f"{owner.since:%Y-%m-%dT%H:%M:%S}Z".encode(), b"9999-12-31T23:59:59-12:00")
    assert b"9999" in late and read_owner(late) is None
    assert "\x1b" not in str(replace(owner, command="\x1b[2J\n")) and "\n" not in str(replace(owner, command="\n"))
