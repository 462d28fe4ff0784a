"""raytrain where Ray has GPUs: on a cluster that claims them, whose workers take every branch of a GPU on a processor.

What such a cluster can't show is listed in docs/design.md, each item with its `gpu` test.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_values

pytestmark = pytest.mark.timeout(900)
H100, A100 = ("Emulated H100", 2 << 30), ("Emulated A100", 3 << 29)


def node(cpus: int, gpus: int = 0, kind: str = "data", emulated: tuple[str, int] | None = None) -> dict:
    variables = {"RAYTRAIN_EMULATED_GPU": f"{emulated[0]}:{emulated[1]}"} if emulated else {}
    claimed = {"num_gpus": gpus} if gpus else {}
    return {"num_cpus": cpus, "labels": {"kind": kind}, "env_vars": variables, **claimed}


NODES = [
    {**node(2), "include_dashboard": False},
    node(3, 2, "h100", H100),
    node(3, 2, "h100", H100),
    node(2, 1, "a100", A100),
]
BROKEN = node(1, 1, "broken")


def on(labels: str, **settings: object) -> list[str]:
    """Options that put training on nodes of a kind."""
    pairs = {"cluster.train_labels": f"{{kind: '{labels}'}}", **{key: str(value) for key, value in settings.items()}}
    return [word for key, value in pairs.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def commands(config: str, manifest: str, root: Path) -> list[dict]:
    def command(name: str, *arguments: str, **more: object) -> dict:
        profile = str(root / "tiny" / "batch_profile.json") if "sizes" in name or name == "run" else None
        return {"name": name, "arguments": list(arguments), "profile": profile, **more}

    def stage(name: str, *options: str) -> tuple[str, ...]:
        return (name, "--config", config, *options)

    single_gpu = on("a100", train__num_workers="[1, 2]", train__max_steps=8)
    mixed = on("in(h100, a100)", train__num_workers=3, train__shard="true", train__max_steps=10)
    return [
        command("run", *stage("run")),
        command("run again", *stage("run")),
        command(
            "transcribe",
            "transcribe",
            "-m",
            str(root / "tiny"),
            "--manifest",
            manifest,
            "--output",
            str(root / "texts.jsonl"),
            "--language",
            "en",
        ),
        command("doctor", "doctor", "--config", config),
        command("too many", *stage("train", *on("h100", train__num_workers=5))),
        command("busy", *stage("train", *on("h100", train__max_steps=7)), busy=True, interrupt_at="waiting for other"),
        command("one GPU: sizes", *stage("oomptimize", *single_gpu)),
        command("one GPU: train", *stage("train", *single_gpu)),
        command("mixed: sizes", *stage("oomptimize", *mixed)),
        command("mixed: train", *stage("train", *mixed)),
        command("tune", *stage("tune", *on("h100", train__num_workers=1, train__max_steps=2))),
        command("ablate", *stage("ablate", *on("h100", train__num_workers=2))),
        command("broken", *stage("oomptimize", *on("broken")), add=BROKEN),
    ]


@pytest.fixture(scope="module")
def results(corpus, tmp_path_factory) -> dict:
    """What every command said, on one cluster; `root` has the run folders."""
    root = tmp_path_factory.mktemp("gpus")
    values = tiny_values(
        corpus,
        root,
        train={"num_workers": 4, "validate_every_steps": 100},
        cluster={"train_labels": {"kind": "h100"}, "data_labels": {"kind": "data"}},
        oomptimize={"device_memory": None, "soak_steps": 4, "steps_per_probe": 1},
        evaluate={"num_workers": 2},
        tune={"num_trials": 2, "space": {"train.learning_rate": {"uniform": [1e-4, 1e-3]}}},
        ablate={"schemes": ["D"], "device_memory": "1GiB", "max_batch_size": 4, "max_steps": 2},
    )
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    plan = root / "plan.json"
    asked = commands(str(config), str(corpus / "test.jsonl"), root)
    plan.write_text(json.dumps({"nodes": NODES, "commands": asked}))
    program = Path(__file__).parents[1] / "claimed_gpus.py"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, program, plan], capture_output=True, text=True, timeout=850, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "root": root, "run_folder": root / "tiny"}


def profiles(results: dict, name: str) -> dict[str, dict]:
    """The batch profiles after a command, by the GPU's name."""
    return {single_gpu["setting"]["device_name"]: single_gpu for single_gpu in results[name]["profiles"]}


def said(results: dict, name: str) -> str:
    return " ".join(results[name]["output"].split())


def test_the_whole_way_runs_on_two_nodes_with_two_gpus_each(results):
    assert results["run"]["code"] == 0, results["run"]["output"]
    assert "Emulated H100: 4 processes;" in said(results, "run")  # as many starts as GPUs
    (profile,) = profiles(results, "run").values()
    assert profile["setting"]["device_name"] == H100[0] and profile["confirmed"]
    assert profile["setting"]["precision"] == "bf16" and profile["setting"]["world_size"] == 4
    assert all(profile["measured_gib"]) and all(size == 8 for size in profile["batch_sizes"])
    assert "nothing to do" in said(results, "run again") and results["run again"]["code"] == 0


def test_batch_transcription_runs_on_gpus(results):
    assert results["transcribe"]["code"] == 0, results["transcribe"]["output"]
    rows = [json.loads(line) for line in (results["root"] / "texts.jsonl").read_bytes().splitlines()]
    assert len(rows) == 10 and all("pred_text" in row for row in rows)


def test_the_doctor_counts_room_where_training_runs(results):
    assert "all 4 training workers fit (1 CPU, 1 GPU each)" in said(results, "doctor")
    assert "torch sees 0" not in said(results, "doctor")


def test_more_workers_than_gpus_is_an_error_at_once(results):
    assert results["too many"]["code"] == 1
    assert "does not have room for that many training workers (1 CPU, 1 GPU each); got 5" in said(results, "too many")


def test_gpus_that_torch_can_not_use_are_named_with_the_reason(results):
    assert results["broken"]["code"] == 1
    assert "torch can't use" in said(results, "broken") and "built without CUDA" in said(results, "broken")


def test_training_says_what_it_waits_for_and_ctrl_c_ends_it(results):
    assert results["busy"]["code"] == 130
    assert "waiting for other work to end: 4 workers (1 CPU, 1 GPU each), there is room for 0" in said(results, "busy")


def test_another_kind_of_gpu_gets_its_own_sizes(results):
    """Also with more workers wanted than GPUs, where fewer are allowed."""
    assert results["one GPU: sizes"]["code"] == 0, results["one GPU: sizes"]["output"]
    assert set(profiles(results, "one GPU: sizes")) == {A100[0]}
    assert "8 steps" in said(results, "one GPU: train") and results["one GPU: train"]["code"] == 0


def test_weights_sharded_over_two_kinds_of_gpu_are_probed_by_a_group_and_trained(results):
    assert results["mixed: sizes"]["code"] == 0, results["mixed: sizes"]["output"]
    assert "3 processes" in said(results, "mixed: sizes")
    a100, h100 = (profiles(results, "mixed: sizes")[name] for name, _ in (A100, H100))
    assert a100["setting"]["shard"] and a100["confirmed"] and a100["batch_sizes"] == h100["batch_sizes"]
    assert a100["setting"]["device_gib"] == h100["setting"]["device_gib"] == 1.5  # what all ranks have
    assert "10 steps" in said(results, "mixed: train") and results["mixed: train"]["code"] == 0


@pytest.mark.parametrize("name", ["tune", "ablate"])
def test_searches_and_comparisons_run_on_gpus(results, name):
    assert results[name]["code"] == 0, results[name]["output"]


def test_every_step_was_taken_once(results):
    lines = map(json.loads, (results["run_folder"] / "metrics.jsonl").read_bytes().splitlines())
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert sorted(losses) == list(range(1, 11)) and all(loss > 0 for loss in losses.values())
