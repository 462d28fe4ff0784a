"""For any JSON in a state file, its reader skips it, makes it again or raises a readable error."""

import contextlib
import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytrain.config import check_config
from raytrain.data.assignment import INDEX_FORMAT, NOTE_FORMAT, Assignment, ChunkNote, part_name
from raytrain.data.corpora.types import Chunk
from raytrain.data.quarantine import Quarantine
from raytrain.data.stream import StreamState
from raytrain.data.text.tokenizer import CanaryTokenizer, train_tokenizer
from raytrain.errors import ArtifactError, CheckpointError, ProfileError, RaytrainError, StorageError, TrainingError
from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.plan import BucketSettings, make_plan
from raytrain.lengths.profile import BatchProfile, ProbeSetting
from raytrain.lengths.schedule import BatchSchedule, ScheduleState
from raytrain.model.config import ModelConfig
from raytrain.report.page import write_report
from raytrain.run_folder.assigned_chunks import standing_note
from raytrain.run_folder.batches import corpus_repeats
from raytrain.run_folder.chunks import numbered_chunks
from raytrain.run_folder.documents import CHUNKS_FORMAT, Artifact
from raytrain.run_folder.histograms import read_histogram, write_histogram
from raytrain.run_folder.lineage import noted_lineage
from raytrain.run_folder.probe_answers import read_answers
from raytrain.run_folder.workspace import Workspace
from raytrain.stages import pipeline
from raytrain.storage.artifacts import content_id, lines_of, parse_json, read_json, read_state
from raytrain.storage.finished import FinishedParts
from raytrain.storage.run_store import RunStore
from raytrain.tracking import read_metrics
from raytrain.tracking.metrics_file import keep_metrics_until
from raytrain.tracking.runs import RunTracking
from raytrain.training.checkpoint import CheckpointFolder, read_checkpoint
from raytrain.training.conversion import model_config_of
from raytrain.training.faults import FaultNotes
from raytrain.training.memory.coordinator import Answer, ProbeJob, Task, answers_to_json
from raytrain.training.memory.meter import Probe
from raytrain.training.run_notes import error_in_note
from raytrain.training.settings import TrainSettings

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([-1, 0, 10**30, ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NO_JSON = st.binary(max_size=30) | st.sampled_from(
    [
        b"",
        b"null",
        b"7",
        b"[]",
        b"{",
        "{}".encode("utf-16"),
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"9" * 9000,
        b"\xff\xfe",
    ]
)
QUICK = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def spoiled(draw, document: Any) -> Any:
    """A JSON value that differs from `document` in one or two positions."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        holder, key, node = None, None, document
        while isinstance(node, dict | list) and node and draw(st.integers(0, 4)):
            holder, key = node, draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            node = node[key]
        if holder is None:
            document = draw(JSON)
        elif isinstance(holder, dict) and draw(st.integers(0, 3)) == 0:
            del holder[key]
        else:
            holder[key] = draw(JSON)
    return document


def forged(format: str, body: Any) -> bytes:
    """An artifact with a correct id, as by an attacker."""
    document = {"format": format, "id": "", "parents": {"bucket_plan": "p"}, "body": body}
    with contextlib.suppress(ValueError):  # NaN has no id
        document["id"] = content_id({"format": format, "body": body})
    return json.dumps(document).encode()


# --- files of a run folder


def histogram() -> LengthHistogram:
    return LengthHistogram.from_lengths(np.arange(1000, 9000, 500), np.arange(10, 26))


PLAN = make_plan(histogram(), BucketSettings(2, 1), "h")
SIZES = tuple(4 for _ in PLAN.grid.buckets)
SETTING = ProbeSetting("m", "adamw", "fp32", False, "cpu", 1.0, 0.9, 1, "2")
PROFILE = BatchProfile("p", SETTING, SIZES, tuple(1.0 for _ in SIZES), tuple(1 for _ in SIZES))
STATISTICS = {
    "rows": 4,
    "histogram_id": "h",
    "by_corpus": {"train": {"hours": 1.0, "utterances": 3, "languages": ["en"]}},
    "rejected_examples": [],
}
CHUNK = Chunk("/a.jsonl", 0, 9, 0, "train")
NOTE = {
    "chunk": 0,
    "corpus": "train",
    "rows": {"0": 2, "1": 2},
    "rejected": {"too_long": 1},
    "examples": {"too_long": [{"file": "/a.jsonl", "line": 3, "detail": "d"}]},
    "files": {part_name(bucket, 0): "id" for bucket in (0, 1)},
}
INDEX = {
    "buckets": [[2], [2]],
    "corpora": [["train", 1]],
    "rows": 4,
    "rows_id": "i",
    "notes": ["n"],
    "rejected": {"too_long": 1},
    "grid": [[1000, 5], [2000, 9]],
    "rejected_examples": [{"corpus": "train", "reason": "too_long", "rows": 1, "first": NOTE["examples"]["too_long"]}],
}
JOB = ProbeJob(
    ModelConfig(), TrainSettings(), "cpu", 1000, ((1000, 10), (2000, 20)), ((1.0, 1.0), (1.0, 2.0)), 16, 0.05, 1, 2, 1
)
ANSWERS = [Answer(Task("search", 0, 4), (Probe(4, True, 500, 0.1),), seconds=1.0)]
META = {
    "format": "raytrain.checkpoint/1",
    "step": 2,
    "schedule": {"epoch": 0, "positions": [3, 4]},
    "seconds": 1.0,
    "audio_seconds": 2.0,
    "ids": {"lineage": "l"},
    "model": {},
}
BEST = {"step": 1, "error": 0.5, "kept": [{"step": 1, "error": 0.5}]}
LOWERED = {"bucket": 0, "failed": 4, "batch_size": 3, "why": "memory", "profile": "p"}


def a_config(folder: Path):
    values = tiny_values(folder / "corpus", folder / "runs")
    values["data"]["temperature"] = 2.0
    return check_config(values)


@dataclass
class File:
    """A state file: its valid content, and its reader. A file that `may_be_refused` may raise a readable error, any
    other is skipped."""

    name: str
    content: Any
    read: Callable[[Path], Any]
    format: str = ""  # of an artifact
    may_be_refused: bool = False

    def data(self, value: Any) -> bytes:
        return forged(self.format, value) if self.format else json.dumps(value).encode()


def checkpoints(folder: Path) -> CheckpointFolder:
    return CheckpointFolder(folder / "checkpoints")


def read_best(folder: Path) -> Any:
    kept = checkpoints(folder)
    kept.best_note(), kept.best(), kept._prune()
    return kept.mark_best(2, 0.25)


def read_faults(folder: Path) -> Any:
    notes = FaultNotes(folder / "faults", "p")
    notes.stalls(0.0), notes.reasons()
    assert all(size >= 1 for size in notes.lowered((4, 4)))
    assert notes.validation_size(8) >= 1


def read_mlflow(folder: Path) -> Any:
    note = RunTracking(a_config(folder), folder)._note()
    return (note.stages.get("train"), note.run_id) if note else (None, None)


def read_workspace(read: Callable[[Workspace], Any]) -> Callable[[Path], Any]:
    def call(folder: Path) -> Any:
        workspace = Workspace(a_config(folder), folder)
        workspace.model_id = lambda: "m"
        return read(workspace)

    return call


def read_profiles(workspace: Workspace) -> Any:
    workspace._plan_document = Artifact("p", None)
    return workspace.profiles()


def read_assignment(folder: Path) -> Any:
    assignment = Assignment(folder)
    return assignment.rows_by_corpus, assignment.rows_per_bucket, assignment.edges


def read_files(folder: Path) -> Any:
    store = RunStore("memory://bucket/run")
    store.refresh = lambda name: folder / name
    return store._published()


def read_stages(folder: Path) -> Any:
    done = pipeline.read_stages(folder)
    return [pipeline._is_current(folder, stage, done.get(stage.name), "k") for stage in pipeline.STAGES]


def read_metrics_file(folder: Path) -> Any:
    for line in read_metrics(folder / "metrics.jsonl"):
        assert line["step"] >= 0
    keep_metrics_until(folder / "metrics.jsonl", 2)


FILES = [
    File("stages.json", {"train": {"key": "k", "outputs": {"checkpoints/last.json": "i"}}}, read_stages),
    File("checkpoints/best.json", BEST, read_best),
    File("checkpoints/lineage.json", {"lineage": "l"}, lambda f: noted_lineage(f / "checkpoints/lineage.json")),
    File("faults/lowered-1.json", LOWERED, read_faults),
    File("faults/validation-1.json", {"batch_size": 3}, read_faults),
    File("faults/stalled-1.json", {"doing": "x", "time": 1.0}, read_faults),
    File("faults/placement-group", "00ff", lambda f: read_state(f / "faults/placement-group", str)),
    File("gave_up.json", {"what": "w", "got": None, "why": "y"}, lambda f: str(error_in_note(f / "gave_up.json"))),
    File("note.json", NOTE, lambda f: standing_note(f / "note.json", CHUNK, PLAN), NOTE_FORMAT),
    File(
        "batch_probes.json",
        {"jobs": {JOB.id: answers_to_json(ANSWERS)}},
        lambda f: read_answers(f / "batch_probes.json", JOB),
    ),
    File("mlflow_run.json", {"uri": "u", "run_id": "r", "stages": {"train": "t"}}, read_mlflow),
    File("metrics.jsonl", {"step": 1, "time_s": 0.5, "loss": 1.0}, read_metrics_file),
    File("index.json", INDEX, read_assignment, INDEX_FORMAT, True),
    File(
        "bucket_plan.json", {"plan": PLAN.to_body()}, read_workspace(lambda w: w.plan), "raytrain.bucket_plan/1", True
    ),
    File(
        "batch_profile.json",
        {"profiles": [PROFILE.to_body()]},
        read_workspace(read_profiles),
        "raytrain.batch_profile/2",
        True,
    ),
    File(
        "statistics.json",
        STATISTICS,
        read_workspace(lambda w: corpus_repeats(w, ("train",))),
        "raytrain.statistics/4",
        True,
    ),
    File(
        "chunks.json",
        [{"path": "/a", "start": 0, "end": 9}],
        read_workspace(lambda w: numbered_chunks(w, [CHUNK])),
        CHUNKS_FORMAT,
        True,
    ),
    File("files.json", {"a/b.json": "i"}, read_files, "raytrain.run_files/1", True),
]


def write(folder: Path, name: str, data: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def read_whatever(file: File, folder: Path, data: bytes) -> None:
    write(folder, file.name, data)
    try:
        file.read(folder)
    except RaytrainError as error:
        assert file.may_be_refused and error.remedy, error


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_was_written_is_read(tmp_path, file):
    write(tmp_path, file.name, file.data(file.content))
    file.read(tmp_path)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
@QUICK
@given(data=st.data())
def test_any_json_is_passed_over_or_refused_readably(tmp_path, file, data):
    read_whatever(file, tmp_path, file.data(data.draw(spoiled(file.content))))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
@settings(QUICK, max_examples=30)
@given(data=NO_JSON)
def test_any_bytes_are_passed_over_or_refused_readably(tmp_path, file, data):
    read_whatever(file, tmp_path, data)


def test_the_answers_of_a_job_survive(tmp_path):
    """The checks reject no valid file."""
    by_name = {file.name: file for file in FILES}
    for name in ("batch_probes.json", "note.json", "mlflow_run.json", "stages.json"):
        write(tmp_path, name, by_name[name].data(by_name[name].content))
    assert read_answers(tmp_path / "batch_probes.json", JOB) == ANSWERS
    assert standing_note(tmp_path / "note.json", CHUNK, PLAN) == ChunkNote.from_dict(NOTE)
    assert standing_note(tmp_path / "note.json", replace(CHUNK, index=1), PLAN) is None
    assert pipeline.read_stages(tmp_path)["train"].key == "k"
    for content in ("[]", "7", '{"train": 5}', '{"train": {"key": "x"}}', "null"):
        (tmp_path / "stages.json").write_text(content)
        assert pipeline.read_stages(tmp_path) == {}


# --- checkpoints


@pytest.fixture
def two_checkpoints(tmp_path) -> CheckpointFolder:
    kept = checkpoints(tmp_path)
    meta = {name: META[name] for name in ("schedule", "seconds", "audio_seconds", "ids", "model")}
    for step in (1, 2):
        kept.save(step, {"model": {"w": torch.ones(2)}, "optimizer": {}}, meta)
    return kept


@QUICK
@given(data=st.data())
def test_a_checkpoint_with_an_invalid_meta_is_skipped(two_checkpoints, data):
    path = two_checkpoints.folder / "step_00000002" / "meta.json"
    whole = path.read_bytes()
    try:
        meta = data.draw(spoiled(json.loads(whole)))
        path.write_bytes(json.dumps(meta).encode())
        newest, folder = two_checkpoints.newest(), path.parent
        assert newest is not None and newest.folder.name in ("step_00000001", folder.name)
        if (state := newest.meta.get("schedule")) and "positions" in state:
            assert ScheduleState.from_dict(state).epoch >= 0
        elif state:
            assert StreamState.from_dict(state).epoch >= 0
        newest.meta.get("ids", {}).get("lineage"), newest.meta.get("seconds", 0.0) / 60, newest.has("average")
        with contextlib.suppress(CheckpointError):
            model_config_of(newest.meta)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "change",
    [
        {"step": None},
        {"step": "2"},
        {"step": -1},
        {"step": True},
        {"schedule": {"x": 1}},
        {"schedule": {"epoch": 0}},
        {"schedule": {"epoch": 0, "positions": [1, "2"]}},
        {"seconds": "x"},
        {"ids": []},
        {"files": {}},
        {"model": 3},
        {"files": {"../model.pt": "x"}},
        {"format": "raytrain.checkpoint/0"},
    ],
    ids=str,
)
def test_the_older_checkpoint_takes_the_place_of_a_broken_one(two_checkpoints, change):
    path = two_checkpoints.folder / "step_00000002" / "meta.json"
    path.write_bytes(json.dumps({**json.loads(path.read_bytes()), **change}).encode())
    assert read_checkpoint(path.parent) is None
    assert two_checkpoints.newest().step == 1
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        two_checkpoints.at(2)


@pytest.mark.parametrize("note", ['{"step":"20","error":0.1}', '{"step":-1,"error":0.1}', "[]", '{"step":1}', "{"])
def test_a_broken_note_of_the_best_checkpoint_means_the_newest(two_checkpoints, note):
    (two_checkpoints.folder / "best.json").write_text(note)
    assert two_checkpoints.best_note() is None
    assert two_checkpoints.best().step == 2
    assert two_checkpoints.mark_best(1, 0.5) and two_checkpoints.best().step == 1


def test_a_schedule_resumes_only_from_a_state_of_its_buckets():
    schedule = BatchSchedule(1, (10, 10), (2, 2))
    assert schedule.restored({"epoch": 1, "positions": [3, 4]}) == ScheduleState(1, (3, 4))
    for values in ({"epoch": 1, "positions": [3]}, {"epoch": 0, "segments": []}):
        with pytest.raises(ArtifactError) as caught:
            schedule.restored(values)
        assert caught.value.remedy
    with pytest.raises(ArtifactError):
        StreamState.from_dict({"epoch": 0, "positions": [1]})


# --- other files


@settings(QUICK, max_examples=60)
@given(
    texts=st.lists(st.text(alphabet="0123456789 -x", max_size=30) | st.text(max_size=20), max_size=4),
    kills=st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)
def test_torn_marks_of_dead_workers_are_passed_over(tmp_path, texts, kills):
    notes = FaultNotes(tmp_path, "p")
    notes.note_kill_for_memory()
    notes.learn_from_deaths(kills, [*texts, "1 2 0 8 0 host"])
    assert all(size >= 1 for size in notes.lowered((16, 16)))


@settings(QUICK, max_examples=60)
@given(data=st.data())
def test_a_part_with_an_invalid_header_is_made_again(tmp_path, data):
    parts = FinishedParts(tmp_path / "out.jsonl", "k")
    parts.write(0, "r", [b'{"a": 1}'], 0)
    head, _, body = parts._path(0).read_bytes().partition(b"\n")
    parts._path(0).write_bytes(json.dumps(data.draw(spoiled(json.loads(head)))).encode() + b"\n" + body)
    read = parts.find(0, "r")
    assert read is None or all(isinstance(number, int) for number in read)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer({"en": ["one two three four five"] * 5}, 20, folder)
    return folder


@settings(QUICK, max_examples=60)
@given(data=st.data())
def test_a_tokenizer_is_read_or_refused(tokenizer_folder, data):
    path = tokenizer_folder / "tokenizer.json"
    whole = path.read_bytes()
    try:
        document = json.loads(whole)
        path.write_bytes(forged(document["format"], data.draw(spoiled(document["body"]))))
        with contextlib.suppress(RaytrainError):
            CanaryTokenizer.load(tokenizer_folder)
    finally:
        path.write_bytes(whole)


@settings(QUICK, max_examples=60)
@given(offset=st.integers(0, 2000), value=st.binary(min_size=1, max_size=8))
def test_a_damaged_histogram_is_refused(tmp_path, offset, value):
    path = tmp_path / "histogram.parquet"
    write_histogram(path, histogram())
    data = bytearray(path.read_bytes())
    data[offset % len(data) : offset % len(data) + len(value)] = value
    path.write_bytes(data)
    try:
        read_histogram(path)
    except ArtifactError as error:
        assert error.remedy


@settings(QUICK, max_examples=40)
@given(data=st.data())
def test_the_report_is_written_for_any_content_of_the_run_folder(tmp_path, data):
    bodies = {
        "statistics": {"utterances": 3, "hours": 1.0, **STATISTICS},
        "bucket_plan": {"plan": PLAN.to_body()},
        "batch_profile": {"profiles": [PROFILE.to_body()]},
        "scores": {"utterances": 2, "wer": 0.5, "wer_ci": [0.1, 0.9], "cer": 0.1, "cer_ci": [0, 1], "bleu": {}},
        "assignment/index": INDEX,
    }
    spoil = data.draw(st.sampled_from(sorted(bodies)))
    for name, body in bodies.items():
        write(tmp_path, f"{name}.json", forged("x", data.draw(spoiled(body)) if name == spoil else body))
    lines = data.draw(st.lists(spoiled({"step": 1, "time_s": 0.5, "loss": 1.0, "wer": 0.5, "lang": "en"}), max_size=3))
    for name in ("metrics.jsonl", "hypotheses.jsonl"):
        write(tmp_path, name, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    assert write_report(tmp_path, tmp_path / "report.html", title="t").exists()


def test_a_missing_reason_to_give_up_is_said_too(tmp_path):
    (tmp_path / "gave_up.json").write_text("[1]")
    assert isinstance(error_in_note(tmp_path / "gave_up.json"), TrainingError)
    assert "see the messages above" in str(error_in_note(tmp_path / "gave_up.json"))


@given(JSON)
def test_json_is_finite_or_refused(value):
    try:
        assert parse_json(json.dumps(value).encode()) == value
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[1,2]", "another format; got list"),
        (b'{"format":"x/1"}', "changed after it was written"),
        (b"[" * 2_000_000, "nested too deeply"),
        (b'{"format": "x/1", "body": NaN}', "NaN is not a number"),
        (b'{"format": ["x"]}', "another format; got dict"),
        (b"\xff", "can't be read"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_artifact_that_is_none_is_refused(tmp_path, data, message):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_json(tmp_path / "a.json", "x/1")
    assert "delete it" in caught.value.remedy


def test_a_profile_needs_as_many_numbers_of_each_kind():
    with pytest.raises(ProfileError, match="differ in length"):
        replace(PROFILE, num_probes=(1,))


def test_pipes_and_folders_are_skipped_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder"):
        assert read_state(path, dict[str, int]) is None
        assert lines_of(path) == [] and read_metrics(path) == []
        with pytest.raises(ArtifactError, match="can't be read"):
            read_json(path, "example/1")
    (tmp_path / "pipe").rename(tmp_path / "ablation.json")
    assert write_report(tmp_path, tmp_path / "report.html", title="t").exists()


def test_a_quarantine_that_can_not_be_written_says_so(tmp_path):
    with pytest.raises(StorageError, match="can't write.*is a directory"):
        Quarantine(tmp_path).add_lines([{"audio_path": "a", "audio_start": 0, "offset_ms": 0, "error": "x"}])
