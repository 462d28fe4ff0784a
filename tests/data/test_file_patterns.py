"""File name patterns work as in a shell, and matches come in natural order."""

import random
import re
import shutil
import string
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data.corpora.reading import plan_chunks
from raytrain.data.corpora.types import Corpus
from raytrain.storage.filesystem import list_files
from raytrain.storage.locations import absolute, natural_key
from raytrain.storage.patterns import expand

end = st.one_of(
    st.integers(-120, 120).map(str),
    st.integers(0, 120).map("{:03d}".format),
    st.integers(0, 9).map("{:02d}".format),
    st.integers(0, 50).map("-0{}".format),
    st.integers(0, 50).map("+{}".format),
)
step = st.integers(-7, 7).map("..{}".format)
names = st.text(string.ascii_letters + string.digits + "_.-", max_size=4)
braces = st.one_of(
    st.builds("{}..{}{}".format, end, end, st.one_of(st.just(""), step)),
    st.builds("{}..{}".format, st.sampled_from(string.ascii_lowercase), st.sampled_from(string.ascii_lowercase)),
    st.builds("{}..{}".format, st.sampled_from(string.ascii_uppercase), st.sampled_from(string.ascii_uppercase)),
    st.lists(names, min_size=2, max_size=4).map(",".join),
    names,
)
# A word of bash must not begin with ~ or be empty, and `..` alone is no brace; a letter goes first.
patterns = st.builds(
    lambda first, parts: "x" + first + "".join("{" + inner + "}" + after for inner, after in parts),
    names,
    st.lists(st.tuples(braces, names), max_size=2),
)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@settings(max_examples=15, deadline=None)
@given(st.lists(patterns, min_size=30, max_size=30))
def test_braces_are_expanded_as_bash_does(patterns):
    # The empty items of {a,} leave words as they are: all begin with x.
    script = "set -f\n" + "\n".join(f"echo {pattern}" for pattern in patterns)
    expected = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\n")
    for pattern, line in zip(patterns, expected, strict=False):
        assert expand(pattern) == line.split(" "), pattern
        assert expand(re.sub(r"\{([^{}]*)\}", r"_OP_\1_CL_", pattern)) == [
            re.sub(r"\{([^{}]*)\}", r"_OP_\1_CL_", name) for name in line.split(" ")
        ]


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12, unique=True), st.sampled_from(["{}", "{:03d}"]))
def test_numbers_in_names_are_in_order(numbers, form):
    shards = [f"a/m{form.format(number)}_v2.json" for number in numbers]
    random.Random(1).shuffle(shards)
    assert sorted([*shards, "a/m"], key=natural_key) == ["a/m"] + [
        f"a/m{form.format(number)}_v2.json" for number in sorted(numbers)
    ]


def test_a_star_finds_files_in_natural_order_or_folders_and_nothing_hidden(tmp_path):
    for number in range(12):
        (tmp_path / f"m_{number}.json").touch()
        (tmp_path / "shar" / f"part{number}").mkdir(parents=True)
    (tmp_path / "._m_0.json").touch()
    (tmp_path / "m_folder.json").mkdir()
    expected = [f"{tmp_path}/m_{number}.json" for number in range(12)]
    assert (
        expand(f"{tmp_path}/m_*.json") == expand(f"{tmp_path}/*.json") == list_files(str(tmp_path), "m_*") == expected
    )
    assert expand(f"{tmp_path}/shar/*") == [f"{tmp_path}/shar/part{number}" for number in range(12)]
    assert expand(f"file://{tmp_path}/shar/part?") == [f"file://{tmp_path}/shar/part{number}" for number in range(10)]


def test_lists_of_files_keep_their_order(tmp_path):
    named = [f"{tmp_path}/m_{number}.json" for number in (10, 2, 1)]
    for path in named:
        open(path, "w").close()
    assert [chunk.path for chunk in plan_chunks([Corpus("c", tuple(named), "nemo")])] == named


def test_the_example_of_the_documentation_finds_its_files(tmp_path):
    text = (Path(__file__).parents[2] / "docs/corpora.md").read_text()
    example = text.partition("```yaml\n")[2].partition("```")[0].replace("s3://speech", str(tmp_path))
    entries = {entry["name"]: entry for entry in yaml.safe_load(example)["data"]["train"] if isinstance(entry, dict)}
    folder = tmp_path / "granary" / "sharded_manifests"
    folder.mkdir(parents=True)
    for number in range(512):
        (folder / f"manifest_{number}.json").touch()
        (folder.parent / f"audio_{number}.tar").touch()
    granary = Corpus(**entries["granary"])
    assert [chunk.audio for chunk in plan_chunks([granary])] == [
        f"{tmp_path}/granary/audio_{number}.tar" for number in range(512)
    ]
    for number in (0, 1):
        folder = tmp_path / "shar" / f"train-{number}"
        folder.mkdir(parents=True)
        (folder / "cuts.000000.jsonl.gz").write_bytes(b"x")
        (folder / "recording.000000.tar").touch()
    shar = Corpus("shar", entries["shar"]["path"].replace("/data/shar", f"{tmp_path}/shar"))
    assert [chunk.format for chunk in plan_chunks([shar])] == ["lhotse_shar"] * 2


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert absolute("~/a.jsonl") == absolute("~/a.jsonl", "/data") == absolute("a.jsonl", "~") == "/home/ann/a.jsonl"
    assert absolute("s3://box/~/a") == "s3://box/~/a"
