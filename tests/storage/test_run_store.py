"""A run folder in S3: nodes see only what they bring, damaged and changed files are told, the cache makes room."""

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
    """Makes this process another machine: `cache(name)` gives it a cache of its own."""

    def use(name: str) -> Path:
        folder = tmp_path / "caches" / name
        monkeypatch.setenv("RAYTRAIN_CACHE", str(folder))
        return folder

    use("first")
    return use


@pytest.fixture
def place(s3, request):
    """URI of a folder of this test."""
    return f"{s3}/remote/{request.node.name}"


def test_another_machine_has_what_was_published_and_no_more(place, cache):
    driver = RunStore(f"{place}/run")
    (driver.local / "tokenizer").mkdir(parents=True)
    (driver.local / "statistics.json").write_text("{}")
    (driver.local / "tokenizer" / "en.model").write_bytes(b"pieces")
    (driver.local / "scratch.tmp").write_text("mine")
    driver.publish()
    cache("second")
    other = RunStore(f"{place}/run")
    assert other.local != driver.local and not other.local.exists()
    other.fetch("statistics.json", "absent.json")
    other.fetch_folder("tokenizer")
    assert (other.local / "statistics.json").read_text() == "{}"
    assert (other.local / "tokenizer" / "en.model").read_bytes() == b"pieces"
    assert not (other.local / "absent.json").exists() and not (other.local / "scratch.tmp").exists()
    # What changes there changes here, and what goes there goes here.
    (driver.local / "statistics.json").write_text('{"rows": 1}')
    (driver.local / "tokenizer" / "en.model").unlink()
    driver.publish()
    other.sync()
    assert (other.local / "statistics.json").read_text() == '{"rows": 1}'
    assert not (other.local / "tokenizer" / "en.model").exists()
    assert not exists(f"{place}/run/tokenizer/en.model")


def test_a_file_that_is_not_what_was_written_is_an_error(place, cache):
    driver = RunStore(f"{place}/run")
    driver.local.mkdir(parents=True)
    (driver.local / "statistics.json").write_text("{}")
    driver.publish()
    write_bytes(f"{place}/run/statistics.json", b"{ }")
    cache("second")
    with pytest.raises(StorageError, match="statistics.json is not the file that was written there.*rerun its stage"):
        RunStore(f"{place}/run").fetch("statistics.json")


def test_parts_are_checked_and_the_least_used_make_way(place, cache):
    writer = RunStore(f"{place}/run")
    names = [f"assignment/bucket=000/part-{number:05d}.arrow" for number in range(4)]
    ids = []
    for number, name in enumerate(names):
        (writer.local / name).parent.mkdir(parents=True, exist_ok=True)
        (writer.local / name).write_bytes(bytes([number]) * 1000)
        ids.append(file_id(writer.local / name))
        writer.put_part(name, ids[-1])
    folder = cache("second")
    reader = RunStore(f"{place}/run", cache_bytes=2500)

    def kept() -> list[int]:
        return sorted(path.read_bytes()[0] for path in folder.glob("runs/*/assignment/bucket=000/*"))

    for number in (0, 1, 0, 2):
        assert reader.part(names[number], ids[number]).read_bytes() == bytes([number]) * 1000
    assert kept() == [0, 2]  # 1 was used longest ago
    write_bytes(f"{place}/run/{names[3]}", b"half")
    with pytest.raises(StorageError, match="part-00003.arrow is damaged"):
        reader.part(names[3], ids[3])
    assert kept() == [0, 2]


def test_checkpoints_of_another_life_are_not_gone_on_with(place, cache):
    state = {"model": {"weight": torch.zeros(2)}}
    first = SharedCheckpoints(RunStore(f"{place}/run"), keep=3)
    for step in (5, 9):
        first.save(step, state, {"ids": {}})
    cache("second")
    other = SharedCheckpoints(RunStore(f"{place}/run"))
    assert other.about("newest").step == 9 and not list(other.folder.glob("step_*"))  # told, not brought
    assert other.newest().step == 9 and other.at(5).load("model")["weight"].tolist() == [0, 0]
    for name in list_files(f"{place}/run", recursive=True):
        remove_file(name)  # somebody began anew; both machines still have copies
    assert first.newest() is None and other.about("newest") is None
    other.newest()
    other.save(1, state, {"ids": {}})
    other.flush()
    assert first.newest().step == 1


def test_a_run_in_s3_needs_a_tracking_server(corpus, s3):
    with pytest.raises(ConfigError, match="set tracking.uri to a server, or tracking.enabled to false"):
        tiny_config(corpus, s3)
    with pytest.raises(ConfigError, match="those of a run at a URI are there already"):
        tiny_config(corpus, s3, tracking={"enabled": False}, train={"storage_path": "/copies"})


@pytest.mark.timeout(600)
def test_the_pipeline_leaves_all_in_s3_and_another_machine_goes_on(local_ray, corpus, place, cache):
    root = upload(corpus, f"{place}/corpus")
    sections = {"data": {"root": root}, "tracking": {"enabled": False}, "assign": {"materialize": True}}
    config = tiny_config(corpus, place, **sections, train={"num_workers": 1})
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
    longer = tiny_config(corpus, place, **sections, train={"num_workers": 1, "max_steps": 8})
    assert run_pipeline(longer, Console(quiet=True), ("train",)) == ["train"]
    lines = [json.loads(line) for line in read_range(f"{config.run_location}/metrics.jsonl", 0, 0).splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 9))  # it went on, and kept what was there
    assert os.environ["RAYTRAIN_CACHE"].endswith("second")
