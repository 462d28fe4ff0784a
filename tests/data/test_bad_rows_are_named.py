"""If no row of a stream or a step is usable, the error says which rows and why."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import tiny_config
from in_process import pipeline_in_process

from raytrain.console import Console
from raytrain.data.assignment import Row
from raytrain.data.corpora.reading import plan_chunks
from raytrain.data.corpora.types import Corpus
from raytrain.data.loader import StepReader
from raytrain.data.quarantine import Quarantine
from raytrain.data.sequences import BlockEncoder
from raytrain.data.stream import StreamSampler, StreamState
from raytrain.data.text.tokenizer import train_tokenizer
from raytrain.data.work import StepWork
from raytrain.errors import DataError, ManifestError
from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.plan import BucketSettings, make_plan
from raytrain.lengths.schedule import StepPlan
from raytrain.run_folder.scored_rows import checked_split
from raytrain.run_folder.workspace import Workspace
from raytrain.stages import pipeline

GOOD = {"audio_filepath": "/a.wav", "duration": 1.0, "text": "one two", "lang": "en"}


@pytest.fixture(scope="module")
def encoder():
    return BlockEncoder(train_tokenizer({"en": ["one two three"] * 9}, 40), "canary2")


def stream(path, encoder, rows) -> StreamSampler:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    lengths = LengthHistogram.from_lengths(np.array([500, 1000, 2000]), np.array([12, 13, 17]))
    plan = make_plan(lengths, BucketSettings(2, 1, max_duration_ms=3000, tps_sigma=None), "", None)
    return StreamSampler(plan_chunks([Corpus("talks", str(path))]), encoder, plan, [4, 3], 2, seed=1, num_epochs=1)


def test_a_stream_without_a_usable_row_names_the_first_of_each_reason(tmp_path, encoder):
    path = tmp_path / "m.jsonl"
    rows = ["{oops", {**GOOD, "text": " "}, {**GOOD, "duration": 900}, {**GOOD, "lang": "fr"}]
    with pytest.raises(ManifestError, match="no row that fits a bucket") as error:
        list(stream(path, encoder, rows).steps(StreamState()))
    for line, reason in enumerate(["bad_json", "empty_text", "too_long", "unknown_language"], 1):
        assert f"corpus talks: {path}:{line}: {reason}: " in str(error.value)
    assert "900000 ms" in error.value.remedy
    with pytest.raises(ManifestError, match=f"no rows in {path}|no rows in no files"):
        list(stream(path, encoder, []).steps(StreamState()))
    assert len(list(stream(path, encoder, [*rows, GOOD]).steps(StreamState()))) == 1


def test_a_step_without_a_readable_recording_says_what_is_wrong_with_it(tmp_path):
    rows = [Row(f"{tmp_path}/{number}.wav", 0, 1200, "a", "en", 1, (1, 2)) for number in range(2)]
    reader = StepReader([(2000, 20)], sample_rate=16000, pad_id=0, quarantine=Quarantine(None))
    work = StepWork(StepPlan(0, 0, (2,), 0), StreamState(), False, rows, [1, 2])
    try:
        with pytest.raises(DataError, match="because can't read audio .*0.wav; because no such file") as error:
            reader.finish(work, reader.start(work))
    finally:
        reader.close()
    assert error.value.remedy


@pytest.mark.parametrize("change", [None, {"duration": 50.0}, {"_skipme": True}])
def test_a_corpus_without_usable_rows_is_reported(corpus, tmp_path, capfd, change):
    shutil.copytree(corpus, tmp_path / "corpus")
    rows = [] if change is None else [json.loads(line) | change for line in (corpus / "dev.jsonl").open()]
    (tmp_path / "corpus" / "void.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {"train": ["train.jsonl", "void.jsonl"], "dev": ["dev.jsonl", "void.jsonl"]}
    data = {"root": str(tmp_path / "corpus"), **splits}
    config = tiny_config(tmp_path / "corpus", tmp_path, data=data, tracking={"enabled": False})
    with pipeline_in_process():
        pipeline.run_pipeline(config, Console(), ("statistics", "buckets", "assign"))
    output = " ".join("".join(capfd.readouterr()).split())
    assert output.count("corpus void has no row that training can use") == 1
    workspace = Workspace(config, config.run_dir)
    if change == {"duration": 50.0}:  # too long for a bucket, not for validation
        assert {row.corpus for row in checked_split(workspace, "dev").rows} == {"dev", "void"}
    else:
        with pytest.raises(ManifestError, match="corpus void of data.dev has no usable row"):
            checked_split(workspace, "dev")


@pytest.mark.parametrize(
    "limit, expected", [(1, (1, 1, 1)), (6, (2, 2, 1)), (9, (4, 4, 1)), (100, (8, 8, 1)), (None, (8, 8, 1))]
)
def test_a_limit_on_rows_leaves_no_corpus_out(corpus, tmp_path, limit, expected):
    """The first rows of a list of corpora would be those of the first."""
    shutil.copytree(corpus, tmp_path / "corpus")
    lines = (corpus / "dev.jsonl").read_text().splitlines(keepends=True)
    for name, selected in (("other", lines[::-1]), ("small", lines[:1])):
        (tmp_path / "corpus" / f"{name}.jsonl").write_text("".join(selected))
    splits = {"train": ["train.jsonl"], "dev": ["dev.jsonl", "other.jsonl", "small.jsonl"]}
    data = {"root": str(tmp_path / "corpus"), **splits}
    config = tiny_config(tmp_path / "corpus", tmp_path, data=data, tracking={"enabled": False})
    with pipeline_in_process():
        pipeline.run_pipeline(config, Console(quiet=True), ("statistics",))
    rows = checked_split(Workspace(config, config.run_dir), "dev", limit).rows
    assert tuple(Counter(row.corpus for row in rows)[name] for name in ("dev", "other", "small")) == expected
