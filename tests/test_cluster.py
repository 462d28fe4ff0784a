"""Three nodes that share nothing but S3 and a tracking server, and what goes wrong in the middle of a pipeline.

One pipeline runs undisturbed. Another one loses a node while it assigns and one while it trains, its driver is killed
twice, S3 refuses for 20 s in both stages, and the tracking server is restarted. Both must come to the same. The cluster
runs in a process of its own, beside the one of the other tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pytest
from conftest import tiny_values, upload

from raytrain.data.storage import list_files, locate, read_range

pytestmark = pytest.mark.timeout(900)
STEPS = 60
HELPER = Path(__file__).with_name("disturbed_cluster.py")


@pytest.fixture(scope="module")
def runs(corpus, s3, tmp_path_factory):
    """`run(name)`: what a pipeline on three nodes left in S3, and what was done to it."""
    folder = tmp_path_factory.mktemp("cluster")
    lines = (corpus / "train.jsonl").read_bytes()
    root = upload(corpus, f"{s3}/cluster/corpus")
    filesystem, name = locate(f"{root}/many.jsonl")
    with filesystem.open_output_stream(name) as file:
        file.write(lines * 30)

    def run(name: str) -> dict:
        values = tiny_values(
            corpus, f"{s3}/cluster",
            data={"root": root, "train": ["many.jsonl"], "chunk_bytes": 16384},
            assign={"materialize": True},
            train={
                "num_workers": [1, 2], "max_steps": STEPS, "validate_every_steps": STEPS, "checkpoint_every_steps": 10,
                "max_failures": 5, "learning_rate": 1e-4,
            },
            tracking={"uri": "TRACKING", "experiment": name},
        )  # fmt: skip
        values["name"] = name
        (folder / f"{name}.json").write_text(json.dumps(values))
        command = [sys.executable, str(HELPER), name, str(folder / f"{name}.json"), str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=800, env={**os.environ})
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        return {"place": f"{s3}/cluster/{name}", **json.loads(done.stdout.splitlines()[-1])}

    return {name: run(name) for name in ("calm", "disturbed")}


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


def test_it_was_disturbed_as_often_as_meant(runs):
    assert runs["calm"]["done"] == []
    assert runs["disturbed"]["done"] == [
        "assign: S3 refuses", "assign: node lost", "assign: driver killed", "train: node lost", "train: S3 refuses",
        "train: tracking restarted", "train: driver killed",
    ]  # fmt: skip
    assert runs["calm"]["attempts"] == 1 and runs["disturbed"]["attempts"] == 3


def test_artefacts_are_the_same_bytes(runs):
    calm, disturbed = runs["calm"], runs["disturbed"]
    for name in ("statistics.json", "bucket_plan.json", "batch_profile.json", "assignment/index.json"):
        assert content(calm, name) == content(disturbed, name), name


def test_every_row_is_assigned_once_with_its_audio(runs):
    rows = assigned_rows(runs["disturbed"])
    assert len(rows) == 30 * 96 and rows == assigned_rows(runs["calm"])


def test_training_took_the_same_steps_with_the_same_losses(runs):
    def losses(run: dict) -> np.ndarray:
        lines = map(json.loads, content(run, "metrics.jsonl").splitlines())
        steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        assert [step for step, _ in steps] == list(range(1, STEPS + 1))  # none lost, none twice
        return np.array([loss for _, loss in steps])

    # With one node less the survivor adds its gradients up in another order.
    np.testing.assert_allclose(losses(runs["calm"]), losses(runs["disturbed"]), rtol=1e-3)


def test_the_model_is_scored_and_tracked(runs):
    scores = [json.loads(content(runs[name], "scores.json"))["body"] for name in ("calm", "disturbed")]
    assert scores[0]["utterances"] == scores[1]["utterances"] == 10
    assert runs["disturbed"]["tracked_steps"] == list(range(1, STEPS + 1))
