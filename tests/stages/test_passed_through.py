"""What a manifest says is in the output of `transcribe` as it stood; nothing that is there is overwritten unasked."""

import json
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from raytrain.cli.app import app
from raytrain.console import Console
from raytrain.data.corpora.lines import WHOLE
from raytrain.data.corpora.types import Chunk, Corpus
from raytrain.decoding.requests import ManifestRow, Prompts, Request, read_requests
from raytrain.errors import ConfigError, RaytrainError, StorageError
from raytrain.operations.transcript_parts import Part, PartTranscriber, cut_parts
from raytrain.operations.transcription import TranscriptionSpec, transcribe_manifests
from raytrain.storage.finished import FinishedParts
from raytrain.training.conversion import Format, check_target

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
numbers = st.from_regex(NUMBER, fullmatch=True).filter(lambda text: abs(float(text)) < 1e308)
texts = st.text(st.characters(exclude_categories=["Cs"])).map(json.dumps)
scalars = numbers | texts | st.sampled_from(["null", "true", "false", '""'])
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(texts, inner, max_size=3).map(lambda items: f"{{{', '.join(map(': '.join, items.items()))}}}")
    ),
    max_leaves=6,
)


def spelled(text: str):
    """A JSON value with numbers as they are spelled."""
    return json.loads(text, parse_int=lambda number: ("number", number), parse_float=lambda number: ("number", number))


def written(chunk: Chunk) -> list[bytes]:
    # Without audio every row has an error, and no tokenizer is asked for a prompt.
    rows = read_requests([chunk], Prompts(None, "canary2", 96))
    return [line for part in cut_parts(rows, 2) for line in part.lines()[0]]


@given(ids=st.lists(values, min_size=1, max_size=5))
@example(
    ids=["12345678901234567890123", "1.50", "-0", "1e5", "0.1000000000000000055511151231257827", "18446744073709551615"]
)
@example(ids=['[12345678901234567890123, {"a": [1.0]}]', "null"])
def test_fields_come_back_as_they_were(ids, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "m.jsonl"
    path.write_text("\n\n".join(f'{{"id": {one}, "duration": 1.50, "text": "a"}}' for one in ids))
    for chunk_format in ("nemo", "audiofolder"):
        lines = written(Chunk(str(path), 0, WHOLE, format=chunk_format, first_line=1))
        assert [spelled(line.decode())["id"] for line in lines] == list(map(spelled, ids))
        assert all(b'"duration":1.50' in line and b"missing_field" in line for line in lines)


def test_ids_of_cuts_come_back_as_they_were(tmp_path):
    path = tmp_path / "cuts.jsonl"
    path.write_text(
        '{"id": 12345678901234567890123, "channel": 0, "duration": 1.5, "recording": {"sources": [{"type": '
        '"file", "channels": [0], "source": ""}]}, "supervisions": []}\n'
    )
    (line,) = written(Chunk(str(path), 0, WHOLE, format="lhotse_cuts", first_line=1))
    assert b'"id":12345678901234567890123' in line


@pytest.fixture
def order(tmp_path) -> TranscriptionSpec:
    """An order that could be refused only for its output: there is no model."""
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 1}\n')
    return TranscriptionSpec((Corpus("m", str(tmp_path / "m.jsonl")),), tmp_path / "out.jsonl", tmp_path / "model")


def refusal(order: TranscriptionSpec) -> str:
    with pytest.raises(RaytrainError) as error:
        transcribe_manifests(order, Console(quiet=True))
    return str(error.value)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_the_output_is_no_input(order, tmp_path, link, overwrite):
    manifest = tmp_path / "m.jsonl"
    output = manifest if link is None else tmp_path / "link.jsonl"
    if link is not None:
        link(manifest, output)
    before = manifest.read_bytes()
    for corpus in (
        Corpus("m", str(manifest)),
        Corpus("m", f"file://{manifest}"),
        Corpus("m", str(tmp_path / "m*.jsonl")),
    ):
        message = refusal(replace(order, corpora=(corpus,), output=output, overwrite=overwrite))
        assert "the output is a file that the command reads" in message and "to do: choose another --output" in message
    assert manifest.read_bytes() == before


def test_a_file_that_is_there_is_overwritten_only_when_asked(order, tmp_path):
    assert "no model" in refusal(order)
    order.output.write_text("mine")
    assert "out.jsonl exists already" in refusal(order) and "--overwrite" in refusal(order)
    assert "no model" in refusal(replace(order, overwrite=True))
    assert order.output.read_text() == "mine"
    order.output.unlink()
    order.output.symlink_to(tmp_path / "nowhere")
    assert "exists already" in refusal(order)
    assert "exists already" in refusal(replace(order, output=tmp_path, overwrite=True))


def test_what_is_no_file_is_never_replaced(order, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        for overwrite in (False, True):
            message = refusal(replace(order, output=tmp_path / name, overwrite=overwrite))
            assert "exists already; because it is not a file" in message
    assert "can't write" in refusal(replace(order, output=tmp_path / ("x" * 300)))


def test_what_the_command_reads_is_never_replaced(order, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.pt").write_text("weights")
    message = refusal(replace(order, checkpoint=model, output=model / "model.pt", overwrite=True))
    assert "the output is a file that the command reads" in message
    output = tmp_path / "a.wav"
    output.write_text("audio")
    parts = FinishedParts(output, "key", overwrite=True)
    transcriber = PartTranscriber(parts, None, SimpleNamespace(workers=1, cuda=False), None, lambda **options: None)
    row = ManifestRow({}, Request(str(tmp_path / "." / "a.wav"), 0, 0, 0, 1000, ()))
    with pytest.raises(ConfigError, match="the output is a file that the command reads"):
        next(transcriber.batches([Part(0, [row], 0)]))


def test_a_file_that_came_meanwhile_is_kept_and_so_are_the_parts(tmp_path):
    output = tmp_path / "out.jsonl"
    parts = FinishedParts(output, "key")
    parts.write(0, "rows", [b"{}"], 0)
    output.write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        parts.join(1)
    assert output.read_text() == "mine"
    again = FinishedParts(output, "key", overwrite=True)
    assert again.find(0, "rows") is not None
    (again.folder / "notes.txt").write_text("mine too")
    again.join(1)
    assert output.read_text() == "{}\n" and [path.name for path in again.folder.iterdir()] == ["notes.txt"]


def test_converting_replaces_a_file_only_when_asked(tmp_path):
    source, target = tmp_path / "a.nemo", tmp_path / "b.nemo"
    source.touch()
    check_target(source, target, Format.nemo, overwrite=False)
    target.touch()
    with pytest.raises(StorageError, match="exists already.*--overwrite"):
        check_target(source, target, Format.nemo, overwrite=False)
    check_target(source, target, Format.nemo, overwrite=True)
    target.unlink()
    target.symlink_to(source)
    with pytest.raises(StorageError, match="is the input model"):
        check_target(source, target, Format.nemo, overwrite=True)
    done = CliRunner().invoke(app, ["convert", str(source), str(target), "--overwrite"])
    assert isinstance(done.exception, StorageError)
