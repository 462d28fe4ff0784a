"""Manifests: byte ranges, encodings of text files, defaults of a row."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data.corpora.reading import plan_chunks, read_chunk
from raytrain.data.corpora.types import BadRow, Corpus, Utterance
from raytrain.errors import ManifestError

GOOD = {"audio_filepath": "a.flac", "duration": 1.2, "text": "one two", "lang": "en"}


def read(path, rows=None, chunk_bytes=16 << 20, language=None):
    """All rows of a manifest; `rows` are written to it first."""
    if rows is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chunks = plan_chunks([Corpus("c", str(path), language=language)], chunk_bytes)
    return [row for chunk in chunks for row in read_chunk(chunk)]


@given(
    sizes=st.lists(st.one_of(st.none(), st.integers(0, 40)), min_size=1, max_size=20),
    chunk_bytes=st.integers(1, 150),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    has_bom=st.booleans(),
    ends=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_every_line_is_read_once_by_any_chunks(tmp_path_factory, sizes, chunk_bytes, newline, has_bom, ends):
    path = tmp_path_factory.mktemp("m") / "m.jsonl"
    texts = [None if size is None else f"ü{number}" + "x" * size for number, size in enumerate(sizes)]
    lines = [b"" if text is None else json.dumps({**GOOD, "text": text}).encode() for text in texts]
    path.write_bytes(b"\xef\xbb\xbf" * has_bom + newline.join(lines) + newline * ends)
    assert [row.text for row in read(path, chunk_bytes=chunk_bytes)] == [text for text in texts if text is not None]


def test_chunks_of_several_files_tile_them_and_are_numbered_through(tmp_path):
    for name, size in (("a", 250), ("b", 0), ("c", 100)):
        (tmp_path / name).write_bytes(b"\n" * size)
    chunks = plan_chunks([Corpus("x", (f"{tmp_path}/a", f"{tmp_path}/b")), Corpus("y", f"{tmp_path}/c")], 100)
    assert [(chunk.path[-1], chunk.start, chunk.end) for chunk in chunks] == [
        ("a", 0, 100),
        ("a", 100, 200),
        ("a", 200, 250),
        ("b", 0, 0),
        ("c", 0, 100),
    ]
    assert [(chunk.index, chunk.corpus) for chunk in chunks] == [(0, "x"), (1, "x"), (2, "x"), (3, "x"), (4, "y")]
    assert [list(read_chunk(chunk)) for chunk in chunks] == [[]] * 5


def test_line_numbers_count_from_the_start_of_the_file_in_every_chunk(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = [{**GOOD, "text": "" if number % 7 == 0 else "x"} for number in range(1, 40)]
    for chunk_bytes in (1, 64, 1000):
        bad = [row.line for row in read(path, rows, chunk_bytes=chunk_bytes) if isinstance(row, BadRow)]
        assert bad == [7, 14, 21, 28, 35]


@pytest.mark.parametrize(("seconds", "ms"), [(1.2345, 1235), (2.3000000000000003, 2300), (0.0001, 1), (3, 3000)])
def test_durations_are_rounded_up(tmp_path, seconds, ms):
    (row,) = read(tmp_path / "m.jsonl", [{**GOOD, "duration": seconds}])
    assert row.duration_ms == ms


def test_a_row_becomes_an_utterance(tmp_path):
    row = {
        **GOOD,
        "offset": 0.5,
        "source_lang": "<|en|>",
        "target_lang": "de",
        "pnc": "no",
        "taskname": "ast",
        "decodercontext": "eins",
        "itn": None,
        "text": " one\t two ",
    }
    (parsed,) = read(tmp_path / "m.jsonl", [row])
    slots = (("task", "ast"), ("decodercontext", "eins"))
    assert parsed == Utterance(str(tmp_path / "a.flac"), 500, 1200, "one two", "en", "de", False, slots)


def test_languages_fall_back_from_target_to_source_to_lang_to_the_corpus(tmp_path):
    bare = {key: value for key, value in GOOD.items() if key != "lang"}
    rows = [GOOD, {**GOOD, "target_lang": "de"}, {**GOOD, "source_lang": "fr"}, bare]
    parsed = read(tmp_path / "m.jsonl", rows, language="es")
    assert [(row.source_lang, row.target_lang) for row in parsed] == [
        ("en", "en"),
        ("en", "de"),
        ("fr", "fr"),
        ("es", "es"),
    ]
    (row,) = read(tmp_path / "m.jsonl", [bare])
    assert isinstance(row, BadRow) and row.reason == "missing_field"


@pytest.mark.parametrize(
    ("value", "pnc"),
    [
        ("yes", True),
        ("no", False),
        ("Yes", True),
        (True, True),
        (False, False),
        (None, True),
        ("pnc", True),
        ("<|nopnc|>", False),
    ],
)
def test_punctuation_may_be_a_word_a_boolean_or_a_token(tmp_path, value, pnc):
    (row,) = read(tmp_path / "m.jsonl", [{**GOOD, "pnc": value}])
    assert row.pnc is pnc


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"offset": -0.5}, "bad_duration"),
        ({"offset": "1"}, "bad_duration"),
        ({"duration": True}, "bad_duration"),
        ({"duration": None}, "missing_field"),
        ({"text": 7}, "empty_text"),
        ({"audio_filepath": 3}, "missing_field"),
        ({"target_lang": 3}, "unknown_language"),
        ({"_skipme": True, "duration": -1}, "skipme"),
        ({"lang": ["en"]}, "unknown_language"),
        ({"lang": 5}, "unknown_language"),
        ({"duration": 1e307}, "bad_duration"),
        ({"duration": 1e20}, "bad_duration"),
        ({"offset": 1e307}, "bad_duration"),
        ({"audio_filepath": ""}, "missing_field"),
        ({"duration": 0}, "bad_duration"),
        ({"duration": -1}, "bad_duration"),
        ({"duration": "x"}, "bad_duration"),
        ({"duration": float("inf")}, "bad_json"),
        ({"text": "  "}, "empty_text"),
        ({"pnc": "maybe"}, "bad_slot"),
    ],
)
def test_a_bad_row_has_a_reason(tmp_path, change, reason):
    (row,) = read(tmp_path / "m.jsonl", [{**GOOD, **change}])
    assert isinstance(row, BadRow) and (row.line, row.reason) == (1, reason)


def test_bad_lines_are_named_and_leave_the_others(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [json.dumps(GOOD), "{broken", "", "[1]", '{"duration": 1}', json.dumps(GOOD), r'{"text": "\ud800"}']
    path.write_text("\n".join(lines))
    for chunk_bytes in (20, 1000):
        parsed = read(path, chunk_bytes=chunk_bytes)
        assert [isinstance(row, Utterance) for row in parsed] == [True, False, False, False, True, False]
        bad = [(row.file, row.line, row.reason) for row in parsed if isinstance(row, BadRow)]
        assert bad == [
            (str(path), 2, "bad_json"),
            (str(path), 4, "bad_json"),
            (str(path), 5, "missing_field"),
            (str(path), 7, "bad_json"),
        ]


def test_absolute_audio_paths_stay_and_others_start_at_the_manifest(tmp_path):
    first, second = read(tmp_path / "m.jsonl", [{**GOOD, "audio_filepath": "/data/b.wav"}, GOOD])
    assert isinstance(first, Utterance)
    assert (first.audio_path, second.audio_path) == ("/data/b.wav", str(tmp_path / "a.flac"))


def test_no_manifests_at_all_is_an_error_with_a_remedy():
    with pytest.raises(ManifestError, match="data.train"):
        plan_chunks([])


@pytest.mark.parametrize(("name", "why"), [("none.jsonl", "no such file.*RAYTRAIN_DATA_ROOT"), (".", "can't tell")])
def test_unreadable_files_are_named_with_the_corpus_and_the_reason(tmp_path, name, why):
    with pytest.raises(ManifestError, match=f"corpus c: .*{why}"):
        read(tmp_path / name)


def test_relative_manifests_give_absolute_audio_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.jsonl").write_text(json.dumps(GOOD))
    (row,) = read_chunk(plan_chunks([Corpus("c", "m.jsonl").below("")])[0])
    assert row.audio_path == str(tmp_path / "a.flac")


def test_a_corpus_target_language_counts_where_rows_name_none(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "target_lang": "fr"}))
    (chunk,) = plan_chunks([Corpus("c", f"{tmp_path}/m.jsonl", target_language="de")])
    assert [(row.source_lang, row.target_lang) for row in read_chunk(chunk)] == [("en", "de"), ("en", "fr")]
