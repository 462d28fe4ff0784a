"""Every key of the configuration is explained: by `raytrain config` and in docs/configuration.md."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raytrain.cli.app import app
from raytrain.config import check_config
from raytrain.config.reference import Values, entries, keys_below, nearest

ROOT = Path(__file__).parents[2]
SMALL = {"name": "a", "data": {"train": ["a.jsonl"], "stream": {}}, "oomptimize": {"device_memory": "16GiB"}}


def keys_of(values: dict, prefix: str = "") -> set[str]:
    """Dotted keys of all values; a list or a mapping of any names is one value."""
    keys = set()
    for name, value in values.items():
        key = f"{prefix}{name}"
        is_section = isinstance(value, dict) and key != "tune.space" and not key.startswith("cluster.")
        keys |= keys_of(value, f"{key}.") if is_section else {key}
    return keys


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["config", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs/make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(generator):
    assert generator.PAGE.read_text() == generator.make_page(), "run python docs/make_configuration.py"
    assert "docs/configuration.md" in (ROOT / "README.md").read_text()


def test_the_check_of_the_page_says_when_it_is_stale(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_configuration.py", "--check"])
    assert generator.main() == 0
    monkeypatch.setattr(generator, "PAGE", tmp_path / "configuration.md")
    assert generator.main() == 1
    assert not generator.PAGE.exists()


@pytest.mark.parametrize("entry", entries(), ids=[entry.key for entry in entries()])
def test_every_setting_has_a_sentence(entry):
    assert entry.help.endswith(".")


def test_json_has_every_key():
    lines = [json.loads(line) for line in shown("--json").splitlines()]
    keys = {line["key"] for line in lines}
    assert len(keys) == len(lines) > 120
    values = check_config(SMALL).model_dump(mode="json")
    assert keys_of(values) <= keys
    assert {key for key in keys if "*" not in key} - {"data.stream"} == keys_of(values)
    assert {f"data.train.*.{name}" for name in keys_below(["data", "dev", "0"])} <= keys


def test_facts_are_those_of_the_settings():
    facts = {entry.key: entry for entry in entries()}
    rate = facts["train.learning_rate"]
    assert (rate.default, rate.allowed, rate.lineage) == (3e-4, "above 0 and at most 100", True)
    assert (facts["train.max_steps"].unit, facts["train.max_steps"].lineage) == ("steps", False)
    assert facts["train.device"].allowed == "auto, cpu or cuda"
    assert facts["run.cache_size"].shown_default == "50GiB"
    assert facts["data.train"].is_required and facts["data"].is_section
    assert facts["augment.noise_snr_db"].default == [10.0, 30.0]


def test_values_of_a_configuration_stand_beside_the_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\ndata: {train: [a.jsonl]}\ntrain: {max_steps: 7}\n")
    arguments = ("--config", str(tmp_path / "a.yaml"), "--set", "train.keep_best=3")
    facts = {line["key"]: line for line in map(json.loads, shown("train", "--json", *arguments).splitlines())}
    assert (facts["train.max_steps"]["default"], facts["train.max_steps"]["value"]) == (1000, 7)
    assert facts["train.keep_best"]["value"] == 3
    text = shown("train.max_steps", *arguments)
    assert text.splitlines()[4].split()[:3] == ["max_steps", "1000", "7"]
    values = Values(check_config({"name": "a", "data": {"train": ["a.jsonl"]}}))
    assert "data.stream.buffer_size" not in values and "data.train.*.path" not in values
    assert values["data.stream"] is None


def test_a_section_or_a_key_is_shown_alone_within_80_columns():
    text = shown("model.spec_augment")
    assert "freq_masks" in text and "encoder" not in text
    assert max(map(len, shown().splitlines())) <= 80
    assert "Peak learning rate" in shown("train.learning_rate")


def test_an_unknown_key_comes_with_the_nearest():
    assert nearest("train.max_step") == "train.max_steps"
    assert nearest("beta1") == "train.beta1"
    result = CliRunner().invoke(app, ["config", "train.learning_rat"])
    assert result.exit_code == 2
    assert "did you mean train.learning_rate" in " ".join(result.output.replace("│", " ").split())
    assert CliRunner().invoke(app, ["config", "--set", "seed=1"]).exit_code == 2


def test_the_core_needs_no_pydantic():
    code = "import sys; import raytrain.training.settings, raytrain.decoding.settings, raytrain.model.config; "
    code += "assert not {'pydantic', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
