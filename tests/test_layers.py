"""The walls of the house: who may import what, and what imports without what."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "raytrain"
CORE = {"raytrain.errors", "raytrain.ranges", "raytrain.lengths"}
REDACTION = "raytrain.redaction"
ALLOWED = {
    "lengths": {"numpy", *CORE},
    "model": {
        "numpy",
        "torch",
        "sentencepiece",
        "safetensors",
        "yaml",
        "raytrain.model",
        "raytrain.artifacts",
        "raytrain.yaml_loading",
        *CORE,
    },
    "data": {
        "numpy",
        "torch",
        "lhotse",
        "sentencepiece",
        "pyarrow",
        "fsspec",
        "orjson",
        "soundfile",
        "miniaudio",
        "soxr",
        "scipy",
        "raytrain.telling",
        "raytrain.data",
        "raytrain.artifacts",
        *CORE,
    },
    "training": {
        "numpy",
        "torch",
        "jiwer",
        "sacrebleu",
        "whisper_normalizer",
        "raytrain.training",
        "raytrain.model",
        "raytrain.data",
        "raytrain.artifacts",
        *CORE,
    },
    "tracking": {"raytrain.tracking", "raytrain.artifacts", "raytrain.errors", REDACTION},
    "report": {"numpy", "matplotlib", "jinja2", "pyarrow", "raytrain.report", "raytrain.artifacts", REDACTION, *CORE},
}


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def is_allowed(module: str, allowed: set[str]) -> bool:
    return module.split(".")[0] in sys.stdlib_module_names or any(
        module == name or module.startswith(f"{name}.") for name in allowed
    )


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stay_inside_the_walls(path: Path):
    room = path.relative_to(PACKAGE).parts[0]
    found = imports(path)
    if room != "cluster":
        assert not {name for name in found if name.split(".")[0] == "ray"}, "only raytrain/cluster imports Ray"
    if path != PACKAGE / "tracking" / "mlflow.py":
        assert not {name for name in found if name.split(".")[0] == "mlflow"}, "only the tracker imports MLflow"
    else:
        found = {name for name in found if name.split(".")[0] != "mlflow"}
    if room in ALLOWED:
        assert not {name for name in found if not is_allowed(name, ALLOWED[room])}


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import {modules}
"""


@pytest.mark.parametrize(
    ("modules", "blocked"),
    [
        ("raytrain.lengths", {"torch", "ray", "mlflow", "pydantic", "lhotse", "pyarrow", "yaml"}),
        (
            "raytrain.model.canary, raytrain.model.decoding, raytrain.model.longform, raytrain.model.alignment, "
            "raytrain.model.inference, raytrain.model.nemo, raytrain.model.huggingface, raytrain.training.loop, "
            "raytrain.training.memory, "
            "raytrain.training.checkpoint, raytrain.training.validation, raytrain.training.probe, "
            "raytrain.training.isolated, raytrain.training.scoring, raytrain.training.worst, "
            "benchmarks.oomptimizer_gpu, benchmarks.gpu, benchmarks._gpu_parts, benchmarks._gpu_pipeline, "
            "benchmarks._gpu_ranks, test_gpu",
            {
                "ray",
                "mlflow",
                "pydantic",
                "lhotse",
                "yaml",
                "soundfile",
                "pyarrow",
                "orjson",
                "jiwer",
                "sacrebleu",
                "whisper_normalizer",
                "rich",
                "safetensors",
                "psutil",
            },
        ),
    ],
)
def test_core_imports_without(modules: str, blocked: set[str]):
    code = BLOCK.format(blocked=blocked, modules=modules)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(PACKAGE.parent / "tests")])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
