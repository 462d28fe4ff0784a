"""Demo speech: real sound in four languages, made once, held-out strings kept out of training."""

import json

import numpy as np
import pytest
import soundfile

from raytrain.data.corpora.reading import plan_chunks, read_chunk
from raytrain.data.corpora.types import Corpus, Utterance
from raytrain.demo.speech import DIGITS, make_corpus
from raytrain.errors import DataError

SIZES = {"train": 40, "dev": 8, "test": 12}


@pytest.fixture(scope="module")
def four_languages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    calls = []
    manifests = make_corpus(folder, SIZES, seed=5, on_utterance=lambda: calls.append(1))
    assert len(calls) == sum(SIZES.values())
    return folder, manifests


def test_manifests_are_read_without_a_bad_row(four_languages):
    _, manifests = four_languages
    for split, size in SIZES.items():
        rows = [row for chunk in plan_chunks([Corpus(split, str(manifests[split]))]) for row in read_chunk(chunk)]
        assert len(rows) == size and all(isinstance(row, Utterance) for row in rows)
        assert {row.source_lang for row in rows} == set(DIGITS)
        for row in rows:
            assert set(row.text.split()) <= set(DIGITS[row.source_lang].split())


def test_durations_are_those_of_the_audio(four_languages):
    folder, manifests = four_languages
    for line in manifests["train"].read_text().splitlines():
        row = json.loads(line)
        info = soundfile.info(folder / row["audio_filepath"])
        assert row["duration"] == pytest.approx(info.duration, abs=1e-4) and info.format == "FLAC"
        assert np.abs(soundfile.read(folder / row["audio_filepath"])[0]).max() > 0.05


def test_held_out_strings_are_not_trained_on(four_languages):
    _, manifests = four_languages
    texts = {split: {json.loads(line)["text"] for line in path.open()} for split, path in manifests.items()}
    assert not texts["train"] & (texts["dev"] | texts["test"])


def test_a_complete_corpus_is_left_as_it_is(four_languages):
    folder, manifests = four_languages
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def fail() -> None:
        raise AssertionError("spoke again")

    assert make_corpus(folder, SIZES, seed=5, on_utterance=fail) == manifests
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_unknown_language_lists_what_there_is(tmp_path):
    with pytest.raises(DataError, match="got \\['xx'\\]; allowed: en, de, es, fr"):
        make_corpus(tmp_path, SIZES, seed=1, languages=("en", "xx"))
