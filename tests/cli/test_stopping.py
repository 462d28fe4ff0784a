"""A signal ends any command in time with its exit code, one message, and nothing left behind."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from conftest import tiny_values

BEGIN = """
import signal, subprocess, sys, time
from raytrain.cli import stopping
from raytrain.errors import RaytrainError
stopping._GRACE_SECONDS, stopping._ECHO_SECONDS = 1.0, 0.2
stopping.install()
stopping.say_at_stop(stopping.RESUMABLE)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
with stopping.exit_codes():
    print("begun", child.pid, flush=True)
"""
BODIES = {
    "waits": "time.sleep(60)",
    "turns it into an error": """
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise RaytrainError("a worker went away") from None
""",
    "swallows it": """
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
""",
    "runs in native code": "import ctypes; [ctypes.CDLL(None).sleep(5) for _ in range(12)]",
    "is slow to end": """
    try:
        time.sleep(60)
    finally:
        time.sleep(60)
""",
}


def start(command: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_command_ends(body, number):
    process = start([sys.executable, "-c", f"{BEGIN}    {BODIES[body].strip()}\n"])
    child = psutil.Process(int(process.stdout.readline().split()[1]))
    time.sleep(0.3)  # until it is in its body
    process.send_signal(number)
    _, output = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert output == "stopped; run the same command again to resume\n"
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_second_signal_ends_at_once():
    process = start(
        [
            sys.executable,
            "-c",
            BEGIN.replace("= 1.0, 0.2", "= 60.0, 0.2") + "    while True:\n        try: "
            "time.sleep(60)\n        except KeyboardInterrupt: print('on', flush=True)\n",
        ]
    )
    process.stdout.readline()
    time.sleep(0.3)  # until it is in its loop
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "on\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=10)
    assert process.returncode == 130 and output.count("stopped") == 1


def stop_stage(stage: str, seconds: float, number: int, corpus, root) -> None:
    """Send a signal to a stage that has run for some seconds, which must end it well."""
    path = root / "a.yaml"
    path.write_text(yaml.safe_dump(tiny_values(corpus, root, train={"max_steps": 2000})))
    mark = str(random.random())
    process = start([sys.executable, "-m", "raytrain", stage, "--config", str(path)], STOPPED=mark)
    time.sleep(seconds)
    if process.poll() is None:
        process.send_signal(number)
    began = time.monotonic()
    _, output = process.communicate(timeout=30)
    assert process.returncode == 128 + number, output
    assert time.monotonic() - began < 12 and output.endswith("stopped; run the same command again to resume\n")
    assert "Traceback" not in output
    left = []
    for candidate in psutil.process_iter():
        try:
            if candidate.environ().get("STOPPED") == mark and candidate.status() != psutil.STATUS_ZOMBIE:
                left.append(candidate)
        except psutil.Error:
            pass
    assert not left


def test_ctrl_c_ends_a_run_with_ray(corpus, tmp_path):
    stop_stage("run", 6.0, signal.SIGINT, corpus, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [2.0, 4.0, 9.0, 14.0, 19.0, 26.0, 33.0])
def test_signals_end_a_run_at_any_time(corpus, tmp_path, seconds, number):
    stop_stage("run", seconds, number, corpus, tmp_path)
