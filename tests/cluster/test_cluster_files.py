"""The operators' files in configs/cluster/: they parse, contain the required settings, and the Slurm script runs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import tiny_values

from raytrain.config import check_config

ROOT = Path(__file__).parents[2]
FILES = ROOT / "configs" / "cluster"
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())


@pytest.fixture(scope="module")
def kuberay() -> dict[str, dict]:
    """The documents of the KubeRay file by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((FILES / "kuberay-rayjob.yaml").read_text())}


def groups(kuberay: dict) -> dict[str, dict]:
    """Head and worker groups by name."""
    spec = kuberay["RayJob"]["spec"]["rayClusterSpec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def test_kuberay_job_is_retried_and_leaves_nothing(kuberay):
    spec = kuberay["RayJob"]["spec"]
    assert kuberay["RayJob"]["apiVersion"] == "ray.io/v1"
    assert spec["submissionMode"] == "K8sJobMode" and spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == LOCK["ray"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert groups(kuberay)["head"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", ["head", "cpu", "gpu"])
def test_kuberay_pods(kuberay, name):
    group = groups(kuberay)[name]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
    environment = {entry["name"]: entry for entry in container["env"]}
    assert environment["RAY_memory_monitor_refresh_ms"]["value"] == "0"
    for secret, entry in environment.items():
        if re.search("KEY|PASSWORD|SECRET|TOKEN|USERNAME", secret):
            assert "secretKeyRef" in entry["valueFrom"] and "value" not in entry
    volumes = {entry["name"]: entry for entry in pod["volumes"]}
    mounts = {entry["mountPath"]: volumes[entry["name"]] for entry in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    sizes = mounts["/dev/shm"]["emptyDir"]["sizeLimit"], resources["limits"]["memory"]
    shm, memory = (int(size.removesuffix("Gi")) for size in sizes)
    assert 0.3 * memory <= shm <= 0.5 * memory  # Ray's object store takes 30 %
    assert environment["RAYTRAIN_CACHE"]["value"] in mounts
    if name != "head":
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert pod["automountServiceAccountToken"] is False
    assert ("nvidia.com/gpu" in resources["limits"]) == (name == "gpu")


def test_kuberay_configuration_is_one(kuberay):
    config = check_config(yaml.safe_load(kuberay["ConfigMap"]["data"]["config.yaml"]))
    assert config.run.root.startswith("s3://") and config.data.root.startswith("s3://")
    assert config.tracking.uri.startswith("http")
    spec = kuberay["RayJob"]["spec"]
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "config", "configMap": {"name": kuberay["ConfigMap"]["metadata"]["name"]}} in pod["volumes"]
    (mount_path,) = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "config"]
    assert spec["entrypoint"] == f"python -m pipelines.run --config {mount_path}/config.yaml"
    # All GPUs that the group may scale to can be used.
    gpu = groups(kuberay)["gpu"]
    each = int(gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert config.train.most_workers == each * gpu["maxReplicas"]


def test_ray_up_fits_rays_own_schema():
    pytest.importorskip("jsonschema")
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((FILES / "ray-up.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    head, gpu = (prepared["available_node_types"][name] for name in ("head", "gpu"))
    assert prepared["head_node_type"] == "head" and head["resources"]["CPU"] == 0
    assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot" and gpu["min_workers"] >= 1
    assert prepared["max_workers"] >= gpu["max_workers"]
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options and "--env RAY_memory_monitor_refresh_ms=0" in options
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    # If none is named, Ray creates one that is open to SSH from everywhere.
    assert head["node_config"]["SecurityGroupIds"] == gpu["node_config"]["SecurityGroupIds"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions with their arguments."""
    text = re.sub(r"\\\n", " ", "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#")))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_dockerfile_is_made_of_the_lock_file():
    steps = instructions(FILES / "Dockerfile")
    ((_, base),) = [step for step in steps if step[0] == "FROM"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)  # Ray needs the same x.y.z everywhere
    ignored = (FILES / "Dockerfile.dockerignore").read_text().split("\n")
    for name, arguments in steps:
        if name in ("COPY", "ADD"):
            *sources, _ = arguments.split()
            for source in sources:
                source = source.removeprefix("./")
                assert (ROOT / source).exists()
                assert f"!{source}" in ignored
    commands = " ".join(arguments for name, arguments in steps if name == "RUN")
    assert "pip install --no-cache-dir -r requirements.lock" in commands
    assert "torch" not in commands and "ray==" not in commands  # one place has their versions
    assert [arguments for name, arguments in steps if name == "USER"][-1] == "ray"
    assert not re.search(r"(KEY|PASSWORD|SECRET|TOKEN)=", (FILES / "Dockerfile").read_text())
    assert f"torch=={LOCK['torch']}" in (ROOT / "pyproject.toml").read_text()


SHIMS = {
    # A step on "its node": this machine, with that node's name.
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && export NODE=${1#--nodelist=}; shift; done
export SLURM_CPUS_ON_NODE=1
echo "$NODE ${*: -8}" >> "$SEEN"
exec "$@"
""",
    "scontrol": """#!/bin/bash
[ "$1 $2 $3" = "show hostnames node-[1-2]" ] && printf 'node-1\\nnode-2\\n'
""",
    "raytrain": """#!/bin/bash
[ "$1" = run ] && { echo "$@" > "$SEEN.run"; env | grep -c '^RAY_AUTH_TOKEN=' >> "$SEEN.run"; exit "${RUN_EXIT:-0}"; }
"$PYTHON" -m raytrain "$@" --json > "$SEEN.doctor" || true
""",
}


def test_slurm_script_is_bash():
    assert subprocess.run(["bash", "-n", FILES / "slurm.sh"], capture_output=True).returncode == 0
    assert b"usage" in subprocess.run(["bash", FILES / "slurm.sh"], capture_output=True).stderr


def test_slurm_ports_keep_out_of_the_way_of_rays_workers_and_the_system():
    text = (FILES / "slurm.sh").read_text()
    first, jobs = map(int, re.search(r"base=\$\(\((\d+) \+ SLURM_JOB_ID % (\d+) \* 10\)\)", text).groups())
    from ray.scripts.scripts import start

    defaults = {option.name: option.default for option in start.params}
    assert first > defaults["max_worker_port"] and first + jobs * 10 <= 32768  # from there on the system gives them out


def test_slurm_script_makes_a_cluster_of_two_nodes_and_ends_it(corpus, tmp_path):
    job = 900_000 + os.getpid() % 2000
    for name, text in SHIMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump(tiny_values(corpus, tmp_path / "runs")))
    seen = tmp_path / "seen"
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SEEN": str(seen),
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "RUN_EXIT": "7",
        "PYTHONPATH": str(ROOT),
        "RAYTRAIN_CACHE": str(tmp_path / "cache"),
    }
    environment.pop("RAY_ADDRESS", None)
    command = ["bash", str(FILES / "slurm.sh"), str(config), "--set", "train.max_steps=5"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 7, output[-3000:]  # that of `raytrain run`
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        _, left = psutil.wait_procs(processes_of(job), timeout=10)
        for process in left:
            process.kill()
        shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)
    steps = seen.read_text().splitlines()
    assert steps[0].startswith("node-1 ") and steps[1].startswith("node-2 ") and len(steps) == 2
    assert (tmp_path / "seen.run").read_text() == f"run --config {config} --set train.max_steps=5\n1\n"
    report = json.loads((tmp_path / "seen.doctor").read_text())
    failed = {entry["name"] for entry in report["checks"] if entry["status"] == "fail"}
    assert failed <= {"shared memory", "temp folder", "cache folder", "open files"}  # these are the machine's
    assert len(report["nodes"]) == 2 and sum(entry["is_head"] for entry in report["nodes"]) == 1
    by_name = {entry["name"]: entry for entry in report["checks"]}
    assert by_name["Jobs API"]["seen"].endswith("requires the token") and by_name["authentication"]["status"] == "ok"
    assert all(node["storage"]["sees_driver"] and node["memory_monitor"] == "0" for node in report["nodes"])
    assert by_name["MLflow"]["status"] == "warn"  # a file, and two nodes
    assert not left


def processes_of(job: int) -> list[psutil.Process]:
    """Those of the job's Ray, by the folder that they name."""
    matches = []
    for process in psutil.process_iter(["cmdline"]):
        if any(f"/tmp/ray-{job}/" in argument for argument in process.info["cmdline"] or ()):
            matches.append(process)
    return matches
