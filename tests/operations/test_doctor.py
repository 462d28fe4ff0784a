"""What `raytrain doctor` makes of a cluster: judgement of made-up nodes, and real ones asked."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_config, tiny_values, upload
from typer.testing import CliRunner

from raytrain.config import ClusterSection
from raytrain.operations import checks, doctor, machine, run_storage
from raytrain.operations.checks import FAIL, OK, WARN
from raytrain.operations.doctor import examine
from raytrain.operations.facts import GIB, Decoders, Folder, Gpu, JobsApi, Manifest, Mlflow, NodeFacts, Speed, Storage

VERSIONS = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0+cpu", "raytrain": "0.1.0", "code": "a", "mlflow": "3"}
H100 = Gpu("H100", 80 * GIB, "90")
TEMP = Folder("/tmp/ray", free=100 * GIB, total=400 * GIB, writable=True)
SPEED = Speed(write_mib_s=300.0, read_mib_s=900.0)
NODE = NodeFacts(
    host="n1",
    versions=VERSIONS,
    cpus=8,
    shm_total=64 * GIB,
    shm_free=60 * GIB,
    object_store=19 * GIB,
    open_files=(1 << 20, 1 << 20),
    auth_mode="token",
    memory_monitor="0",
    temp_folder=TEMP,
    decoders=Decoders("libsndfile 1.2.2"),
    storage=Storage(speed=SPEED),
)


def status(results: list[checks.Check]) -> list[str]:
    """The statuses; every problem has a remedy, and nothing else has one."""
    assert all(bool(check.remedy) == (check.status != OK) for check in results)
    return [check.status for check in results]


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        (VERSIONS, OK),
        ({**VERSIONS, "torch": "2.13.0+cu130"}, OK),  # a CPU head and GPU workers
        ({**VERSIONS, "python": "3.11.8"}, FAIL),
        ({**VERSIONS, "ray": "2.59.0"}, FAIL),
        ({**VERSIONS, "mlflow": "2"}, WARN),
        ({name: version for name, version in VERSIONS.items() if name != "mlflow"}, WARN),
        (
            {name: version for name, version in VERSIONS.items() if name != "raytrain"},
            OK,
        ),  # the job uploaded the same files
        ({**VERSIONS, "code": "b"}, WARN),
        ({**VERSIONS, "code": "b", "raytrain": "0.2.0"}, FAIL),
    ],
)
def test_versions_that_differ(versions, expected):
    assert status(checks.check_versions([replace(NODE, versions=versions)], VERSIONS)) == [expected]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, OK),
        ({"gpus": (H100,) * 8, "ray_gpus": 8, "installed_gpus": 8, "gpu_driver": "580.1"}, OK),
        ({"gpus": (H100,) * 8, "ray_gpus": 4, "installed_gpus": 8}, WARN),
        ({"gpus": (H100,), "ray_gpus": 2, "installed_gpus": 1}, FAIL),
        ({"ray_gpus": 1}, FAIL),
        ({"installed_gpus": 8}, FAIL),
        ({"installed_gpus": 1, "ray_gpus": 1, "gpu_error": "CUDA driver is too old"}, FAIL),
    ],
)
def test_gpus_of_ray_and_torch(facts, expected):
    results = checks.check_gpus(replace(NODE, **facts))
    assert status(results) == [expected]
    if len(facts.get("gpus", ())) == 8 and expected == OK:
        assert results[0].seen == "8 × H100, 80 GiB, sm_90; driver 580.1"


@pytest.mark.parametrize(
    ("check", "facts", "expected"),
    [
        (checks.check_shared_memory, {}, OK),
        (checks.check_shared_memory, {"shm_total": 64 << 20, "object_store": 32 << 20}, FAIL),  # Docker's own size
        (checks.check_shared_memory, {"shm_total": 8 * GIB}, FAIL),  # below the object store
        (checks.check_open_files, {}, OK),
        (checks.check_open_files, {"open_files": (4096, 1 << 20)}, WARN),
        (checks.check_open_files, {"open_files": (256, 256)}, FAIL),
        (checks.check_clock, {"clock_s": -0.1}, OK),
        (checks.check_clock, {"clock_s": -5.0}, WARN),
        (checks.check_clock, {"clock_s": 3600.0}, FAIL),
        (checks.check_disks, {}, OK),
        (checks.check_disks, {"temp_folder": replace(TEMP, free=10 * GIB, total=50 * GIB)}, WARN),
        (checks.check_disks, {"temp_folder": replace(TEMP, free=10 * GIB)}, FAIL),  # Ray stops spilling
        (checks.check_disks, {"temp_folder": replace(TEMP, writable=False)}, FAIL),
        (checks.check_decoders, {}, OK),
        (checks.check_decoders, {"decoders": Decoders("l", ("MP3",))}, WARN),
        (checks.check_decoders, {"decoders": Decoders("l", ("FLAC",))}, FAIL),
        (checks.check_decoders, {"decoders": Decoders(error="no libsndfile")}, FAIL),
        (checks.check_memory_monitor, {}, OK),
        (checks.check_memory_monitor, {"memory_monitor": None}, WARN),
        (checks.check_memory_monitor, {"memory_monitor": "250"}, WARN),
    ],
)
def test_one_node(check, facts, expected):
    assert status(check(replace(NODE, **facts))) == [expected]


def test_the_way_to_more_open_files_depends_on_the_hard_limit():
    soft = checks.check_open_files(replace(NODE, open_files=(1024, 1 << 20)))[0].remedy
    hard = checks.check_open_files(replace(NODE, open_files=(1024, 4096)))[0].remedy
    assert "ulimit -n 65536" in soft and "LimitNOFILE" in hard and "ulimit -n" not in hard.replace("--ulimit n", "")


def test_access():
    def access(mode="token", token=True, answers=401, node_mode="token"):
        jobs = JobsApi("http://10.0.0.1:8265/api/jobs/", answers)
        results = checks.check_authentication([replace(NODE, jobs_api=jobs, auth_mode=node_mode)], mode, token)
        return status(results), " ".join(check.seen + check.remedy for check in results)

    assert access()[0] == [OK, OK]
    assert access(answers=None)[0] == [OK, OK]
    assert access(token=False)[0] == [FAIL, OK]
    assert access(node_mode="disabled")[0] == [FAIL, OK]
    statuses, text = access(mode="disabled", node_mode="disabled", answers=200)
    assert statuses == [FAIL, FAIL]
    assert "CVE-2023-48022" in text and "RAY_AUTH_MODE=token" in text


def test_storage_of_several_nodes():
    shared = replace(NODE, storage=Storage(sees_driver=True, speed=SPEED))
    alone = replace(NODE, host="n2", storage=Storage(sees_driver=False))
    slow = replace(NODE, host="n3", storage=Storage(sees_driver=True, speed=replace(SPEED, read_mib_s=5.0)))
    broken = replace(NODE, host="n4", storage=Storage(error="Access Denied"))
    results = checks.check_storage([shared, alone, slow, broken], "/runs", shared=True)
    assert status(results) == [OK, FAIL, WARN, FAIL]
    assert "do not share run.root" in results[1].seen and "s3://" in results[1].remedy
    assert status(checks.check_storage([NODE], "s3://b/runs", shared=False)) == [OK]


def test_manifests_and_mlflow_of_several_nodes():
    sees = Storage(manifests=(Manifest("mls", "p"),), mlflow=Mlflow("answers"))
    blind = Storage(manifests=(Manifest("mls", "p", "no such file"),), mlflow=Mlflow(error="no answer"))
    nodes = [replace(NODE, storage=sees), replace(NODE, host="n2", storage=blind)]
    assert status(checks.check_manifests(nodes)) == [OK, FAIL]
    results = checks.check_mlflow(nodes, "http://m:5000", Mlflow("answers"))
    assert status(results) == [FAIL] and results[0].where == "n2"
    assert status(checks.check_mlflow([NODE, NODE], "sqlite:////r/mlflow.db", Mlflow())) == [WARN]
    assert status(checks.check_mlflow([NODE], "sqlite:////r/mlflow.db", Mlflow())) == [OK]
    assert checks.check_mlflow([NODE], "", None) == []


def test_room_for_the_workers():
    assert status(checks.check_room(8, 8, "1 CPU, 1 GPU")) == [OK]
    (check,) = checks.check_room(8, 4, "1 CPU, 1 GPU")
    assert check.status == WARN and check.seen == "4 of 8 training workers fit (1 CPU, 1 GPU each)"


def test_nodes_that_do_not_answer_or_are_not_there():
    results = checks.check_answer(NodeFacts(host="n1", error="ModuleNotFoundError: No module named 'raytrain'"))
    assert status(results) == [FAIL] and "install raytrain" in results[0].remedy
    assert checks.check_answer(NODE) == []
    assert status(checks.check_nodes(2, 4)) == [FAIL] and status(checks.check_nodes(4, 4)) == [OK]


@pytest.mark.parametrize(
    ("why", "remedy"),
    [
        ("Version mismatch: The cluster was started with Ray: 2.59", "same Python"),
        ("Token authentication is enabled but no authentication token was found", "RAY_AUTH_TOKEN"),
        ("Failed to connect to Ray cluster at 10.0.0.1:6379", "RAY_AUTH_TOKEN"),  # without the token
        ("nothing answers at a:6379", "ray start"),
    ],
)
def test_a_ray_that_lets_nobody_in(why, remedy):
    check = checks.check_connection(why)
    assert check.status == FAIL and remedy in check.remedy


def test_equal_findings_of_many_nodes_are_one_line():
    nodes = [replace(NODE, host=f"n{number}", memory_monitor="0" if number else None) for number in range(9)]
    folded = checks.fold(check for node in nodes for check in checks.check_memory_monitor(node))
    assert [(check.status, check.where) for check in folded] == [(WARN, "n0"), (OK, "n1 and 7 more")]


STUB_TORCH = """
class _One:
    name, total_memory, major, minor = "Stub", 80 << 30, 9, 0
class cuda:
    device_count = staticmethod(lambda: len(__import__("os").environ.get("CUDA_VISIBLE_DEVICES", "0,1,2").split(",")))
    get_device_properties = staticmethod(lambda index: _One)
def zeros(*_, device):
    if {fails}: raise RuntimeError("CUDA error: no kernel image is available")
"""


@pytest.mark.parametrize("fails", [False, True])
def test_gpus_are_asked_of_torch_as_ray_was_started(tmp_path, monkeypatch, fails):
    (tmp_path / "torch.py").write_text(STUB_TORCH.replace("{fails}", str(fails)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what Ray makes of it for a task without GPUs
    monkeypatch.setattr(machine, "nvidia_gpus", lambda: (8, "580.1"))
    gpus = machine.gpu_facts(2, "4,5")
    assert gpus.installed == 2 and gpus.driver == "580.1"
    if fails:
        assert "no kernel image" in gpus.error
    else:
        assert gpus.gpus == (Gpu("Stub", 80 * GIB, "90"),) * 2
        assert len(machine.gpu_facts(3, None).gpus) == 3


def test_what_mlflow_says(tmp_path):
    assert run_storage.ask_mlflow(f"sqlite:///{tmp_path}/new/mlflow.db").error == ""
    assert "can't be written" in run_storage.ask_mlflow("sqlite:////proc/1/mlflow.db").error
    assert "no answer" in run_storage.ask_mlflow("http://127.0.0.1:9").error


def test_a_speed_is_bounded_in_time_and_leaves_nothing(tmp_path):
    speed = run_storage.measure_speed(str(tmp_path), 1 << 40, 0.2)
    assert speed.error == "" and 0 < speed.bytes < 1 << 40 and speed.read_mib_s > 0
    assert list(tmp_path.iterdir()) == []
    assert run_storage.measure_speed(str(tmp_path / "none"), 1, 1.0).error


def test_manifests_by_pattern_folder_and_mistake(tmp_path):
    (tmp_path / "m_0.jsonl").write_text("{}\n")
    (tmp_path / "m_1.jsonl").write_text("")
    assert run_storage.read_start(f"{tmp_path}/m_{{0..1}}.jsonl") == ""
    assert run_storage.read_start(str(tmp_path)) == ""
    assert "is empty" in run_storage.read_start(f"{tmp_path}/m_1.jsonl")
    assert "no such file" in run_storage.read_start(f"{tmp_path}/none.jsonl")


def by_name(report: doctor.Report) -> dict[str, checks.Check]:
    return {check.name: check for check in report.checks}


def test_a_run_in_an_object_store(corpus, s3, local_ray, monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_BYTES", 12 << 20)  # the server of the tests is slow
    data = upload(corpus, f"{s3}/doctor-data")
    config = tiny_config(
        corpus,
        Path("unused"),
        run={"root": f"{s3}/doctor-runs"},
        data={"root": data},
        tracking={"enabled": False},
    )
    report = examine(config, ClusterSection())
    named = by_name(report)
    assert named["run.root"].seen.startswith(f"{s3}/doctor-runs: written at")
    assert named["manifests"].status == named["authentication"].status == named["memory monitor"].status == OK
    assert report.nodes[0].storage.speed.bytes == 12 << 20
    import pyarrow.fs

    filesystem, path = pyarrow.fs.FileSystem.from_uri(s3)
    place = pyarrow.fs.FileSelector(f"{path}/doctor-runs", recursive=True, allow_not_found=True)
    left = filesystem.get_file_info(place)
    assert not [entry for entry in left if entry.is_file]


def test_the_command_on_a_run_in_a_folder(corpus, tmp_path, local_ray):
    from raytrain.cli.app import app

    values = tiny_values(corpus, tmp_path / "runs" / "deep")
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps(values))
    done = CliRunner().invoke(app, ["doctor", "--config", str(path), "--json"])
    document = json.loads(done.stdout)
    assert done.exit_code == (not document["ok"]), done.output
    (node,) = document["nodes"]
    assert node["is_head"] and node["cpus"] == 2 and node["versions"] == document["driver"]
    assert abs(node["clock_s"]) < 2 and node["auth_mode"] == "token" and node["error"] == ""
    assert node["storage"]["bytes"] == 64 << 20 and node["storage"]["write_mib_s"] > 0
    names = {check["name"] for check in document["checks"]}
    assert {"Ray", "versions", "GPUs", "run.root", "manifests", "MLflow", "room"} <= names
    assert sorted(tmp_path.iterdir()) == [path]  # folders made for the look are gone

    done = CliRunner().invoke(app, ["doctor", "--config", str(path), "--set", "data.dev=[none.jsonl]"])
    assert done.exit_code == 1
    assert "no such file" in " ".join(done.stdout.split()) and "FAILS" in done.stdout


def test_a_node_that_breaks_is_a_finding(local_ray, monkeypatch):
    def broken(_):
        raise RuntimeError("first line\nno such device")

    monkeypatch.setattr(doctor, "measure_node", broken)
    report = examine(None, ClusterSection())
    assert not report.ok and [check.name for check in report.checks if check.status == FAIL] == ["node"]
    assert "no such device" in by_name(report)["node"].seen


def test_an_address_where_nobody_is():
    report = examine(None, ClusterSection(address="127.0.0.1:9"))
    assert not report.ok and "nothing answers" in by_name(report)["Ray"].seen
