"""Runs raytrain's commands on a Ray that claims GPUs, on nodes of this machine that have none.

    python claimed_gpus.py PLAN

PLAN is JSON: `nodes`, arguments of `Cluster.add_node`, whose `env_vars` may have RAYTRAIN_EMULATED_GPU, and `commands`.
Each has its `name`, its `arguments`, whether all GPUs are `busy` meanwhile, `interrupt_at`, what the command is to have
said when Ctrl-C comes, a node to `add` before it, and the path of the batch `profile` to keep. The last line of the
output is JSON: by the name of each command its exit code, its output, the seconds that it took, and the profiles.
"""

import contextlib
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def claimed_cluster(nodes: list[dict[str, Any]]) -> Iterator[Any]:
    """A Ray of these nodes, the first one its head."""
    os.environ.update(RAY_memory_monitor_refresh_ms="0", RAY_TRAIN_V2_ENABLED="1")
    # One token for all: with a token at home this process would not talk with a cluster that has none.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    from ray.cluster_utils import Cluster  # which looks at the token when it is imported

    head, *workers = nodes
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for node in workers:
            cluster.add_node(**node)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def busy_gpus(busy: bool) -> Iterator[None]:
    """While the body runs, somebody else has all GPUs."""
    import ray

    class Holder:
        def ready(self) -> bool:
            return True

    number = int(ray.cluster_resources().get("GPU", 0)) if busy else 0
    holders = [ray.remote(num_cpus=0, num_gpus=1)(Holder).remote() for _ in range(number)]
    ray.get([holder.ready.remote() for holder in holders])
    try:
        yield
    finally:
        for holder in holders:
            ray.kill(holder)


def interrupted(arguments: list[str], text: str, seconds: float = 120) -> tuple[int, str]:
    """Exit code and output of a `raytrain` command at which Ctrl-C comes once it has said `text`: in a process of its
    own, which then ends."""
    lines: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "raytrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        ended = threading.Timer(seconds, process.kill)
        ended.start()
        for line in process.stdout:
            lines.append(line)
            if text in line:
                time.sleep(2)  # until it waits in Ray
                process.send_signal(signal.SIGINT)
        ended.cancel()
    return process.returncode, "".join(lines)


def here(arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of a `raytrain` command in this process, which is connected to Ray already."""
    from raytrain.cli.app import main

    output, code = io.StringIO(), 0
    sys.argv = ["raytrain", *arguments]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return code, output.getvalue()


def run_command(command: dict[str, Any]) -> dict[str, Any]:
    """One `raytrain` command."""
    began, arguments = time.monotonic(), command["arguments"]
    with busy_gpus(command.get("busy", False)):
        if "interrupt_at" in command:
            code, output = interrupted(arguments, command["interrupt_at"])
        else:
            code, output = here(arguments)
    return {"code": code, "output": output, "seconds": round(time.monotonic() - began, 1)}


def run_all(commands: list[dict[str, Any]], cluster: Any) -> dict[str, Any]:
    """All commands, one after the other, connected to Ray all the time."""
    from raytrain.cluster.session import ray_session
    from raytrain.config import ClusterSection

    results = {}
    with ray_session(ClusterSection()):
        for command in commands:
            if "add" in command:
                cluster.add_node(**command["add"])
            result = run_command(command)
            if command.get("profile") and os.path.exists(command["profile"]):
                with open(command["profile"]) as file:
                    result["profiles"] = json.load(file)["body"]["profiles"]
            results[command["name"]] = result
            print(command["name"], results[command["name"]], file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    with claimed_cluster(plan["nodes"]) as cluster:
        results = run_all(plan["commands"], cluster)
    print(json.dumps(results))
