"""Strict configuration: all problems at once, each with a hint; every shipped file loads."""

from pathlib import Path

import pytest

from raytrain.config import check_config, load_config, parse_bytes
from raytrain.data.corpora.types import Corpus
from raytrain.demo.run import demo_config
from raytrain.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = {"name": "a", "data": {"train": ["a.jsonl"]}}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    assert load_config(path).name == path.stem


def test_demo_config_loads(tmp_path):
    config = demo_config(tmp_path, tmp_path / "corpus", ["train.max_steps=7"])
    assert config.train.max_steps == 7
    assert config.run_dir == tmp_path / "demo"


def test_all_unknown_keys_are_named_at_once_with_a_suggestion():
    values = {**MINIMAL, "trian": {}, "train": {"max_step": 5}, "model": {"encoder_layer": 2, "zzz": 1}}
    with pytest.raises(ConfigError) as caught:
        check_config(values)
    text = str(caught.value)
    assert "trian: unknown key; did you mean train?" in text
    assert "train.max_step: unknown key; did you mean max_steps?" in text
    assert "model.encoder_layer: unknown key; did you mean encoder_layers?" in text
    assert "model.zzz: unknown key; allowed:" in text
    assert "4 problem(s)" in text


def test_sections_that_contradict_each_other_are_named(tmp_path):
    run = {**MINIMAL, "run": {"root": str(tmp_path)}, "model": {"max_positions": 512}}
    with pytest.raises(ConfigError, match=r"max_tokens is 1024, but the model has positions for 513.*own folder"):
        check_config({**run, "train": {"init_from": str(tmp_path / "a" / "checkpoints")}})


def test_wrong_values_are_named():
    with pytest.raises(ConfigError) as caught:
        check_config({**MINIMAL, "train": {"num_workers": 0, "ctc_weight": 1}, "oomptimize": {"device_memory": "x"}})
    text = str(caught.value)
    assert "train.num_workers: must be from 1 to 65536, got 0" in text
    assert "train.ctc_weight: must be at least 0 and below 1, got 1" in text
    assert "'x' is not a size" in text


@pytest.mark.parametrize("threads", ["many", "8", "", 0, -1, 2.5, None])
def test_loader_threads_are_auto_or_a_positive_number(threads):
    assert check_config(MINIMAL).train.num_loader_threads == "auto"
    assert check_config({**MINIMAL, "train": {"num_loader_threads": 7}}).train.num_loader_threads == 7
    with pytest.raises(ConfigError, match="num_loader_threads"):
        check_config({**MINIMAL, "train": {"num_loader_threads": threads}})


def test_overrides_reach_nested_keys_and_refuse_nonsense(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: a\ndata: {train: [a.jsonl]}\n")
    config = load_config(path, ["model.spec_augment.freq_masks=7", "buckets.tps_sigma=null"])
    assert config.model.spec_augment.freq_masks == 7
    assert config.buckets.tps_sigma is None
    with pytest.raises(ConfigError, match="section.key=value"):
        load_config(path, ["nonsense"])
    with pytest.raises(ConfigError, match="name is a value"):
        load_config(path, ["name.x=1"])


@pytest.mark.parametrize(("text", "number"), [("16GiB", 16 << 30), ("1.5KB", 1500), ("512 MiB", 512 << 20), (7, 7)])
def test_sizes(text, number):
    assert parse_bytes(text) == number


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_data_root_comes_from_config_or_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYTRAIN_DATA_ROOT", str(tmp_path))
    assert check_config(MINIMAL).data.corpora("train") == [Corpus("a", (f"{tmp_path}/a.jsonl",))]
    rooted = check_config({**MINIMAL, "data": {"root": "/else", "train": ["a.jsonl"]}})
    assert rooted.data.corpora("train")[0].path == ("/else/a.jsonl",)


def test_corpora_are_paths_or_sections():
    train = ["m.jsonl", "x/m.json.gz", {"name": "mls", "path": ["s3://b/m_{0..3}.json"], "language": "de"}]
    data = check_config({**MINIMAL, "data": {"root": "/r", "train": train, "default_language": "en"}}).data
    found = data.corpora("train")
    assert [corpus.name for corpus in found] == ["m", "m-2", "mls"]
    assert [corpus.language for corpus in found] == ["en", "en", "de"]
    assert [corpus.path for corpus in found] == [("/r/m.jsonl",), ("/r/x/m.json.gz",), ("s3://b/m_{0..3}.json",)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "x", "path": "p", "lnguage": "de"}, "data.train.0.lnguage: unknown key; did you mean language"),
        ({"name": "x"}, "data.train.0.path: missing"),
        ({"path": "q", "weight": 0}, "data.train.0.weight: must be above 0"),
        ({"path": "q", "format": "kaldi"}, "format: must be one of nemo, nemo_tarred, .*, audiofolder, got 'kaldi'"),
        ({"path": "q", "format": "nemo_tarred"}, "needs audio"),
    ],
)
def test_a_corpus_that_is_wrong_is_named(entry, message):
    with pytest.raises(ConfigError, match=message):
        check_config({**MINIMAL, "data": {"train": [entry]}})


def test_corpora_have_different_names():
    twice = [{"name": "x", "path": "a"}, {"name": "x", "path": "b"}]
    with pytest.raises(ConfigError, match="more than one corpus called x"):
        check_config({**MINIMAL, "data": {"train": twice}})
