"""Statistics and assignment: nothing lost, nothing duplicated, the same rows for any chunking, kills survived."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from conftest import tiny_config, tiny_values, upload

from raytrain.console import Console
from raytrain.data.assignment import INDEX_FORMAT, Assignment, Row
from raytrain.data.audio import read_audio
from raytrain.data.loader import load_row
from raytrain.errors import ManifestError, RaytrainError
from raytrain.lengths.histogram import LengthHistogram
from raytrain.run_folder.batches import make_mixture
from raytrain.run_folder.documents import STATISTICS_FORMAT
from raytrain.run_folder.histograms import read_histogram
from raytrain.run_folder.scored_rows import encode_split
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.pipeline import run_pipeline
from raytrain.storage.artifacts import read_json

STAGES = ("statistics", "buckets", "assign")


def run(config, *names: str) -> Assignment:
    run_pipeline(config, Console(quiet=True), names or STAGES)
    return Assignment(config.run_dir / "assignment")


def all_rows(assignment: Assignment) -> list[list[Row]]:
    return [
        [assignment.row(bucket, number) for number in range(rows)]
        for bucket, rows in enumerate(assignment.rows_per_bucket)
    ]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def absolute_lines(corpus: Path) -> list[dict]:
    rows = lines(corpus / "train.jsonl")
    return [{**row, "audio_filepath": str(corpus / row["audio_filepath"])} for row in rows]


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def mixed(corpus, tmp_path_factory) -> Path:
    """A manifest with rows of every kind: usable, unreadable, too long, too fast, left out."""
    rows: list = absolute_lines(corpus)
    rows[10:10] = ["{oops", "", {**rows[0], "text": " "}, {**rows[1], "_skipme": True}]
    rows[40:40] = [{**rows[2], "duration": 30.0}, {**rows[3], "text": "one " * 90}, {**rows[4], "source_lang": "xx"}]
    return write_lines(tmp_path_factory.mktemp("mixed") / "mixed.jsonl", rows)


def data_of(manifest: Path, **more) -> dict:
    return {"root": str(manifest.parent), "train": [manifest.name], "max_bad_fraction": 0.1, **more}


@pytest.mark.usefixtures("local_ray")
def test_every_row_is_in_one_bucket_or_rejected_and_the_cut_does_not_matter(corpus, mixed, tmp_path):
    config = tiny_config(corpus, tmp_path / "whole", data=data_of(mixed))
    assignment = run(config)
    index = read_json(assignment.folder / "index.json", INDEX_FORMAT)["body"]
    assert index["rejected"] == {
        "bad_json": 1,
        "empty_text": 1,
        "skipme": 1,
        "too_long": 1,
        "too_many_tokens": 1,
        "unknown_language": 1,
    }
    assert index["rows"] + sum(index["rejected"].values()) == 96 + 6
    rejected = [row for path in sorted((assignment.folder / "rejected").iterdir()) for row in lines(path)]
    assert Counter(row["reason"] for row in rejected) == index["rejected"]
    where = {row["reason"]: row["line"] for row in rejected}
    text = mixed.read_text().splitlines()
    assert text[where["bad_json"] - 1] == "{oops" and '"xx"' in text[where["unknown_language"] - 1]
    assert '"duration": 30.0' in text[where["too_long"] - 1] and where["too_many_tokens"] == where["too_long"] + 1
    shown = {
        (example["corpus"], example["reason"]): example["first"][0]["line"] for example in index["rejected_examples"]
    }
    assert shown == {("mixed", reason): line for reason, line in where.items()}
    expected = all_rows(assignment)
    assert len({row.audio_path for rows in expected for row in rows}) == index["rows"]

    cut = tiny_config(corpus, tmp_path / "cut", data=data_of(mixed, chunk_bytes=1024))
    again = run(cut)
    assert len(list((again.folder / "parts").iterdir())) > 10
    assert all_rows(again) == expected
    numbers = [row["line"] for path in sorted((again.folder / "rejected").iterdir()) for row in lines(path)]
    assert sorted(numbers) == sorted(where.values())
    bodies = [read_json(run.run_dir / "statistics.json", STATISTICS_FORMAT)["body"] for run in (config, cut)]
    assert bodies[0] == bodies[1]
    assert {example["reason"]: example["first"][0]["line"] for example in bodies[0]["rejected_examples"]} == {
        reason: where[reason] for reason in ("bad_json", "empty_text", "skipme", "unknown_language")
    }


@pytest.mark.usefixtures("local_ray")
def test_bad_rows_of_a_small_split_are_counted(corpus, mixed, tmp_path):
    config = tiny_config(corpus, tmp_path, data={"dev": [str(mixed)]})
    run_pipeline(config, Console(quiet=True), ("statistics",))
    workspace = Workspace(config, config.run_dir)
    dev = encode_split(workspace, "dev")
    assert len(dev.rows) == 96 + 2  # the plan's limits are for training
    assert dev.rejected.by_reason() == {"bad_json": 1, "empty_text": 1, "skipme": 1, "unknown_language": 1}


@pytest.mark.usefixtures("local_ray")
def test_corpora_are_counted_by_name_and_language(corpus, tmp_path):
    rows = absolute_lines(corpus)
    german = [row for row in rows if row["source_lang"] == "de"]
    for row in german:
        del row["source_lang"], row["target_lang"]
    write_lines(tmp_path / "de.jsonl", german)
    english = [row for row in rows if row.get("source_lang") == "en"]
    write_lines(tmp_path / "en.jsonl", english)
    train = [{"name": "small", "path": "de.jsonl", "language": "de", "weight": 3.0}, "en.jsonl"]
    config = tiny_config(corpus, tmp_path, data={"root": str(tmp_path), "train": train, "temperature": 2.0})
    assignment = run(config)
    body = read_json(config.run_dir / "statistics.json", STATISTICS_FORMAT)["body"]
    hours = {
        "small": sum(row["duration"] for row in german) / 3600,
        "en": sum(row["duration"] for row in english) / 3600,
    }
    assert {name: corpus_body["hours"] for name, corpus_body in body["by_corpus"].items()} == pytest.approx(
        hours, abs=1e-4
    )
    assert body["by_language"]["de"]["utterances"] == len(german) == body["by_pair"]["de-de"]["utterances"]
    masses = {"small": 3 * hours["small"] ** 0.5, "en": hours["en"] ** 0.5}
    mixture = make_mixture(Workspace(config, config.run_dir), assignment)
    hours_seen = {name: repeat * hours[name] for name, repeat in zip(assignment.corpora, mixture.repeats, strict=True)}
    for name, mass in masses.items():
        assert hours_seen[name] / sum(hours_seen.values()) == pytest.approx(mass / sum(masses.values()), abs=1e-3)
    assert [sum(rows) for rows in zip(*assignment.rows_by_corpus, strict=True)] == [len(german), len(english)]
    for bucket, rows in enumerate(assignment.rows_by_corpus):
        numbers = np.arange(sum(rows))
        names = [assignment.corpora[index] for index in mixture.corpora(bucket, numbers)]
        assert names == [row.corpus for row in assignment.rows(bucket, numbers)]
    assert Counter(row.corpus for rows in all_rows(assignment) for row in rows) == {
        "small": len(german),
        "en": len(english),
    }
    durations = sorted(row.duration_ms for row in sum(all_rows(assignment), []))
    assert body["duration_quantiles_ms"]["p100"] == -(-durations[-1] // 10) * 10
    total = read_histogram(config.run_dir / "histogram.parquet")
    lengths = [(row.duration_ms, len(row.tokens)) for rows in all_rows(assignment) for row in rows]
    assert total == LengthHistogram.from_lengths(*np.array(lengths).T)


@pytest.mark.usefixtures("local_ray")
def test_audio_is_copied_beside_the_rows(corpus, tmp_path):
    rows = absolute_lines(corpus)[:24]
    (tmp_path / "broken.wav").write_bytes(b"RIFF but no more")
    spans = [{**rows[0], "offset": 0.1, "duration": rows[0]["duration"] - 0.3}]
    broken = [{**rows[1], "audio_filepath": str(tmp_path / "broken.wav")}, {**rows[1], "audio_filepath": "none.wav"}]
    manifest = write_lines(tmp_path / "m.jsonl", [*rows, *spans, *broken])
    sections = {"data": data_of(manifest), "buckets": {"tps_sigma": None}}
    plain = run(tiny_config(corpus, tmp_path / "plain", **sections))
    config = tiny_config(corpus, tmp_path / "copied", assign={"materialize": True}, **sections)
    copied = run(config)
    assert read_json(copied.folder / "index.json", INDEX_FORMAT)["body"]["rejected"] == {
        "bad_audio": 1,
        "missing_audio": 1,
    }
    readable = [row for rows in all_rows(plain) for row in rows if "broken" not in row.audio_path]
    readable = [row for row in readable if "none" not in row.audio_path]
    moved = config.run_dir.parent / "moved"
    copied.folder.rename(moved)
    copies = [row for rows in all_rows(Assignment(moved)) for row in rows]
    assert len(copies) == len(readable) == 25
    for row, copy in zip(readable, copies, strict=True):
        assert (row.text, row.tokens, row.duration_ms) == (copy.text, copy.tokens, copy.duration_ms)
        assert copy.audio_path.endswith(".tar") and copy.offset_ms == 0
        expected, actual = load_row(row, 16000), load_row(copy, 16000)
        assert len(expected) == len(actual) and np.abs(expected - actual).max() <= 1.01 / 32768
    # A person can open the copies.
    with tarfile.open(copies[0].audio_path) as tar:
        first = tar.next()
        assert first.name == "000000.flac"
        assert soundfile.read(io.BytesIO(tar.extractfile(first).read()))[1] == 16000


@pytest.mark.usefixtures("local_ray")
def test_a_tarred_set_is_read_by_range(corpus, tmp_path):
    rows = absolute_lines(corpus)[:20]
    for shard in range(2):
        mine = rows[shard::2]
        with tarfile.open(tmp_path / f"audio_{shard}.tar", "w") as tar:
            for row in mine:
                tar.add(row["audio_filepath"], arcname=Path(row["audio_filepath"]).name)
        named = [{**row, "audio_filepath": Path(row["audio_filepath"]).name, "shard_id": shard} for row in mine]
        write_lines(tmp_path / f"manifest_{shard}.json", [*named, {**named[0], "audio_filepath": "lost.wav"}])
    train = [{"name": "tarred", "path": "manifest__OP_0..1_CL_.json", "audio": "audio__OP_0..1_CL_.tar"}]
    data = {"root": str(tmp_path), "train": train}
    with pytest.raises(ManifestError, match=r"(?s)2 of 22 manifest rows are bad .*has no member lost\.wav"):
        run(tiny_config(corpus, tmp_path, data=data), "statistics")
    config = tiny_config(corpus, tmp_path, data={**data, "max_bad_fraction": 0.1})
    assignment = run(config)
    index = read_json(assignment.folder / "index.json", INDEX_FORMAT)["body"]
    assert index["rejected"] == {"bad_audio": 2}
    assert "has no member lost.wav" in index["rejected_examples"][0]["first"][0]["detail"]
    originals = {row["text"] + str(row["duration"]): row["audio_filepath"] for row in rows}
    assigned = [row for rows in all_rows(assignment) for row in rows]
    assert len(assigned) == 20
    samples = {read_audio(path, sample_rate=16000).tobytes() for path in originals.values()}
    assert {
        read_audio(r.audio_path, start=r.audio_start, size=r.audio_size, sample_rate=16000).tobytes() for r in assigned
    } == (samples)


@pytest.mark.usefixtures("local_ray")
def test_a_corpus_in_an_object_store(corpus, s3, tmp_path):
    upload(corpus, f"{s3}/assign")
    for name, sections in (("ranges", {}), ("copies", {"assign": {"materialize": True}})):
        config = tiny_config(corpus, tmp_path / name, data={"root": f"{s3}/assign"}, **sections)
        assignment = run(config)
        row = assignment.row(0, 0)
        assert row.audio_path.startswith("s3://") == (name == "ranges")
        assert abs(len(load_row(row, 16000)) - row.duration_ms * 16) <= 16
        assert sum(assignment.rows_per_bucket) == 96
    here = run(tiny_config(corpus, tmp_path / "here"))
    assert [row.tokens for rows in all_rows(here) for row in rows] == [
        row.tokens for rows in all_rows(assignment) for row in rows
    ]
    assert encode_split(Workspace(config, config.run_dir), "dev").rows[0].audio_path.startswith(f"{s3}/assign/")


@pytest.mark.usefixtures("local_ray")
def test_audio_inside_parquet_has_to_be_copied(corpus, tmp_path):
    rows = absolute_lines(corpus)[:12]
    audio = [{"bytes": Path(row["audio_filepath"]).read_bytes(), "path": None} for row in rows]
    columns = {"audio": audio, "text": [row["text"] for row in rows], "lang": [row["source_lang"] for row in rows]}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet", row_group_size=5)
    data = {"root": str(tmp_path), "train": ["train.parquet"], "dev": ["train.parquet"]}
    with pytest.raises(RaytrainError, match="set assign.materialize to true"):
        run(tiny_config(corpus, tmp_path / "ranges", data=data))
    config = tiny_config(corpus, tmp_path / "copies", data=data, assign={"materialize": True})
    assigned = sum(all_rows(run(config)), [])
    assert sorted(row.text for row in assigned) == sorted(columns["text"])
    dev = {row.text: row for row in encode_split(Workspace(config, config.run_dir), "dev").rows}
    for row in assigned:
        # A small split is read from the Parquet file itself.
        assert np.abs(load_row(row, 16000) - load_row(dev[row.text], 16000)).max() <= 1.01 / 32768


def start(values: dict, folder: Path, *names: str) -> subprocess.Popen:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    code = (
        "import sys; from pathlib import Path; from raytrain.config import load_config; from raytrain.console import "
        "Console; from raytrain.stages.pipeline import run_pipeline; "
        f"run_pipeline(load_config(Path({str(path)!r})), Console(quiet=True), {names!r})"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)


@pytest.mark.usefixtures("local_ray")
def test_a_killed_job_goes_on_without_doing_parts_again(corpus, tmp_path):
    rows = absolute_lines(corpus)
    copies, chunk_bytes = 16, 5 << 10
    manifest = write_lines(tmp_path / "many.jsonl", rows * copies)
    sections = {"data": data_of(manifest, chunk_bytes=chunk_bytes), "assign": {"materialize": True}}
    config = tiny_config(corpus, tmp_path, **sections)
    run_pipeline(config, Console(quiet=True), ("statistics", "buckets"))
    notes = config.run_dir / "assignment" / "parts"
    job = start(tiny_values(corpus, tmp_path, **sections, cluster={"num_cpus": 2}), tmp_path, "assign")
    try:
        deadline = time.monotonic() + 120
        while len(list(notes.glob("*.json"))) < 4:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(job.pid, signal.SIGKILL)  # the driver and its Ray at once
        job.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in notes.glob("*.json")}
    num_chunks = -(-manifest.stat().st_size // chunk_bytes)
    assert 4 <= len(finished) < num_chunks
    assert not (config.run_dir / "assignment" / "index.json").exists()
    assignment = run(config, "assign")
    after = {path.name: path.stat().st_mtime_ns for path in notes.glob("*.json")}
    assert len(after) == num_chunks and {name: after[name] for name in finished} == finished
    assert not list(assignment.folder.glob("*/.*"))  # what was half written is gone
    counts = Counter((row.text, row.duration_ms) for rows in all_rows(assignment) for row in rows)
    undisturbed = tiny_config(corpus, tmp_path / "undisturbed")
    expected = Counter((row.text, row.duration_ms) for rows in all_rows(run(undisturbed)) for row in rows)
    assert counts == Counter({row: number * copies for row, number in expected.items()})
