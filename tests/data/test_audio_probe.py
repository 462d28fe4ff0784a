"""Audio that is missing, broken, or shorter than its row says is reported before training on it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import pipeline_in_process

from raytrain.config import Config
from raytrain.data.assignment import Assignment
from raytrain.data.assignment.assigner import ChunkAssigner
from raytrain.data.corpora.reading import plan_chunks, read_blocks
from raytrain.data.corpora.types import Chunk, Corpus
from raytrain.data.counts import Counts, count_chunk, number_lines
from raytrain.data.probe import MISSING, SHORT, UNREADABLE, AudioListing, HeaderSample, least_share, plan_samples
from raytrain.data.sequences import BlockEncoder
from raytrain.data.text.tokenizer import train_tokenizer
from raytrain.errors import ManifestError, TrainingError
from raytrain.lengths import BucketSettings, make_plan
from raytrain.stages.statistics import check_bad_rows

RATE = 8000


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """Forty recordings of 1.0, 1.1, … seconds in one folder."""
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(40):
        samples = np.zeros(RATE + number * RATE // 10, np.float32)
        soundfile.write(folder / f"{number:02}.flac", samples, RATE)
    return folder


def rows_of(folder: Path, scale: float = 1.0) -> list[dict]:
    """True rows of the recordings, their durations times `scale`."""
    return [
        {
            "audio_filepath": str(folder / f"{number:02}.flac"),
            "duration": (1 + number / 10) * scale,
            "text": "one",
            "lang": "en",
        }
        for number in range(40)
    ]


def chunk_of(rows: list[dict], path: Path) -> Chunk:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (chunk,) = plan_chunks([Corpus("digits", str(path))])
    return chunk


def check(counts: Counts, limit: float) -> None:
    config = tiny_config(Path("."), Path("."), data={"max_bad_fraction": limit})
    check_bad_rows(counts, config, counts.num_usable)


def encoder() -> BlockEncoder:
    return BlockEncoder(train_tokenizer({"en": ["one two three"]}, 32), "canary2")


def counted(chunk: Chunk, size: int = 256) -> Counts:
    counts = count_chunk(chunk, encoder(), AudioListing(), size)
    number_lines(counts, [chunk])
    return counts


def test_true_rows_are_left_alone(recordings, tmp_path):
    counts = counted(chunk_of(rows_of(recordings), tmp_path / "rows.jsonl"))
    assert counts.probed == {"digits": 40} and not counts.contradicted.counts and not counts.rejected.counts
    check(counts, 0.0)


@given(missing=st.sets(st.integers(0, 39), min_size=1), spread=st.booleans())
@settings(max_examples=12, deadline=None)
def test_missing_files_are_named_wherever_they_lie(recordings, tmp_path_factory, missing, spread):
    """`spread`: each in a separate folder, which is not listed."""
    rows, folder = rows_of(recordings), tmp_path_factory.mktemp("missing")
    for number in missing:
        name = rows[number]["audio_filepath"] = f"{recordings}/{number if spread else ''}/none-{number}.flac"
        assert not Path(name).exists()
    chunk = chunk_of(rows, folder / "rows.jsonl")
    counts = counted(chunk)
    assert counts.rejected.counts == {("digits", MISSING): len(missing)}
    assert counts.histogram.total == 40 - len(missing) if counts.groups else len(missing) == 40
    first = counts.rejected.first("digits", MISSING)[0]
    assert first.line == min(missing) + 1 and f"none-{min(missing)}.flac" in first.detail
    with pytest.raises(ManifestError, match=f"(?s){MISSING}.*rows.jsonl:{min(missing) + 1}:"):
        check(counts, 0.01)


@given(scale=st.floats(0.3, 3.0))
@settings(max_examples=12, deadline=None)
def test_audio_more_than_a_tenth_shorter_than_claimed_is_reported(recordings, tmp_path_factory, scale):
    chunk = chunk_of(rows_of(recordings, scale), tmp_path_factory.mktemp("scaled") / "rows.jsonl")
    counts = counted(chunk)
    short = sum(np.ceil((1 + n / 10) * scale * 1000) * 0.9 > np.floor(1000 + n * 100) + 1 for n in range(40))
    assert (
        abs(counts.contradicted.counts["digits", SHORT] - short) <= 1
    )  # a row within a millisecond of the edge may be on either side
    check(counts, 0.0)  # such rows are usable for training
    if short:
        first = counts.contradicted.first("digits", SHORT)[0]
        assert "the row says" in first.detail and first.line >= 1


def test_spans_are_measured_from_their_start(recordings, tmp_path):
    rows = rows_of(recordings)
    rows[10] |= {"offset": 1.5, "duration": 0.5}  # 2.0 s long
    rows[11] |= {"offset": 1.5, "duration": 1.0}  # 2.1 s long
    counts = counted(chunk_of(rows, tmp_path / "rows.jsonl"))
    assert counts.contradicted.counts == {("digits", SHORT): 1}
    assert "0.6 s after 1.5 s, the row says 1 s" in counts.contradicted.first("digits", SHORT)[0].detail


def test_recordings_without_a_header_are_reported(recordings, tmp_path):
    rows = rows_of(recordings)
    for number in (3, 7):
        broken = tmp_path / f"{number}.flac"
        broken.write_bytes(b"not audio at all")
        rows[number]["audio_filepath"] = str(broken)
    counts = counted(chunk_of(rows, tmp_path / "rows.jsonl"))
    assert counts.contradicted.counts == {("digits", UNREADABLE): 2}
    assert [row.line for row in counts.contradicted.first("digits", UNREADABLE)] == [4, 8]
    check(counts, 0.05)
    with pytest.raises(ManifestError, match="2 of 40 manifest rows are bad"):
        check(counts, 0.04)


def test_a_sample_represents_its_corpus(recordings, tmp_path):
    rows = [row | {"audio_filepath": __file__} for row in rows_of(recordings)]
    counts = counted(chunk_of(rows, tmp_path / "rows.jsonl"), size=10)
    assert counts.probed == {"digits": 10} and counts.contradicted.counts["digits", UNREADABLE] == 10
    with pytest.raises(ManifestError, match="29 of 40 manifest rows are bad .* headers of 10 recordings"):
        check(counts, 0.5)


@given(probed=st.integers(1, 300), more=st.integers(0, 10_000), data=st.data())
def test_a_sample_makes_sure_of_less_than_it_shows(probed, more, data):
    wrong = data.draw(st.integers(0, probed))
    share = least_share(wrong, probed, probed + more)
    assert 0 <= share <= wrong / probed
    assert share == wrong / probed if not more or not wrong else share > 0
    assert share >= least_share(max(0, wrong - 1), probed, probed + more)


@given(size=st.integers(0, 60), cuts=st.integers(1, 7))
@settings(max_examples=20, deadline=None)
def test_a_sample_is_as_large_as_asked_and_the_same_again(recordings, tmp_path_factory, size, cuts):
    chunk = chunk_of(rows_of(recordings), tmp_path_factory.mktemp("sample") / "rows.jsonl")
    (block,) = read_blocks(chunk)
    samples = []
    for bounds in (np.linspace(0, 40, cuts + 1).astype(int), [0, 40]):
        sample = HeaderSample(chunk, size)
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            rows = np.arange(40)
            sample.add(block.select((rows >= start) & (rows < end)))
        samples.append(sample._candidates)
        assert sample.read().probed["digits"] == min(size, 40)
    assert samples[0] == samples[1]


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4), size=st.integers(0, 500))
@settings(deadline=None)
def test_every_corpus_has_its_sample(sizes, size):
    chunks = [
        Chunk(f"{name}.jsonl", 0, 1, corpus=str(name)) for name, number in enumerate(sizes) for _ in range(number)
    ]
    chunks = [replace(chunk, index=index) for index, chunk in enumerate(chunks)]
    planned = plan_samples(chunks, size)
    by_corpus = Counter()
    for index, number in planned.items():
        by_corpus[chunks[index].corpus] += number
    assert all(by_corpus[str(name)] >= size for name in range(len(sizes)))
    assert all(by_corpus[str(name)] < size + 64 for name in range(len(sizes)))


def test_assign_rejects_missing_audio(recordings, tmp_path):
    rows = rows_of(recordings)
    rows[5]["audio_filepath"] = str(recordings / "none.flac")
    chunk = chunk_of(rows, tmp_path / "rows.jsonl")
    counts = counted(chunk)
    plan = make_plan(counts.histogram, BucketSettings(num_duration_buckets=2, num_token_buckets=1), "histogram")
    note = ChunkAssigner(chunk, encoder(), plan, tmp_path / "assignment", None, AudioListing()).run()
    assert note.rejected == {MISSING: 1} and sum(note.rows.values()) == 39
    rejected = json.loads((tmp_path / "assignment" / "rejected" / "part-00000.jsonl").read_text())
    assert rejected["line"] == 6 and "none.flac" in rejected["detail"]


def test_training_gives_up_and_statistics_names_missing_files(corpus, tmp_path, local_ray):
    from raytrain.console import Console
    from raytrain.stages.pipeline import run_pipeline

    shutil.copytree(corpus, tmp_path / "corpus")
    train = {"max_steps": 200, "num_workers": 1}
    config = tiny_config(tmp_path / "corpus", tmp_path, tracking={"enabled": False}, train=train)
    run_pipeline(config, Console(quiet=True), ("statistics", "buckets", "assign", "oomptimize"))
    manifest = tmp_path / "corpus" / "train.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    files = [tmp_path / "corpus" / row["audio_filepath"] for row in rows[::2]]
    for path in files:
        path.write_bytes(b"")
    with pytest.raises(TrainingError, match="the audio of too many rows can't be read"):
        run_pipeline(config, Console(quiet=True), ("train",))
    named = {json.loads(line)["audio_path"] for line in (config.run_dir / "quarantine.jsonl").read_text().splitlines()}
    assert named and named <= set(map(str, files))
    for path in files:
        path.unlink()
    manifest.write_text(manifest.read_text() + "\n")  # so that statistics reruns
    with pytest.raises(ManifestError, match=MISSING):
        run_pipeline(config, Console(quiet=True), ("statistics",))
    shutil.copytree(corpus / "audio", tmp_path / "corpus" / "audio", dirs_exist_ok=True)
    files[0].unlink()
    config = tiny_config(tmp_path / "corpus", tmp_path, data={"max_bad_fraction": 0.02}, tracking={"enabled": False})
    counted = ("statistics", "buckets", "assign")
    assert run_pipeline(config, Console(quiet=True), counted) == list(counted)
    assert run_pipeline(config, Console(quiet=True), counted) == []
    shutil.copytree(corpus / "audio", tmp_path / "corpus" / "audio", dirs_exist_ok=True)
    assert run_pipeline(config, Console(quiet=True), counted) == list(counted)
    assert sum(Assignment(config.run_dir / "assignment").rows_per_bucket) == len(rows)


def test_assign_limits_undecodable_audio_and_reads_it_again(corpus, tmp_path):
    """Headers may be intact when the samples are not, so that only copying detects it."""
    shutil.copytree(corpus, tmp_path / "corpus")
    rows = [json.loads(line) for line in (tmp_path / "corpus" / "train.jsonl").read_text().splitlines()]
    whole = {}
    for number in (5, 50):
        path = tmp_path / "corpus" / rows[number]["audio_filepath"]
        whole[path] = path.read_bytes()
        path.write_bytes(whole[path][:200])
    sections = {"tracking": {"enabled": False}, "assign": {"materialize": True}}

    def config(limit: float) -> Config:
        data = {"root": str(tmp_path / "corpus"), "train": ["train.jsonl"], "max_bad_fraction": limit}
        return tiny_config(tmp_path / "corpus", tmp_path, data=data, **sections)

    with pipeline_in_process() as run:
        with pytest.raises(ManifestError, match="2 of 96 manifest rows are bad") as raised:
            run(config(0.02))
        assert all(f"train.jsonl:{line}: bad_audio" in str(raised.value) for line in (6, 51))
        assert "assign" in run(config(0.03))
        with pytest.raises(ManifestError, match="2 of 96"):
            run(config(0.02))
        for path, data in whole.items():
            path.write_bytes(data)
        assert "assign" in run(config(0.02))
    index = json.loads((config(0.02).run_dir / "assignment" / "index.json").read_text())["body"]
    assert (index["rows"], index["rejected"]) == (96, {})
