"""YAML is read as plain values or refused with a sentence, whatever is in the file, in little time and memory."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.config import Config, load_config
from raytrain.errors import ConfigError
from raytrain.redaction import redacted
from raytrain.yaml_loading import MAX_DEPTH, load_yaml

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
        (b"b0: &b0 " + BOMB.encode(), "aliases stand for more than"),
        (IN_A_SPACE.encode(), "aliases stand for more than"),
        (CHAIN.encode(), "nested more than"),
        (b"x: &r [1, *r]", "holds itself"),
        (b"a: " + b"[" * 20_000, "nested more than"),
        (b"a: " + b"{a: " * 20_000, "nested more than"),
        (b"- " * 20_000, "nested more than"),
        ("name: a".encode("utf-16"), "not UTF-8"),
        (b"\xff\xfe\x00name: x\n", "not UTF-8"),
        (b"a: \x00", "not valid YAML"),
        (b"a: " + b"x" * (1 << 20), "larger than"),
        (b"name: a\nname: b", "line 2: the key 'name' is there twice"),
        (b'train: {seed: 1, "seed": 2}', "the key 'seed' is there twice"),
        (b"a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"a: !!bool x", "not valid YAML"),
        (b"a: !!timestamp x", "not valid YAML"),
        (b"a: 2024-99-99", "not valid YAML"),
        (b"? [a]\n: b", "not valid YAML"),
        (b"[1, 2]", "must hold sections"),
        (b"0", "must hold sections"),
    ],
)
def test_a_configuration_that_is_no_sane_yaml_is_refused(tmp_path, data, why):
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=why) as caught:
        load_config(path)
    assert caught.value.remedy and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "override",
    ["=3", "x", "", "train..max_steps=3", ".train=1", "train.=1", " =1", "data.train.0=x", "name.x=1",
     "train.max_steps=[1", "train.max_steps={", "train.max_steps=" + "[" * 5000, "train.max_steps=\x00", "seed=*a",
     "train.max_steps=!!python/object/apply:os.system ['true']", "seed=\udcff"],
)  # fmt: skip
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
