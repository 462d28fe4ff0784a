"""The walls of the house: who may import what, and what imports without what."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "raytrain"
# From the ground up: a room imports from itself and from those before it.
ROOMS = (
    "__init__",  # imports the rest only when a name is used
    "errors",
    "settings",
    "redaction",
    "waiting",
    "console",
    "storage",
    "lengths",
    "data",
    "model",
    "decoding",
    "evaluation",
    "training",
    "config",
    "tracking",
    "report",
    "run_folder",
    "cluster",
    "stages",
    "experiments",
    "operations",
    "demo",
    "cli",
    "__main__",
)
# What rooms with few dependencies take from outside the standard library.
PACKAGES = {
    "errors": set(),
    "settings": {"pydantic_core"},
    "redaction": set(),
    "waiting": set(),
    "console": {"rich"},
    "storage": {"fsspec", "numpy", "orjson", "psutil", "pyarrow", "pydantic", "typing_extensions", "yaml"},
    "lengths": {"numpy"},
    "data": {
        "fsspec",
        "lhotse",
        "miniaudio",
        "numpy",
        "orjson",
        "pyarrow",
        "scipy",
        "sentencepiece",
        "soundfile",
        "soxr",
        "torch",
    },
    "model": {"numpy", "safetensors", "sentencepiece", "torch", "triton", "yaml"},  # triton only where kernels run
    "decoding": {"numpy", "torch"},
    "evaluation": {"jiwer", "numpy", "sacrebleu", "whisper_normalizer"},
    "training": {"numpy", "torch"},
    "config": {"pydantic", "yaml"},
    "tracking": {"mlflow", "psutil"},
    "report": {"jinja2", "matplotlib", "numpy", "pyarrow"},
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


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_each_room_is_on_the_list():
    there = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in files()}
    assert there == set(ROOMS)


@pytest.mark.parametrize("path", files(), ids=named)
def test_arrows_point_down(path: Path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        pytest.skip("the public names come from everywhere, each when it is used")
    below = set(ROOMS[: ROOMS.index(room) + 1])
    mentioned = {name for name in imports(path) if name.split(".")[0] == "raytrain"}
    assert {name for name in mentioned if room_of(name) not in below} == set()


@pytest.mark.parametrize("path", files(), ids=named)
def test_packages_stay_in_their_rooms(path: Path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    packages = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"raytrain"}
    if room != "cluster":
        assert "ray" not in packages, "only raytrain/cluster imports Ray"
    if path != PACKAGE / "tracking" / "mlflow.py":
        assert "mlflow" not in packages, "only the tracker imports MLflow"
    if room in PACKAGES:
        assert packages - PACKAGES[room] == set()


def test_no_file_imports_itself_by_way_of_others():
    by_file = {module_of(path): {name for name in imports_at_start(path)} for path in files()}
    graph = {name: {target for target in targets if target in by_file} for name, targets in by_file.items()}
    cycles = list(circles(graph))
    assert cycles == []


def module_of(path: Path) -> str:
    parts = ("raytrain", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def imports_at_start(path: Path) -> set[str]:
    """Modules that a file imports when it is imported, with those of `from package import module`."""
    statements = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = set()
    for node in statements:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Each group of files of which every one reaches the others."""
    reach = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    yield from sorted(
        {tuple(sorted(b for b in graph if b in reach[a] and a in reach[b])) for a in graph if a in reach[a]}
    )


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
            "raytrain.model.canary, raytrain.decoding.search, raytrain.decoding.longform, raytrain.decoding.alignment, "
            "raytrain.decoding.precision, raytrain.model.formats.nemo, raytrain.model.formats.huggingface, "
            "raytrain.training.loop, "
            "raytrain.training.memory.tracer, "
            "raytrain.training.checkpoint, raytrain.training.validation, raytrain.training.memory.step_meter, "
            "raytrain.training.memory.isolated_meter, raytrain.evaluation.scoring, raytrain.evaluation.worst, "
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
