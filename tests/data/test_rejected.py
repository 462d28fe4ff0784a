"""Rejected rows are counted by corpus and reason, merge in any order, and name the first of each."""

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain.data.corpora.rejected import NUM_EXAMPLES, ExampleRow, RejectedExamples, RejectedRows
from raytrain.data.corpora.types import BadRow

CORPUS_OF_CHUNK = ("c1", "c1", "c2")
CHUNK_LINES = st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["bad_json", "empty_text"])), unique=True)


def bad_row(line: int, reason: str, file: str = "/m.jsonl") -> BadRow:
    return BadRow(file, line, reason, f"line {line}")


def of_chunk(chunk: int, lines: list[tuple[int, str]]) -> RejectedRows:
    rejected = RejectedRows(num_rows=50)
    for line, reason in sorted(lines):
        rejected.add(CORPUS_OF_CHUNK[chunk], bad_row(line, reason), chunk)
    return rejected


@given(st.tuples(CHUNK_LINES, CHUNK_LINES, CHUNK_LINES), st.permutations(range(3)))
def test_workers_results_merge_in_any_order(chunks, order):
    in_order = RejectedRows()
    for chunk, lines in enumerate(chunks):
        for line, reason in sorted(lines):
            in_order.add(CORPUS_OF_CHUNK[chunk], bad_row(line, reason), chunk)
    merged = RejectedRows()
    for chunk in order:
        merged.merge(of_chunk(chunk, chunks[chunk]))
    assert (merged.counts, merged.examples, merged.num_rows) == (in_order.counts, in_order.examples, 150)
    assert all(len(examples) <= NUM_EXAMPLES for examples in merged.examples.values())


def test_examples_are_the_first_that_come():
    rejected = RejectedRows()
    for line in (9, 3, 7, 1, 8, 2):
        rejected.add("c1", bad_row(line, "bad_audio"))
    assert [row.line for row in rejected.first("c1", "bad_audio")] == [9, 3, 7, 1, 8]
    assert rejected.counts["c1", "bad_audio"] == 6
    rejected.extend("c1", "bad_audio", 10, [ExampleRow("/m.jsonl", 40, "")])
    assert [row.line for row in rejected.first("c1", "bad_audio")] == [9, 3, 7, 1, 8]
    assert rejected.of_corpus("c1") == {"bad_audio": 16} and rejected.of_corpus("c2") == {}


def test_lines_of_chunks_become_lines_of_files():
    rejected = RejectedRows()
    rejected.add("c1", bad_row(2, "bad_json"), chunk=0)
    rejected.add("c1", bad_row(1, "bad_json"), chunk=1)
    rejected.number_lines([1, 11])
    assert [row.line for row in rejected.first("c1", "bad_json")] == [2, 11]


def test_a_chunks_examples_are_by_reason():
    rejected = of_chunk(2, [(4, "empty_text"), (2, "bad_json")])
    assert list(rejected.first_of_corpus("c2").items()) == [
        ("bad_json", [ExampleRow("/m.jsonl", 2, "line 2")]),
        ("empty_text", [ExampleRow("/m.jsonl", 4, "line 4")]),
    ]
    assert rejected.by_reason() == {"bad_json": 1, "empty_text": 1}


def test_chosen_reasons_are_counted_apart():
    rejected = of_chunk(0, [(4, "empty_text"), (2, "bad_json"), (3, "bad_json")])
    rejected.judged_by = "the headers of 2 recordings"
    bad = rejected.selected(group for group in rejected.counts if group[1] == "bad_json")
    assert (bad.bad, bad.num_rows, bad.judged_by) == (2, 50, "the headers of 2 recordings")
    assert bad.too_many(0.03) and not bad.too_many(0.04)
    assert bad.lines() == ["corpus c1: /m.jsonl:2: bad_json: line 2", "corpus c1: /m.jsonl:3: bad_json: line 3"]


def test_an_entry_of_an_artifact_has_an_example():
    entry = RejectedExamples("c1", "bad_json", 1, [ExampleRow("/m.jsonl", 2, "x")])
    assert entry.to_dict() == asdict(entry)
    assert entry.to_dict()["first"] == [{"file": "/m.jsonl", "line": 2, "detail": "x"}]
    with pytest.raises(ValueError, match="no example"):
        RejectedExamples("c1", "bad_json", 1, [])
