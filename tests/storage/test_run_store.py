"""A run folder in S3: nodes see only what they fetch, damaged and changed files are reported, the cache evicts."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, upload

from raytrain.console import Console
from raytrain.errors import ConfigError, StorageError
from raytrain.stages.pipeline import STAGE_NAMES, run_pipeline
from raytrain.storage.artifacts import file_id
from raytrain.storage.filesystem import exists, list_files, read_range, remove_file, write_bytes
from raytrain.storage.run_store import RunStore
from raytrain.training.mirror import SharedCheckpoints


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Makes this process another machine: `cache(name)` gives it a separate cache."""

    def use(name: str) -> Path:
        folder = tmp_path / "caches" / name
        monkeypatch.setenv("RAYTRAIN_CACHE", str(folder))
        return folder

    use("first")
    return use


@pytest.fixture
def uri(s3, request):
    """URI of a folder of this test."""
    return f"{s3}/remote/{request.node.name}"


def test_another_machine_sees_only_what_was_published(uri, cache):
    driver = RunStore(f"{uri}/run")
    (driver.local / "tokenizer").mkdir(parents=True)
    (driver.local / "statistics.json").write_text("{}")
    (driver.local / "tokenizer" / "en.model").write_bytes(b"pieces")
    (driver.local / "scratch.tmp").write_text("mine")
    driver.publish()
    cache("second")
    reader = RunStore(f"{uri}/run")
    assert reader.local != driver.local and not reader.local.exists()
    reader.fetch("statistics.json", "absent.json")
    reader.fetch_folder("tokenizer")
    assert (reader.local / "statistics.json").read_text() == "{}"
    assert (reader.local / "tokenizer" / "en.model").read_bytes() == b"pieces"
    assert not (reader.local / "absent.json").exists() and not (reader.local / "scratch.tmp").exists()
    # Remote changes and removals are synced to this machine.
    (driver.local / "statistics.json").write_text('{"rows": 1}')
    (driver.local / "tokenizer" / "en.model").unlink()
    driver.publish()
    reader.sync()
    assert (reader.local / "statistics.json").read_text() == '{"rows": 1}'
    assert not (reader.local / "tokenizer" / "en.model").exists()
    assert not exists(f"{uri}/run/tokenizer/en.model")


def test_a_file_that_differs_from_the_one_written_is_an_error(uri, cache):
    driver = RunStore(f"{uri}/run")
    driver.local.mkdir(parents=True)
    (driver.local / "statistics.json").write_text("{}")
    driver.publish()
    write_bytes(f"{uri}/run/statistics.json", b"{ }")
    cache("second")
    with pytest.raises(StorageError, match="statistics.json is not the file that was written there.*rerun its stage"):
        RunStore(f"{uri}/run").fetch("statistics.json")


def test_parts_are_checked_and_the_least_used_are_evicted(uri, cache):
    writer = RunStore(f"{uri}/run")
    names = [f"assignment/bucket=000/part-{number:05d}.arrow" for number in range(4)]
    ids = []
    for number, name in enumerate(names):
        (writer.local / name).parent.mkdir(parents=True, exist_ok=True)
        (writer.local / name).write_bytes(bytes([number]) * 1000)
        ids.append(file_id(writer.local / name))
        writer.put_part(name, ids[-1])
    folder = cache("second")
    reader = RunStore(f"{uri}/run", cache_bytes=2500)

    def kept() -> list[int]:
        return sorted(path.read_bytes()[0] for path in folder.glob("runs/*/assignment/bucket=000/*"))

    for number in (0, 1, 0, 2):
        assert reader.part(names[number], ids[number]).read_bytes() == bytes([number]) * 1000
    assert kept() == [0, 2]  # 1 was used longest ago
    write_bytes(f"{uri}/run/{names[3]}", b"half")
    with pytest.raises(StorageError, match="part-00003.arrow is damaged"):
        reader.part(names[3], ids[3])
    assert kept() == [0, 2]


def test_checkpoints_of_an_earlier_run_folder_are_not_resumed(uri, cache):
    state = {"model": {"weight": torch.zeros(2)}}
    first = SharedCheckpoints(RunStore(f"{uri}/run"), keep=3)
    for step in (5, 9):
        first.save(step, state, {"ids": {}})
    cache("second")
    reader = SharedCheckpoints(RunStore(f"{uri}/run"))
    assert reader.about("newest").step == 9 and not list(reader.folder.glob("step_*"))  # found, not fetched
    assert reader.newest().step == 9 and reader.at(5).load("model")["weight"].tolist() == [0, 0]
    for name in list_files(f"{uri}/run", recursive=True):
        remove_file(name)  # the run was started over; both machines still have copies
    assert first.newest() is None and reader.about("newest") is None
    reader.newest()
    reader.save(1, state, {"ids": {}})
    reader.flush()
    assert first.newest().step == 1


def test_a_run_in_s3_needs_a_tracking_server(corpus, s3):
    with pytest.raises(ConfigError, match="set tracking.uri to a server, or tracking.enabled to false"):
        tiny_config(corpus, s3)
    with pytest.raises(ConfigError, match="those of a run at a URI are there already"):
        tiny_config(corpus, s3, tracking={"enabled": False}, train={"storage_path": "/copies"})


@pytest.mark.timeout(600)
def test_the_pipeline_leaves_everything_in_s3_and_another_machine_resumes(local_ray, corpus, uri, cache):
    root = upload(corpus, f"{uri}/corpus")
    sections = {"data": {"root": root}, "tracking": {"enabled": False}, "assign": {"materialize": True}}
    config = tiny_config(corpus, uri, **sections, train={"num_workers": 1})
    ran = run_pipeline(config, Console(quiet=True))
    assert ran == list(STAGE_NAMES)
    there = {name.removeprefix(f"{config.run_location}/") for name in list_files(config.run_location, recursive=True)}
    assert {
        "statistics.json",
        "bucket_plan.json",
        "batch_profile.json",
        "scores.json",
        "report.html",
        "config.yaml",
        "metrics.jsonl",
        "stages.json",
        "checkpoints/last.json",
    } <= there
    scores = json.loads(read_range(f"{config.run_location}/scores.json", 0, 0))
    assert scores["body"]["utterances"] == 10
    cache("second")
    assert run_pipeline(config, Console(quiet=True)) == []  # nothing to do
    longer = tiny_config(corpus, uri, **sections, train={"num_workers": 1, "max_steps": 8})
    assert run_pipeline(longer, Console(quiet=True), ("train",)) == ["train"]
    lines = [json.loads(line) for line in read_range(f"{config.run_location}/metrics.jsonl", 0, 0).splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 9))  # it resumed, and kept what was there
    assert os.environ["RAYTRAIN_CACHE"].endswith("second")
