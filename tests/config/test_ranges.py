"""Every number of a configuration has a range, beyond which it is refused by its dotted name."""

import dataclasses
import math
import types
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from raytrain.config import Config, Distribution, check_config, load_config, parse_bytes
from raytrain.data.augment import AugmentSettings
from raytrain.data.corpora.types import Corpus
from raytrain.decoding.settings import DecodeSettings
from raytrain.errors import ConfigError
from raytrain.lengths.plan import BucketSettings
from raytrain.model.config import ModelConfig, SpecAugmentSettings
from raytrain.settings import Range, setting_problems
from raytrain.training.settings import TrainSettings

START = {"name": "a", "data": {"train": [{"name": "c", "path": "a.jsonl"}]}, "tracking": {"enabled": False}}
NOWHERE = [math.nan, math.inf, -math.inf, 10**30, -(10**30)]
# Decibels, and ends of a search's ranges.
MAY_BE_NEGATIVE = {"augment.noise_snr_db", "augment.gain_db", "tune.space.x.uniform", "tune.space.x.log_uniform"}


def numbers(kind, name: str = ""):
    """(dotted name, number of values in a tuple or list or None, range or None) of every number below a type."""
    if isinstance(kind, type) and issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind):
        for field, hint in typing.get_type_hints(kind, include_extras=True).items():
            if field in (getattr(kind, "model_fields", None) or {item.name for item in dataclasses.fields(kind)}):
                yield from numbers(hint, f"{name}.{field}" if name else field)
        return
    arguments = [item for item in typing.get_args(kind) if item is not type(None)]
    origin = typing.get_origin(kind)
    if origin is dict:
        yield from numbers(arguments[1], f"{name}.x")
    elif origin in (list, tuple):
        inner = list(numbers(arguments[0], f"{name}.0"))
        length = 1 if origin is list or Ellipsis in arguments else len(arguments)
        yield from (
            (name, length, limits) if path == f"{name}.0" else (path, size, limits) for path, size, limits in inner
        )
    elif origin is typing.Annotated:
        limits = next((item for item in kind.__metadata__ if isinstance(item, Range)), None)
        yield from (
            (path, length, limits or inner_limits) for path, length, inner_limits in numbers(arguments[0], name)
        )
    elif origin in (typing.Union, types.UnionType):
        for item in arguments:
            yield from numbers(item, name)
    elif kind in (int, float):
        yield name, None, None


NUMBERS = list(numbers(Config))


def with_value(dotted: str, value) -> dict:
    """A small configuration in which one setting has a value."""
    values = yaml.safe_load(yaml.safe_dump(START))
    node = values
    *parents, last = dotted.split(".")
    for part, following in zip(parents, [*parents, last][1:], strict=True):
        fresh = [{"name": "d", "path": "b"}] if following == "0" else {}
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, fresh)
    node[last] = value
    return values


def test_all_numbers_have_a_range():
    assert len(NUMBERS) > 90
    assert [path for path, _, limits in NUMBERS if limits is None] == []


@pytest.mark.parametrize(("path", "length", "limits"), NUMBERS, ids=[path for path, _, _ in NUMBERS])
def test_a_number_out_of_its_range_is_refused_by_its_name(path, length, limits):
    negative = [] if path in MAY_BE_NEGATIVE else [-1]
    for wrong in (*NOWHERE, *negative):
        value = wrong if length is None else [wrong] * length
        with pytest.raises(ConfigError) as caught:
            check_config(with_value(path, value))
        text = str(caught.value)
        assert path in text, text
        if limits is not None and isinstance(wrong, int):
            assert str(limits) in text, text


@pytest.mark.parametrize("path", sorted(path for path, _, _ in NUMBERS))
@pytest.mark.parametrize("value", ["x", "", True, {}, [[]], {"a": 1}, "1e999", "nan", [None]])
def test_what_is_no_number_is_refused_too(path, value):
    with pytest.raises(ConfigError):
        check_config(with_value(path, value))


@pytest.mark.parametrize(
    "kind", [TrainSettings, ModelConfig, SpecAugmentSettings, AugmentSettings, BucketSettings, DecodeSettings, Corpus]
)
def test_ranges_hold_without_pydantic(kind):
    """Settings are also made from a checkpoint's description, and by code."""
    given = {"name": "a", "path": "a"} if kind is Corpus else {}
    whole = kind(**given)
    assert setting_problems(whole) == []
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        limits = [item for path, _, item in numbers(hint, name) if path == name and item is not None]
        for wrong in (math.nan, math.inf, -(10**30), b"x") if limits else ():
            with pytest.raises(ValueError, match=f"{name} must be"):
                dataclasses.replace(whole, **{name: wrong})


@given(st.floats(allow_nan=True), st.floats(-5, 5), st.floats(0, 5), st.booleans(), st.booleans())
def test_a_range_is_what_it_says(number, low, width, above, below):
    span = Range(low, low + width, above, below)
    inside = (number > low if above else number >= low) and (number < low + width if below else number <= low + width)
    assert (number in span) == inside == (span.problem(number) is None)
    assert span.problem(None) is span.problem("auto") is None


@given(st.text(alphabet="0123456789.eGiBKMT xinfa-", max_size=40))
def test_any_size_is_bytes_or_a_value_error(text):
    try:
        assert parse_bytes(text) >= 0
    except ValueError as error:
        assert "is not a size" in str(error)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("oomptimize.device_memory=1..2GiB", "is not a size"),
        ("train.num_workers=[3, 2]", r"num_workers must be a number, or \[least, most\], got \[3, 2\]"),
        ("train.min_learning_rate=1", "min_learning_rate must be at most learning_rate"),
        ("model.encoder_width=33", "encoder_width 33 must be a multiple of encoder_heads 8"),
        ("model.conv_kernel=8", "conv_kernel must be odd"),
        ("model.mel_bins=12", "mel_bins must be a multiple of 8"),
        ("augment.gain_db=[3, -3]", r"gain_db must be \[low, high\]"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, override, message):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(START))
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "a.yaml", [override])


def test_ends_of_a_search_are_numbers():
    with pytest.raises(ValueError, match="finite number"):
        Distribution(uniform=(math.nan, 1))


def test_every_file_with_settings_loads():
    files = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert len(files) > 6
    for path in files:
        load_config(path)
