"""Runs as jobs on a real Ray head: submit, follow, list, stop; tokens; what a job takes along and what it does not."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests
import yaml
from conftest import tiny_config, tiny_values, upload
from typer.testing import CliRunner

from raytrain.cli.app import app
from raytrain.cluster.jobs import JobRequest, Jobs, _Lines, server_address
from raytrain.config import check_config
from raytrain.errors import ClusterError, ConfigError
from raytrain.operations import submission
from raytrain.storage.filesystem import read_range

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-of-the-store"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "raytrain", *arguments]


def call(*arguments: str, without: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in without}
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=400, env={**kept, **environment})


@pytest.fixture
def written(corpus, tmp_path):
    """A configuration file."""
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(tiny_values(corpus, tmp_path)))
    return path


def test_a_submitted_stage_leaves_its_artifact_and_no_secret(head, written, tmp_path):
    from ray.job_submission import JobSubmissionClient

    arguments = ["submit", "statistics", "--config", str(written), "--address", head, "--python", sys.executable]
    # RAY_ADDRESS would override the address in Ray's own client.
    set_by_others = tuple(name for name in os.environ if name.startswith(("AWS_", "RAYTRAIN_")))
    done = call(
        *arguments,
        without=set_by_others,
        AWS_SECRET_ACCESS_KEY=SECRET,
        AWS_REGION="eu-north-1",
        RAY_ADDRESS="http://127.0.0.1:1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "96 utterances" in done.stdout and "SUCCEEDED" in done.stderr
    assert "secrets not passed: AWS_SECRET_ACCESS_KEY" in done.stderr
    assert (tmp_path / "tiny" / "statistics.json").exists()

    listed = CliRunner().invoke(app, ["status", "--json", "--address", head])
    newest = json.loads(listed.stdout.splitlines()[0])
    assert (newest["run"], newest["stages"], newest["state"]) == ("tiny", "statistics", "SUCCEEDED")
    assert newest["raytrain"] and newest["started"] <= newest["since"] == newest["ended"]
    details = JobSubmissionClient(head).get_job_info(newest["id"])
    assert details.runtime_env["env_vars"] == {"AWS_REGION": "eu-north-1"}
    shown = CliRunner().invoke(app, ["status", newest["id"], "--address", head])
    assert "SUCCEEDED" in shown.stdout
    logs = CliRunner().invoke(app, ["logs", newest["id"], "--address", head])
    assert "96 utterances" in logs.stdout
    for result in (done, listed, shown, logs):
        for secret in (SECRET, os.environ["RAY_AUTH_TOKEN"]):
            assert secret not in result.stdout + result.stderr


def test_one_command_takes_a_run_to_its_scores_in_s3(head, corpus, s3, tmp_path):
    data = upload(corpus, f"{s3}/jobs/corpus")
    train = {"num_workers": 1, "max_steps": 2, "validate_every_steps": 2}
    values = tiny_values(
        corpus,
        f"{s3}/jobs/runs",
        data={"root": data},
        train=train,
        tracking={"enabled": False},
        oomptimize={"device_memory": None, "soak_steps": 4, "steps_per_probe": 1},
    )
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    passed = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", f"RAYTRAIN_CACHE={tmp_path / 'cache'}")
    env = [part for name in passed for part in ("--env", name)]
    done = call("submit", "-c", str(tmp_path / "a.yaml"), "--address", head, "--python", sys.executable, *env)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads(read_range(f"{s3}/jobs/runs/tiny/scores.json", 0, 0))["body"]
    assert scores["utterances"] == 10 and scores["wer"] > 0
    (profile,) = json.loads(read_range(f"{s3}/jobs/runs/tiny/batch_profile.json", 0, 0))["body"]["profiles"]
    assert profile["setting"]["device_name"] == "Emulated L4" and profile["confirmed"]


def test_the_job_scripts_run_under_ray_job_submit(head, written, tmp_path):
    command = [Path(sys.executable).with_name("ray"), "job", "submit", "--address", head, "--working-dir", str(ROOT)]
    job = [sys.executable, "-m", "pipelines.run", "--config", str(written), "statistics", "buckets"]
    done = subprocess.run([*command, "--", *job], capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "SUCCEEDED" in done.stdout + done.stderr or "succeeded" in done.stdout + done.stderr
    assert (tmp_path / "tiny" / "bucket_plan.json").exists()


def test_a_failed_job_is_exit_code_one_with_its_error(head, written):
    done = call("submit", "buckets", "-c", str(written), "--address", head, "--python", sys.executable)
    assert done.returncode == 1
    assert "buckets needs the output of statistics" in done.stdout
    assert "FAILED" in done.stderr and "Traceback" not in done.stdout + done.stderr


def test_ctrl_c_ends_the_following_and_stop_the_job(head, tmp_path):
    name = Jobs(head).submit(JobRequest("long", "echo begun; sleep 300", tmp_path, {}, {"run": "long"}))
    follower = subprocess.Popen(
        command("logs", "--follow", name, "--address", head),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert any("begun" in line for line in follower.stdout)
        follower.send_signal(signal.SIGINT)
        output = " ".join(follower.communicate(timeout=30)[1].split())  # without the line breaks of its width
    finally:
        follower.kill()
    assert follower.returncode == 130
    assert f"raytrain stop {name}" in output and f"raytrain logs --follow {name}" in output
    assert Jobs(head).get(name).state == "RUNNING"
    done = CliRunner().invoke(app, ["stop", name, "--address", head])
    assert f"{name} is STOPPED" in " ".join(done.stderr.split())
    assert Jobs(head).list()[0].state == "STOPPED"
    assert "was not running" in CliRunner().invoke(app, ["stop", name, "--address", head]).stderr


def test_without_the_token_the_server_refuses_and_the_error_says_so(head, tmp_path):
    assert requests.get(f"{head}/api/jobs/", timeout=10).status_code == 401
    nobody = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")
    done = call("status", "--address", head, without=nobody, HOME=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "requires the cluster's token; got none; to do: put the cluster's token" in " ".join(done.stderr.split())
    done = call("status", "--address", head, RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == 1 and "got another token" in done.stderr


def test_an_unknown_job_is_named(head):
    done = call("logs", "nobody", "--address", head)
    assert done.returncode == 1 and "has no job nobody" in done.stderr and "Traceback" not in done.stderr


def test_no_server_and_no_jobs_server_are_told_apart():
    with pytest.raises(ClusterError, match="no Jobs server answers at http://127.0.0.1:1;"):
        Jobs("http://127.0.0.1:1")
    with serving(b"<html>hello</html>") as (address, _), pytest.raises(ClusterError, match="is not a Jobs server"):
        Jobs(address)
    with pytest.raises(ClusterError, match="begins with http"):
        Jobs("ray://127.0.0.1:10001")


def test_a_server_that_asks_for_no_token_gets_none_and_is_warned_of(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    messages = []
    with serving(json.dumps({"ray_version": "2.60.0"}).encode()) as (address, headers):
        Jobs(address, messages.append)
    assert headers and all("Authorization" not in header for header in headers)
    assert len(messages) == 1 and "can run code as its user" in messages[0]


class serving:
    """A web server on 127.0.0.1 with one answer; gives its address and the headers of what it was asked."""

    def __init__(self, answer: bytes) -> None:
        headers = self.headers = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                headers.append(dict(self.headers))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}", self.headers

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_where_the_server_is(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert server_address(None, None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert server_address(None, "10.0.0.1:6379") == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://b:8265")
    assert server_address(None, None) == "http://b:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://c/")
    assert server_address(None, None) == "https://c"
    assert server_address(None, "http://d:1") == "http://d:1"
    assert server_address("e:8265", "http://d:1") == "http://e:8265"


def test_only_named_secrets_go_along(tmp_path):
    here = {
        "AWS_REGION": "eu-north-1",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": "https://u:pw@store",
        "MLFLOW_TRACKING_URI": "https://ann:pw@mlflow",
        "RAYTRAIN_DATA_ROOT": "/data",
        "HF_TOKEN": "t",
        "OTHER": "1",
    }
    passed = submission.variables([], here)
    assert passed.values == {"AWS_REGION": "eu-north-1", "RAYTRAIN_DATA_ROOT": "/data"}
    assert passed.secret == () and set(passed.kept) == {
        "AWS_ENDPOINT_URL",
        "MLFLOW_TRACKING_URI",
        "AWS_SECRET_ACCESS_KEY",
    }
    passed = submission.variables(["AWS_SECRET_ACCESS_KEY", "MODE=x=y", "RAYTRAIN_DATA_ROOT=s3://b"], here)
    assert passed.values["AWS_SECRET_ACCESS_KEY"] == SECRET and passed.secret == ("AWS_SECRET_ACCESS_KEY",)
    assert (passed.values["MODE"], passed.values["RAYTRAIN_DATA_ROOT"]) == ("x=y", "s3://b")
    with pytest.raises(ConfigError, match="--env ABSENT has no local value"):
        submission.variables(["ABSENT"], here)


def test_paths_mean_the_same_in_the_job(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {
        "name": "a",
        "data": {"train": ["a.jsonl"]},
        "train": {"init_from": "m.nemo", "storage_path": "s3://b/c"},
        "cluster": {"address": "http://127.0.0.1:8265"},
    }
    config = check_config(values)
    settings = submission.job_settings(config, {})
    assert settings["run"]["root"] == str(tmp_path / "runs") and settings["data"]["root"] == str(tmp_path)
    assert settings["train"]["init_from"] == str(tmp_path / "m.nemo")
    assert settings["train"]["storage_path"] == "s3://b/c" and settings["cluster"]["address"] is None
    given = {"RAYTRAIN_RUN_ROOT": "/runs", "RAYTRAIN_DATA_ROOT": "s3://speech"}
    settings = submission.job_settings(config, given)
    assert settings["run"]["root"] is None and settings["data"]["root"] is None
    folder = tmp_path / "packed"
    folder.mkdir()
    submission.pack(folder, settings, with_source=True)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "raytrain", "pipelines"} and not list(folder.rglob("__pycache__"))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 4 << 20
    assert check_config(yaml.safe_load((folder / "config.yaml").read_text())).name == "a"


def test_a_log_that_starts_anew_is_printed_once():
    lines: list[str] = []
    printed = _Lines(lines.append)
    printed.begin()
    printed.add("one\ntw")
    printed.begin()
    printed.add("one\n")
    printed.add("two\nthree")
    printed.end()
    assert lines == ["one", "two", "three"]


LOCAL = """
import os, psutil
from raytrain.cluster.session import ray_session
from raytrain.config import ClusterSection
with ray_session(ClusterSection(num_cpus=1)):
    import ray
    mode = ray.remote(lambda: os.environ["RAY_AUTH_MODE"])
    print(ray.get(mode.remote()), len(os.environ["RAY_AUTH_TOKEN"]))
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    open_ports = [socket for process in family for socket in process.net_connections() if socket.status == "LISTEN"]
    print(len(open_ports), {socket.laddr.ip for socket in open_ports})
print(os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN"))
"""


def test_a_local_ray_has_a_token_of_its_own_and_listens_here_only(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    done = subprocess.run(
        [sys.executable, "-c", LOCAL], capture_output=True, text=True, timeout=100, env={**kept, "HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    token, ports, after = done.stdout.splitlines()
    assert token == "token 64" and after == "None None"
    count, _, places = ports.partition(" ")
    assert int(count) > 3 and set(json.loads(f"[{places[1:-1]}]".replace("'", '"'))) <= {
        "127.0.0.1",
        "::ffff:127.0.0.1",
        "::1",
    }
    assert not (tmp_path / ".ray").exists()


def test_a_jobs_server_can_not_be_joined(corpus, tmp_path):
    from raytrain.cluster.session import ray_session

    config = tiny_config(corpus, tmp_path, cluster={"address": "http://127.0.0.1:8265"})
    import ray

    if ray.is_initialized():
        pytest.skip("this process has a Ray")
    with pytest.raises(ClusterError, match="raytrain submit"), ray_session(config.cluster):
        pass
