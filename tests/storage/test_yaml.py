"""Any YAML file is read as plain values or rejected with a sentence, in little time and memory."""

import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.config import Config, load_config
from raytrain.errors import ConfigError
from raytrain.redaction import redacted
from raytrain.storage.yaml_loading import MAX_DEPTH, load_yaml

START = "name: a\ndata: {train: [a.jsonl]}\n"
BOMB = "[x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"b{i}: &b{i} [{','.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 9))
CHOICES = ["        - &b0 [x,x,x,x,x,x,x,x,x,x]"] + [
    f"        - &b{i} [{','.join([f'*b{i - 1}'] * 10)}]" for i in range(1, 9)
]
IN_A_SPACE = START + "tune:\n  space:\n    train.accumulate:\n      choice:\n" + "\n".join(CHOICES)
CHAIN = "b0: &b0 [1]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}]\n" for i in range(1, 500))


def test_values_aliases_and_merges_are_read():
    text = "a: &base {x: 1, y: 2}\nb: {<<: *base, y: 3}\nc: [*base, *base]\n"
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml(text)["b"] == {"x": 1, "y": 3}
    assert load_yaml("") is None
    assert load_yaml("﻿a: ü".encode()) == {"a": "ü"}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"b0: &b0 " + BOMB.encode(), "aliases expand to more than"),
        (IN_A_SPACE.encode(), "aliases expand to more than"),
        (CHAIN.encode(), "nested more than"),
        (b"x: &r [1, *r]", "holds itself"),
        (b"a: " + b"[" * 20_000, "nested more than"),
        (b"a: " + b"{a: " * 20_000, "nested more than"),
        (b"- " * 20_000, "nested more than"),
        ("name: a".encode("utf-16"), "not UTF-8"),
        (b"\xff\xfe\x00name: x\n", "not UTF-8"),
        (b"a: \x00", "not valid YAML"),
        (b"a: " + b"x" * (1 << 20), "larger than"),
        (b"name: a\nname: b", "line 2: the key 'name' appears twice"),
        (b'train: {seed: 1, "seed": 2}', "the key 'seed' appears twice"),
        (b"a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"a: !!bool x", "not valid YAML"),
        (b"a: !!timestamp x", "not valid YAML"),
        (b"a: 2024-99-99", "not valid YAML"),
        (b"? [a]\n: b", "not valid YAML"),
        (b"[1, 2]", "must hold sections"),
        (b"0", "must hold sections"),
    ],
)
def test_a_configuration_of_unsafe_yaml_is_rejected(tmp_path, data, why):
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=why) as caught:
        load_config(path)
    assert caught.value.remedy and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "override",
    [
        "=3",
        "x",
        "",
        "train..max_steps=3",
        ".train=1",
        "train.=1",
        " =1",
        "data.train.0=x",
        "name.x=1",
        "train.max_steps=[1",
        "train.max_steps={",
        "train.max_steps=" + "[" * 5000,
        "train.max_steps=\x00",
        "seed=*a",
        "train.max_steps=!!python/object/apply:os.system ['true']",
        "seed=\udcff",
    ],
)
def test_an_override_that_is_none_is_refused(tmp_path, override):
    (tmp_path / "a.yaml").write_text(START)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "a.yaml", [override])
    assert caught.value.remedy


@settings(max_examples=300, deadline=2000)
@given(st.one_of(st.binary(max_size=200), st.text(alphabet="[]{}&*a: -\n!\"'<|>#,?%0.~x\t", max_size=200)))
def test_any_text_is_values_or_a_value_error(data):
    try:
        values = load_yaml(data)
    except ValueError:
        return
    redacted(values)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=150, deadline=2000)
@given(PLAIN)
def test_what_is_written_is_read(values):
    assert load_yaml(yaml.safe_dump(values)) == values


@settings(max_examples=200, deadline=5000)
@given(st.dictionaries(st.sampled_from([*Config.model_fields, "x"]), PLAIN, max_size=3))
def test_any_values_are_a_configuration_or_a_config_error(values):
    try:
        load_config(None, [], base={"name": "a", "data": {"train": ["a"]}, **values})
    except ConfigError as error:
        assert str(error)


def test_a_list_that_is_shared_is_redacted_once():
    shared: list = ["https://ann:pw@host/x"]
    for _ in range(MAX_DEPTH):
        shared = [shared, shared]
    clean = redacted(shared)
    while isinstance(clean, list):
        clean = clean[-1]
    assert clean == "https://***@host/x"


def test_a_pipe_without_a_writer_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="data: missing"):
        load_config(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"a: [" + b"1," * 60_000 + b"]", "more than 50000 values"),
        (b"a: 1" + b":5" * 100_000, "line 1: the number has more than 100 characters"),
        (b"!!bool x", "does not fit its tag"),
        (b"!!timestamp x", "does not fit its tag"),
    ],
)
def test_expensive_or_impossible_values_are_rejected_at_once(data, why):
    with pytest.raises(ValueError, match=why):
        load_yaml(data)


@pytest.mark.parametrize("value", ["no", "on", "1:30", "2024-01-01", "7"])
def test_values_that_yaml_reads_as_another_type_must_be_quoted(tmp_path, value):
    path = tmp_path / "c.yaml"
    path.write_text(f"name: a\ndata: {{default_language: {value}, train: [a.jsonl]}}\n")
    with pytest.raises(ConfigError, match="default_language.*quote it"):
        load_config(path)
    assert load_config(path, [f"data.default_language='{value}'"]).data.default_language == value


def test_names_have_no_nul_and_thousands_of_problems_are_counted(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text('name: a\nrun: {root: "a\\0b"}\ndata: {train: [a.jsonl]}\n')
    with pytest.raises(ConfigError, match="run.root contains a NUL"):
        load_config(path)
    path.write_text("".join(f"key{number}: 1\n" for number in range(5000)))
    with pytest.raises(ConfigError, match=r"(?s)5002 problem.*\n  … and 4952 more") as caught:
        load_config(path)
    assert len(str(caught.value)) < 20_000
