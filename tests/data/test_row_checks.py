"""Any row of a manifest is usable or a named bad row, with the same result alone and among others."""

import json
import string

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raytrain.data.corpora.blocks import locate_audio
from raytrain.data.corpora.reading import plan_chunks, read_chunk
from raytrain.data.corpora.rows import REASONS, RowParser
from raytrain.data.corpora.types import BadRow, Chunk, Corpus, Utterance
from raytrain.data.sequences import BlockEncoder
from raytrain.data.text.tokenizer import train_tokenizer

GOOD = {"audio_filepath": "a.flac", "duration": 1.5, "text": "one two", "lang": "en"}
CHUNKS = {
    "nemo": Chunk("/d/m.jsonl", 0, 9, language="en"),
    "no language": Chunk("/d/m.jsonl", 0, 9),
    "tarred": Chunk("/d/m_3.json", 0, 9, format="nemo_tarred", audio="/d/a_3.tar", shard=3),
}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, 10**400, 3, "3", 1.0, 4]),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({"a": [1]}),
    st.just(nested(40)),
    st.sampled_from(["yes", "no", "<|pnc|>"]),
    st.sampled_from(["a\0b", "\ud800", "\u200b", "\u3164", "\ufeff \u2060", "../../x", "<|en|>\n"]),
)
usual = {
    "audio_filepath": st.text(string.ascii_letters + "/~.éक", min_size=1, max_size=6),
    "duration": st.floats(0.001, 100),
    "text": st.text(string.ascii_letters + " éß\u00a0क\u200d", min_size=1, max_size=8).map(lambda text: "x" + text),
    "lang": st.sampled_from(["en", "de", "<|en|>"]),
}
further = {
    name: odd for name in ("offset", "source_lang", "target_lang", "pnc", "itn", "_skipme", "shard_id", "emotion")
}
rows = st.one_of(
    st.fixed_dictionaries(usual),  # ordinary rows, so that whole blocks of them occur
    st.fixed_dictionaries({name: st.one_of(usual[name], odd) for name in usual}, optional=further),
    st.fixed_dictionaries({}, optional={**{name: odd for name in usual}, **further}),
    st.one_of(odd, st.lists(odd, max_size=2)).filter(lambda row: row is not None),
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(CHUNKS)), st.lists(rows, max_size=5))
@example("nemo", [{**GOOD, "pnc": 1}, {**GOOD, "pnc": 1.0}, {**GOOD, "pnc": True}])
@example("nemo", [{**GOOD, "duration": 10**400}])
def test_a_row_is_usable_or_bad_and_the_same_alone_and_in_a_block(name, rows):
    check_rows(name, rows)


@pytest.mark.parametrize("value", [nested(990), 10**5000, {"a": nested(990)}, "x" * 100_000], ids=lambda value: "")
@pytest.mark.parametrize("field", [*usual, *further])
def test_a_field_that_cannot_be_shown_does_no_harm(encoder, field, value):
    # Hypothesis would show them.
    rows = [GOOD, {**GOOD, field: value}]
    for name in CHUNKS:
        check_rows(name, rows)
    block = encoder.check(RowParser(CHUNKS["nemo"]).block([0, 1], rows))
    assert all(len(row.detail) < 1000 for row in block.bad)


def check_rows(name, rows):
    parser = RowParser(CHUNKS[name])
    alone = [parser.parse(row) for row in rows]
    block = parser.block(np.arange(len(rows)), rows)
    together = {row.line: (row.reason, row.detail) for row in block.bad}
    for number, row in zip(block.numbers.tolist(), block.utterances(), strict=True):
        together[number] = row
    assert [together[number] for number in range(len(rows))] == alone
    for parsed in together.values():
        if not isinstance(parsed, Utterance):
            reason, detail = parsed
            assert reason in REASONS and len(detail) < 1000 and detail.isprintable() and detail.encode()


@pytest.fixture(scope="module")
def encoder():
    return BlockEncoder(train_tokenizer({"en": ["one two three"], "de": ["eins"]}, 40), "canary2")


@settings(max_examples=150, deadline=None)
@given(st.lists(rows, max_size=5))
def test_what_is_usable_can_be_counted_and_encoded(encoder, rows):
    block = encoder.check(RowParser(CHUNKS["nemo"]).block(np.arange(len(rows)), rows))
    assert len(block) + len(block.bad) == len(rows)
    lengths, _ = encoder.count(block)
    assert len(lengths) == len(block) and (encoder.encode(block).lengths == lengths).all()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"audio_filepath": "a\0b.flac"}, "bad_audio"),
        ({"audio_filepath": "a\nb.flac"}, "bad_audio"),
        ({"audio_filepath": ["a"]}, "missing_field"),
        ({"audio_filepath": {"a": 1}}, "missing_field"),
        ({"text": "one\0two"}, "bad_text"),
        ({"text": "\ud800 one"}, "bad_text"),
        ({"text": "\u200b"}, "empty_text"),
        ({"text": " \u200e\ufeff\u00ad\u2060 "}, "empty_text"),
        ({"text": "\u3164\u2800"}, "empty_text"),
        ({"text": ["a"]}, "empty_text"),
        ({"source_lang": "../../x"}, "unknown_language"),
        ({"target_lang": "../../x"}, "unknown_language"),
        ({"source_lang": "<|en|>\n"}, "unknown_language"),
        ({"lang": "spl_tokens"}, "unknown_language"),
        ({"lang": "pnc"}, "unknown_language"),
        ({"lang": {"en": 1}}, "unknown_language"),
        ({"pnc": {"a": 1}}, "bad_slot"),
        ({"duration": True}, "bad_duration"),
        ({"duration": float("nan")}, "bad_duration"),
        ({"offset": -5}, "bad_duration"),
    ],
)
def test_a_fields_problem_has_a_name(fields, reason):
    row = {**GOOD, **fields}
    assert RowParser(CHUNKS["nemo"]).parse(row)[0] == reason
    block = RowParser(CHUNKS["nemo"]).block([7, 8], [GOOD, row])
    assert len(block) == 1 and [(bad.line, bad.reason) for bad in block.bad] == [(8, reason)]


@pytest.mark.parametrize(
    "text", ["می‌خواهم", "co\u00adop", "l’été\u202f!", "👨\u200d👩\u200d👧", "\ufeffone", "क्\u200dष", "…", "a\tb\x07"]
)
def test_texts_with_invisible_characters_beside_others_are_texts(text):
    block = RowParser(CHUNKS["nemo"]).block([0, 1], [GOOD, {**GOOD, "text": text}])
    assert block.texts == [GOOD["text"], text] and not block.bad


LINES = {
    "a long line": orjson.dumps({**GOOD, "junk": "x" * 10_000_000}),
    "deep JSON": b'{"audio_filepath":"a","duration":1,"text":"one","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a deep slot": b'{"audio_filepath":"a","duration":1,"text":"one","itn":' + b"[" * 1000 + b"]" * 1000 + b"}",
    "NaN": json.dumps({**GOOD, "duration": float("nan")}).encode(),
    "a huge number": json.dumps(GOOD).replace("1.5", "1e400").encode(),
    "more digits than a number has": json.dumps(GOOD).replace("1.5", "1" * 5000).encode(),
    "keys twice": json.dumps(GOOD).encode()[:-1] + b', "duration": 2.0, "duration": "x"}',
    "no UTF-8": json.dumps(GOOD).encode().replace(b"one", b"\xff\xfe"),
    "NUL bytes": b"\0" * 50,
    "half a surrogate pair": json.dumps({**GOOD, "text": "\ud800"}).encode(),
    "a list": b"[1,2]",
    "null": b"null",
    "nothing": b"{}",
    "a string": b'"audio_filepath"',
    "a number": b"7",
    "a long text": json.dumps({**GOOD, "text": "one " * 1_000_000}).encode(),
    "a special token": json.dumps({**GOOD, "text": "one<|endoftext|>"}).encode(),
}


@pytest.mark.parametrize("name", LINES)
def test_a_hostile_line_affects_no_other_row(tmp_path, name, encoder):
    good = orjson.dumps(GOOD)
    (tmp_path / "m.jsonl").write_bytes(b"\n".join([good, LINES[name], good]) + b"\n")
    chunks = plan_chunks([Corpus("c", f"{tmp_path}/m.jsonl", "nemo")])
    parsed = [row for chunk in chunks for row in read_chunk(chunk)]
    assert [isinstance(row, Utterance) for row in (parsed[0], parsed[-1])] == [True, True]
    assert len(parsed) == 3 or name == "null"
    assert all(row.line == 2 and row.reason in REASONS for row in parsed if isinstance(row, BadRow))


cut = st.recursive(
    st.one_of(odd, st.sampled_from(["MonoCut", "file"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "recording",
                    "sources",
                    "channel",
                    "channels",
                    "supervisions",
                    "start",
                    "custom",
                    "text",
                    "language",
                    "transforms",
                    "name",
                    "id",
                    "duration",
                    "source",
                ]
            ),
            inner,
            max_size=5,
        ),
    ),
)


@settings(max_examples=200, deadline=None)
@given(cut.filter(lambda value: isinstance(value, dict)))
def test_a_hostile_cut_is_a_row_or_a_reason(value):
    from raytrain.data.corpora.lhotse_cuts import cut_row

    for in_tar in (False, True):
        row = cut_row(value, in_tar=in_tar)
        parsed = RowParser(CHUNKS["nemo"]).parse(row)
        assert isinstance(parsed, Utterance) or (parsed[0] in REASONS and len(parsed[1]) < 1000)


def test_a_tilde_in_a_row_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    chunk = CHUNKS["nemo"]
    paths = ["~/a.flac", "~nobody-of-this-name.flac", "b/~/a.flac", "/x/~", "s3://box/~/a"]
    expected = ["/home/ann/a.flac", "/d/~nobody-of-this-name.flac", "/d/b/~/a.flac", "/x/~", "s3://box/~/a"]
    assert locate_audio(chunk, paths)[0] == expected
    rows = [{**GOOD, "audio_filepath": path} for path in paths]
    assert [row.audio_path for row in RowParser(chunk).block(range(5), rows).utterances()] == expected
    assert [RowParser(chunk).parse(row).audio_path for row in rows] == expected
    assert locate_audio(CHUNKS["tarred"], ["~/a.flac"]) == (["/d/a_3.tar"], ["~/a.flac"])
