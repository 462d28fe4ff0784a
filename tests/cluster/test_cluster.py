"""Nodes that share nothing but S3 and a tracking server, and what goes wrong in the middle of a pipeline.

One pipeline runs undisturbed. Another one loses a node while it assigns and one while it trains, its driver is killed
twice, S3 refuses in both stages, and the tracking server once. Both must give the same results.
"""

import json
import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pytest
from conftest import Nodes, tiny_values, upload
from disturbed_cluster import Disturbed, Door, tracked_steps, tracking_server

from raytrain.config import check_config
from raytrain.console import Console
from raytrain.stages.pipeline import run_pipeline
from raytrain.storage.filesystem import list_files, read_range
from raytrain.storage.locations import locate

pytestmark = pytest.mark.timeout(900)
STEPS, COPIES = 60, 10


@pytest.fixture(scope="module")
def values(corpus, s3) -> dict[str, Any]:
    """Configuration of both runs but for their names, placement and tracking."""
    root = upload(corpus, f"{s3}/cluster/corpus")
    filesystem, name = locate(f"{root}/many.jsonl")
    with filesystem.open_output_stream(name) as file:
        file.write((corpus / "train.jsonl").read_bytes() * COPIES)
    return tiny_values(
        corpus,
        f"{s3}/cluster",
        data={"root": root, "train": ["many.jsonl"], "chunk_bytes": 12 << 10},
        assign={"materialize": True},
        train={
            "num_workers": [1, 2],
            "max_steps": STEPS,
            "validate_every_steps": STEPS,
            "checkpoint_every_steps": 10,
            "max_failures": 5,
            "learning_rate": 1e-4,
        },
    )


@pytest.fixture(scope="module")
def calm(values, s3, local_ray) -> dict[str, Any]:
    """The run that nothing happened to, and where it is in S3."""
    config = check_config({**values, "name": "calm", "tracking": {"enabled": False}})
    run_pipeline(config, Console(quiet=True))
    return {"place": f"{s3}/cluster/calm"}


@pytest.fixture(scope="module")
def disturbed(values, s3, local_ray, tmp_path_factory) -> dict[str, Any]:
    """The run that much happened to: where it is in S3, what was done, and what the tracking server has of it."""
    folder, nodes = tmp_path_factory.mktemp("disturbed"), Nodes()
    with tracking_server(folder) as port:
        store, tracking = Door(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])), Door(port)
        mine = {
            "name": "disturbed",
            "tracking": {"uri": f"http://127.0.0.1:{tracking.port}", "experiment": "disturbed"},
            "cluster": {"train_resources": {"apart": 1}, "data_resources": {"apart": 0.01}},
        }
        try:
            pipeline = Disturbed({**values, **mine}, folder, nodes, store, tracking)
            pipeline.run()
        finally:
            nodes.remove_all()
            store.shut()
            tracking.shut()
        steps = tracked_steps(port, "disturbed")
    return {
        "place": f"{s3}/cluster/disturbed",
        "done": pipeline.done,
        "attempts": pipeline.attempts,
        "tracked_steps": steps,
    }


def content(run: dict, name: str) -> bytes:
    return read_range(f"{run['place']}/{name}", 0, 0)


def assigned_rows(run: dict) -> list[str]:
    """All rows with their bucket and the bytes of their copied audio, in one order."""
    rows = []
    for part in list_files(f"{run['place']}/assignment", "part-*.arrow", recursive=True):
        table = pa.ipc.open_file(pa.BufferReader(read_range(part, 0, 0))).read_all()
        bucket = part.split("/")[-2]
        tars = {path: content(run, f"assignment/{path}") for path in set(table["audio_path"].to_pylist())}
        for row in table.to_pylist():
            audio = tars[row.pop("audio_path")][row["audio_start"] : row["audio_start"] + row["audio_size"]]
            rows.append(json.dumps([bucket, row, hash(audio)], sort_keys=True))
    return sorted(rows)


def test_it_was_disturbed_as_often_as_meant(disturbed):
    assert disturbed["done"] == [
        "assign: S3 refuses",
        "assign: node lost",
        "assign: driver killed",
        "train: node lost",
        "train: S3 refuses",
        "train: tracking refuses",
        "train: driver killed",
    ]
    assert disturbed["attempts"] == 3


def test_artifacts_are_the_same_bytes(calm, disturbed):
    for name in ("statistics.json", "bucket_plan.json", "batch_profile.json", "assignment/index.json"):
        assert content(calm, name) == content(disturbed, name), name


def test_every_row_is_assigned_once_with_its_audio(calm, disturbed):
    rows = assigned_rows(disturbed)
    assert len(rows) == COPIES * 96 and rows == assigned_rows(calm)


def test_training_took_the_same_steps_with_the_same_losses(calm, disturbed):
    def losses(run: dict) -> np.ndarray:
        lines = map(json.loads, content(run, "metrics.jsonl").splitlines())
        steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        assert [step for step, _ in steps] == list(range(1, STEPS + 1))  # none lost, none twice
        return np.array([loss for _, loss in steps])

    # With one node less the survivor adds its gradients up in another order.
    np.testing.assert_allclose(losses(calm), losses(disturbed), rtol=1e-3)


def test_the_model_is_scored_and_tracked(calm, disturbed):
    scores = [json.loads(content(run, "scores.json"))["body"] for run in (calm, disturbed)]
    assert scores[0]["utterances"] == scores[1]["utterances"] == 10
    assert disturbed["tracked_steps"] == list(range(1, STEPS + 1))
