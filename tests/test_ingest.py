"""Batches decoded by Ray Data, and training on streams: the same rows in the same order as by threads."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_values
from typer.testing import CliRunner

from raytrain.cli import app
from raytrain.cluster.ingest import RayBatches
from raytrain.cluster.pipeline import run_pipeline
from raytrain.cluster.workspace import Workspace
from raytrain.config import check_config
from raytrain.console import Console
from raytrain.data.augment import AugmentSettings
from raytrain.data.stream import StreamState
from raytrain.errors import ConfigError, TrainingError
from raytrain.training.checkpoint import CheckpointFolder

PREPARED = ("statistics", "buckets", "assign", "oomptimize")


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory, local_ray):
    """A run up to its batch profile."""
    config = tiny_config(corpus, tmp_path_factory.mktemp("ingest"))
    run_pipeline(config, Console(quiet=True), PREPARED)
    return config


def metrics(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_ray_data_gives_the_batches_of_the_threads(prepared):
    augment = AugmentSettings(speeds=(0.9, 1.1), gain_db=(-3.0, 3.0))
    config = prepared.model_copy(update={"augment": augment, "train": replace(prepared.train, max_epochs=1)})
    workspace = Workspace(config, config.run_dir)
    sizes = workspace.profiles()[0].batch_sizes
    with workspace.loader(sizes, None, [1], 2) as batches:
        expected = list(batches)
    state = expected[2].state.to_dict()
    with RayBatches(workspace, sizes, state, [1], 2, world_size=2) as batches:
        found = list(batches)
    assert len(found) == len(expected) - 3 > 3
    for one, other in zip(found, expected[3:], strict=True):
        assert (one.plan, one.state, one.is_last) == (other.plan, other.state, other.is_last)
        assert one.samples_by_corpus == other.samples_by_corpus
        for mine, theirs in zip(one.batch.tensors(), other.batch.tensors(), strict=True):
            assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype


def test_a_broken_recording_is_replaced_and_listed_by_who_trains(corpus, tmp_path, local_ray):
    import shutil

    copied = tmp_path / "corpus"
    shutil.copytree(corpus, copied)
    config = tiny_config(copied, tmp_path / "runs", train={"max_epochs": 1})
    run_pipeline(config, Console(quiet=True), PREPARED)
    rows = [json.loads(line) for line in (copied / "train.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        (copied / row["audio_filepath"]).write_bytes(b"no audio")
    workspace = Workspace(config, config.run_dir)
    with RayBatches(workspace, workspace.profiles()[0].batch_sizes, None, [0], 1) as batches:
        assert sum(loaded.num_replaced for loaded in batches) == 2
    listed = [json.loads(line) for line in workspace.path("quarantine.jsonl").read_text().splitlines()]
    assert sorted(Path(line["audio_path"]).name for line in listed) == sorted(
        Path(row["audio_filepath"]).name for row in rows[:2]
    )


def test_no_cpu_for_decoding_is_said_before_training(prepared):
    config = prepared.model_copy(update={"data": prepared.data.model_copy(update={"workers": "ray"})})
    with pytest.raises(TrainingError, match="leaves no CPU to decode"):
        run_pipeline(config, Console(quiet=True), ("train",))


CLUSTER = """
import json, os, sys
from ray.cluster_utils import Cluster
from raytrain.cluster.pipeline import run_pipeline
from raytrain.config import check_config
from raytrain.console import Console

# The trainers' node has CPUs for its trainers alone, the other one is for decoding.
head = {"num_cpus": 2, "resources": {"trainer": 2}, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
try:
    cluster.add_node(num_cpus=1, resources={"decoder": 1})
    os.environ["RAY_ADDRESS"] = cluster.address
    run_pipeline(check_config(json.load(open(sys.argv[1]))), Console(quiet=True), ("train",))
finally:
    import ray
    ray.shutdown()
    cluster.shutdown()
"""


def test_two_nodes_one_trains_the_other_decodes(prepared, tmp_path):
    import shutil

    runs = []
    for name, data, cluster in (
        ("threads", {}, {}),
        ("ray", {"workers": "ray"}, {"train_resources": {"trainer": 1}, "data_resources": {"decoder": 0.5}}),
    ):
        values = prepared.model_dump(mode="json")
        values |= {"run": {"root": str(tmp_path / name)}, "cluster": {**values["cluster"], **cluster}}
        values["data"] |= data
        values["tracking"] = {"enabled": False}
        shutil.copytree(prepared.run_dir, tmp_path / name / "tiny")
        config = check_config(values)
        if name == "threads":
            run_pipeline(config, Console(quiet=True), ("train",))
        else:
            (tmp_path / "config.json").write_text(json.dumps(values))
            command = [sys.executable, "-c", CLUSTER, str(tmp_path / "config.json")]
            environment = {**os.environ, "RAY_TRAIN_V2_ENABLED": "1"}
            done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
            assert done.returncode == 0, done.stderr[-3000:]
        runs.append(metrics(config.run_dir))
    assert list(runs[0]) == list(range(1, 7))
    assert runs[0].keys() == runs[1].keys()
    assert all(runs[0][step] == pytest.approx(runs[1][step], rel=1e-5) for step in runs[0])


def test_training_on_a_stream_needs_no_assignment_and_resumes(corpus, tmp_path, local_ray):
    def values(steps: int) -> dict:
        return tiny_values(
            corpus, tmp_path, data={**tiny_values(corpus, tmp_path)["data"], "stream": {"buffer_size": 40}},
            train={**tiny_values(corpus, tmp_path)["train"], "max_steps": steps},
        )  # fmt: skip

    config = check_config(values(6))
    ran = run_pipeline(config, Console(quiet=True), (*PREPARED, "train"))
    assert ran == ["statistics", "buckets", "oomptimize", "train"]
    assert list(metrics(config.run_dir)) == list(range(1, 7))
    assert not (config.run_dir / "assignment").exists()
    kept = CheckpointFolder(config.run_dir / "checkpoints", 2).newest()
    assert [steps for _, steps in kept.meta["schedule"]["segments"]] == [6]
    rest = ("train", "evaluate", "report")
    assert run_pipeline(check_config(values(8)), Console(quiet=True), rest) == list(rest)
    kept = CheckpointFolder(config.run_dir / "checkpoints", 2).newest()
    assert kept.step == 8 and sum(steps for _, steps in kept.meta["schedule"]["segments"]) == 8
    # The stream goes on where it was: the same rows as in one go.
    workspace = Workspace(config, config.run_dir)
    sizes = workspace.profiles()[0].batch_sizes
    whole = [step.state for step in islice(workspace.stream(sizes, 2).steps(StreamState()), 8)]
    assert whole[-1].to_dict() == kept.meta["schedule"]
    described = CliRunner().invoke(app, ["schedule", "-c", str(config.run_dir / "config.yaml")])
    assert described.exit_code != 0 and "a stream has no schedule" in str(described.exception)


def test_a_stream_is_not_decoded_by_ray(corpus, tmp_path):
    values = tiny_values(corpus, tmp_path)
    values["data"] |= {"stream": {}, "workers": "ray"}
    with pytest.raises(ConfigError, match="needs an assignment"):
        check_config(values)
