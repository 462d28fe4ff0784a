"""`import raytrain` costs nothing, and gives a notebook what the docstring shows."""

import ast
import doctest
import importlib
import json
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import raytrain

ROOT = Path(__file__).parents[1]
SHAPE = {
    "encoder_layers": 1,
    "encoder_width": 32,
    "encoder_heads": 2,
    "subsampling_channels": 16,
    "decoder_layers": 1,
    "decoder_width": 32,
    "decoder_heads": 2,
}


@pytest.fixture
def notebook(tmp_path, monkeypatch) -> Path:
    """A folder with what the examples of the docstring name: a configuration, a corpus, a model and a recording."""
    from raytrain.model.canary import Canary
    from raytrain.model.config import ModelConfig
    from raytrain.training.conversion import Format

    monkeypatch.chdir(tmp_path)
    rows = [{"audio_filepath": "talk.wav", "duration": 1.0, "text": text} for text in ("one two", "three")]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("mine.yaml").write_text(f"name: mine\ndata: {{train: [mine.jsonl]}}\nmodel: {json.dumps(SHAPE)}\n")
    soundfile.write("talk.wav", np.random.default_rng(1).normal(0, 0.1, 16_000), 16_000)
    tokenizer = raytrain.train_tokenizer({"en": ["one two three"] * 9}, 24)
    torch.manual_seed(1)
    model = Canary(ModelConfig(**SHAPE, max_positions=64, vocab_size=tokenizer.vocab_size)).eval()
    raytrain.save_model(raytrain.ModelParts.of(model, tokenizer.models), Path("mine.nemo"), Format.nemo)
    return tmp_path


def test_the_examples_of_the_docstring_hold(notebook):
    examples = doctest.DocTestParser().get_doctest(raytrain.__doc__, {}, "raytrain", None, 0)
    assert len(examples.examples) > 8
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(examples)
    assert results.failed == 0


def test_the_import_takes_no_time_and_loads_nothing():
    code = (
        "import sys, time; start = time.perf_counter(); import raytrain; took = time.perf_counter() - start; "
        "assert not {'torch', 'ray', 'numpy', 'pydantic', 'raytrain.config'} & set(sys.modules); print(took)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.02


@pytest.mark.parametrize("name", raytrain.__all__)
def test_every_public_name_is_there(name):
    module = next(module for module, names in raytrain._MODULES.items() if name in names)
    assert getattr(raytrain, name) is getattr(importlib.import_module(module), name)
    assert getattr(raytrain, name).__doc__


def test_types_lists_and_table_name_the_same():
    tree = ast.parse(Path(raytrain.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    typed = {node.module: tuple(alias.name for alias in node.names) for node in imports if "raytrain" in node.module}
    assert typed == raytrain._MODULES
    assert sorted(name for names in typed.values() for name in names) == sorted(raytrain.__all__)
    assert set(raytrain.__all__) <= set(dir(raytrain))


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = raytrain.nonsense


def test_the_version_is_that_of_the_package():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == raytrain.__version__


def test_the_readme_says_what_works(notebook, capsys):
    with tarfile.open(ROOT / "tests/fixtures/earlier_run.tar.xz") as archive:
        archive.extractall(notebook, filter="data")
    (notebook / "runs/tiny").rename(notebook / "runs/mine")
    section = (ROOT / "README.md").read_text().split("## In a notebook")[1].split("\n## ")[0]
    exec(section.split("```python\n")[1].split("```")[0], {})
    assert "('train',)" in capsys.readouterr().out
