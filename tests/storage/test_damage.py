"""Artifacts that change after they were written: detected when read, and made again by the next run."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import copied, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import pipeline_in_process

from raytrain.console import Console
from raytrain.data.assignment import (
    ROW_SCHEMA,
    Assignment,
    DamagedPartError,
    PartsWriter,
    note_name,
    part_name,
    write_index,
    write_note,
)
from raytrain.errors import ArtifactError, TrainingError
from raytrain.stages.pipeline import STAGES, run_pipeline
from raytrain.storage.artifacts import HashingFile, file_id, read_json
from raytrain.storage.filesystem import exists, read_range, write_bytes
from raytrain.storage.run_store import RunStore

OFTEN = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def run():
    with pipeline_in_process() as run:
        yield run


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    """A finished run of several chunks."""
    config = tiny_config(
        corpus,
        tmp_path_factory.mktemp("base"),
        tracking={"enabled": False},
        data={"chunk_bytes": 8192},
        assign={"materialize": True},
    )
    with pipeline_in_process() as run:
        run(config)
    return config


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_id(path) for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, fraction: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(fraction * len(data))] ^= 1
    path.write_bytes(data)


def read_all(assignment: Assignment) -> list:
    return [assignment.rows(bucket, range(rows)) for bucket, rows in enumerate(assignment.rows_per_bucket)]


PLACES = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize("stage", STAGES[:4], ids=lambda stage: stage.name)
@given(data=st.data())
@OFTEN
def test_a_changed_output_is_made_again(base, run, tmp_path_factory, stage, data):
    config = copied(base, tmp_path_factory.mktemp("flipped"))
    before = contents(config.run_dir)
    names = [path.relative_to(config.run_dir) for name in stage.outputs for path in config.run_dir.glob(name)]
    flip(config.run_dir / data.draw(st.sampled_from(sorted(names))), data.draw(PLACES))
    assert run(config) == [stage.name]
    after = contents(config.run_dir)
    assert {name: after[name] for name in before if name != "config.yaml"} == {
        name: identity for name, identity in before.items() if name != "config.yaml"
    }


@given(data=st.data())
@OFTEN
def test_a_changed_part_is_an_error_and_its_chunk_is_reassigned(base, run, tmp_path_factory, data):
    config = copied(base, tmp_path_factory.mktemp("damaged"))
    folder = config.run_dir / "assignment"
    before = contents(folder)
    rows = read_all(Assignment(folder))
    path = data.draw(st.sampled_from(sorted([*folder.glob("bucket=*/*.arrow"), *folder.glob("parts/*.json")])))
    how = data.draw(st.sampled_from(["flip", "cut", "empty", "remove", "other"]))
    if how == "flip":
        flip(path, data.draw(PLACES))
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-2])  # more than a note's last line feed
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "remove":
        path.unlink()
    else:
        different = [part for part in path.parent.parent.rglob(f"*{path.suffix}") if file_id(part) != file_id(path)]
        shutil.copy(data.draw(st.sampled_from(sorted(different))), path)
    with pytest.raises(DamagedPartError, match="changed after they were written.*run the same command again"):
        read_all(Assignment(folder))
    finished = {path.name: path.stat().st_mtime_ns for path in (folder / "parts").iterdir()}
    assert run(config) == ["assign"]
    assert contents(folder) == before and read_all(Assignment(folder)) == rows
    # Undamaged chunks are left alone.
    assert {name: (folder / "parts" / name).stat().st_mtime_ns for name in finished} == finished
    assert run(config) == []


def test_a_part_is_hashed_once(base, tmp_path, monkeypatch):
    assignment = Assignment(copied(base, tmp_path).run_dir / "assignment")
    monkeypatch.setattr("raytrain.data.assignment.reading._MAX_OPEN_PARTS", 1)
    read_all(assignment)
    monkeypatch.setattr("raytrain.data.assignment.parts.content_id", lambda data: pytest.fail("hashed again"))
    read_all(assignment)


@given(st.lists(st.binary(max_size=100)))
def test_a_file_is_hashed_while_it_is_written(tmp_path_factory, blocks):
    path = tmp_path_factory.mktemp("hashed") / "file"
    with open(path, "wb") as file:
        hashing = HashingFile(file)
        assert [hashing.write(block) for block in blocks] == list(map(len, blocks))
        assert hashing.tell() == sum(map(len, blocks))
    assert hashing.id == file_id(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
DOCUMENT = st.fixed_dictionaries({}, optional={name: JSON for name in ("id", "body", "parents")})


@given(
    st.binary()
    | JSON.map(lambda value: json.dumps(value).encode())
    | DOCUMENT.map(lambda value: json.dumps({"format": "x/1", **value}).encode())
    | st.sampled_from([b"[" * 100_000, b'{"format": "x/1", "id": 1, "body": ' + b"[" * 900 + b"]" * 900 + b"}"])
)
def test_an_invalid_artifact_is_a_readable_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("no") / "artifact.json"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="to do: "):
        read_json(path, "x/1")


# --- at a URI


ROW = {
    "audio_path": "/a.wav",
    "audio_start": 0,
    "audio_size": 0,
    "offset_ms": 0,
    "duration_ms": 1,
    "text": "one",
    "corpus": "all",
    "language": "en",
    "prompt_length": 1,
    "tokens": [1, 2],
}


@pytest.fixture
def remote(s3, request, tmp_path, monkeypatch):
    """An assignment of one part at a URI, and a cache of this machine without it."""
    uri = f"{s3}/damage/{request.node.name}"
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "writer"))
    writer = RunStore(uri)
    with PartsWriter(writer.local / "assignment", 0) as parts:
        parts.write(0, pa.Table.from_pylist([ROW], schema=ROW_SCHEMA))
    note = parts.note("all")
    for name, identity in note.files.items():
        writer.put_part(f"assignment/{name}", identity)
    write_note(writer.location_of(f"assignment/{note_name(0)}"), note)
    write_index(writer.local / "assignment", [note], [(10, 10)], 1, {"bucket_plan": "none"})
    writer.publish()
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "reader"))
    return RunStore(uri)


def open_at(store: RunStore) -> Assignment:
    store.fetch("assignment/index.json")
    return Assignment(store.local / "assignment", store)


def test_a_damaged_copy_in_the_cache_is_brought_again(remote):
    assert open_at(remote).row(0, 0).text == "one"
    (copy,) = remote.local.glob("assignment/bucket=000/*.arrow.*")
    flip(copy, 0.5)
    assert open_at(remote).row(0, 0).text == "one"
    assert exists(remote.location_of(f"assignment/{note_name(0)}"))


def test_a_damaged_part_at_a_uri_voids_its_chunk(remote):
    uri = remote.location_of(f"assignment/{part_name(0, 0)}")
    write_bytes(uri, read_range(uri, 0, 0)[:-1] + b"x")
    with pytest.raises(DamagedPartError, match="is damaged.*run the same command again"):
        open_at(remote).row(0, 0)
    assert remote.names("assignment/parts", "*.json") == set()


# --- in training


@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers, max_failures", [("threads", 3), ("ray", 0)])
def test_training_ends_at_once_and_the_next_run_repairs_it(copy_of, workers, max_failures):
    config = copy_of("damaged", train={"num_workers": 1, "max_failures": max_failures}, data={"workers": workers})
    rows = read_all(Assignment(config.run_dir / "assignment"))
    for path in config.run_dir.glob("assignment/bucket=*/*.arrow"):
        data = bytearray(path.read_bytes())
        tokens = pa.ipc.open_file(path).read_all()["tokens"].combine_chunks().values.to_numpy()[:8].tobytes()
        data[data.find(tokens) + 4 * 3 + 2] ^= 0x10  # a token and 2^20 more
        path.write_bytes(data)
    # A worker's own error would recur in each of four attempts; the second attempt stops at a note.
    with pytest.raises(TrainingError, match="were changed after they were written.*run the same command again"):
        run_pipeline(config, Console(quiet=True), ("train",))
    assert run_pipeline(config, Console(quiet=True), ("assign",)) == ["assign"]
    assert read_all(Assignment(config.run_dir / "assignment")) == rows
