"""Batches decoded by Ray Data, and training on streams: the same rows in the same order as by threads."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_values
from typer.testing import CliRunner

from raytrain.cli.app import app
from raytrain.cluster.ingest import RankInput, RayBatches
from raytrain.config import check_config
from raytrain.console import Console
from raytrain.data.augment import AugmentSettings
from raytrain.data.stream import StreamState
from raytrain.errors import ConfigError, TrainingError
from raytrain.run_folder.batches import make_loader, make_stream
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.pipeline import run_pipeline
from raytrain.training.checkpoint import CheckpointFolder

PREPARED = ("statistics", "buckets", "assign", "oomptimize")


def metrics(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_ray_data_gives_the_batches_of_the_threads(prepared):
    augment = AugmentSettings(speeds=(0.9, 1.1), gain_db=(-3.0, 3.0))
    config = prepared.model_copy(update={"augment": augment, "train": replace(prepared.train, max_epochs=1)})
    workspace = Workspace(config, config.run_dir)
    sizes = workspace.profiles()[0].batch_sizes
    with make_loader(workspace, sizes, None, [1], 2) as batches:
        expected = list(batches)
    state = expected[2].state.to_dict()
    with RayBatches(workspace, RankInput(sizes, state, [1], 2, world_size=2)) as batches:
        steps = list(batches)
    assert len(steps) == len(expected) - 3 > 3
    for actual, reference in zip(steps, expected[3:], strict=True):
        assert (actual.plan, actual.state, actual.is_last) == (reference.plan, reference.state, reference.is_last)
        assert actual.samples_by_corpus == reference.samples_by_corpus
        for mine, theirs in zip(actual.batch.tensors(), reference.batch.tensors(), strict=True):
            assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype


def test_a_broken_recording_is_replaced_and_listed_by_who_trains(corpus, tmp_path, local_ray):
    copied = tmp_path / "corpus"
    shutil.copytree(corpus, copied)
    config = tiny_config(copied, tmp_path / "runs", train={"max_epochs": 1})
    run_pipeline(config, Console(quiet=True), PREPARED)
    rows = [json.loads(line) for line in (copied / "train.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        (copied / row["audio_filepath"]).write_bytes(b"no audio")
    workspace = Workspace(config, config.run_dir)
    with RayBatches(workspace, RankInput(workspace.profiles()[0].batch_sizes, None, [0], 1)) as batches:
        assert sum(loaded.num_replaced for loaded in batches) == 2
    listed = [json.loads(line) for line in workspace.path("quarantine.jsonl").read_text().splitlines()]
    assert sorted(Path(line["audio_path"]).name for line in listed) == sorted(
        Path(row["audio_filepath"]).name for row in rows[:2]
    )


def test_no_cpu_for_decoding_is_said_before_training(copy_of):
    config = copy_of("ray", data={"workers": "ray"})
    with pytest.raises(TrainingError, match="leaves no CPU to decode"):
        run_pipeline(config, Console(quiet=True), ("train",))


def test_two_nodes_one_trains_the_other_decodes(copy_of, nodes):
    threads = copy_of("threads")
    run_pipeline(threads, Console(quiet=True), ("train",))
    # The trainers' node has CPUs for its trainers alone, the other one is for decoding.
    nodes.add(num_cpus=2, resources={"trainer": 2})
    nodes.add(num_cpus=1, resources={"decoder": 1})
    places = {"train_resources": {"trainer": 1}, "data_resources": {"decoder": 0.5}}
    by_ray = copy_of("ray", data={"workers": "ray"}, cluster=places)
    run_pipeline(by_ray, Console(quiet=True), ("train",))
    expected, losses = metrics(threads.run_dir), metrics(by_ray.run_dir)
    assert list(expected) == list(losses) == list(range(1, 7))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_training_on_a_stream_needs_no_assignment_and_resumes(corpus, tmp_path, local_ray):
    def values(steps: int) -> dict:
        return tiny_values(
            corpus,
            tmp_path,
            data={**tiny_values(corpus, tmp_path)["data"], "stream": {"buffer_size": 40}},
            train={**tiny_values(corpus, tmp_path)["train"], "max_steps": steps},
            tracking={"enabled": False},
        )

    config = check_config(values(6))
    ran = run_pipeline(config, Console(quiet=True), (*PREPARED, "train"))
    assert ran == ["statistics", "buckets", "oomptimize", "train"]
    assert list(metrics(config.run_dir)) == list(range(1, 7))
    assert not (config.run_dir / "assignment").exists()
    kept = CheckpointFolder(config.run_dir / "checkpoints", 2).newest()
    assert [steps for _, steps in kept.meta["schedule"]["segments"]] == [6]
    assert run_pipeline(check_config(values(8)), Console(quiet=True), ("train",)) == ["train"]
    kept = CheckpointFolder(config.run_dir / "checkpoints", 2).newest()
    assert kept.step == 8 and sum(steps for _, steps in kept.meta["schedule"]["segments"]) == 8
    # The stream resumes where it was, with the same rows as without interruption.
    workspace = Workspace(config, config.run_dir)
    sizes = workspace.profiles()[0].batch_sizes
    whole = [step.state for step in islice(make_stream(workspace, sizes, 2).steps(StreamState()), 8)]
    assert whole[-1].to_dict() == kept.meta["schedule"]
    described = CliRunner().invoke(app, ["schedule", "-c", str(config.run_dir / "config.yaml")])
    assert described.exit_code != 0 and "a stream has no schedule" in str(described.exception)


def test_a_stream_is_not_decoded_by_ray(corpus, tmp_path):
    values = tiny_values(corpus, tmp_path)
    values["data"] |= {"stream": {}, "workers": "ray"}
    with pytest.raises(ConfigError, match="needs an assignment"):
        check_config(values)
