"""A run folder started by an earlier version of the code resumes with this version: no artifact changed its format.

`fixtures/earlier_run.tar.xz` holds a corpus of 16 utterances and the run folder of its whole pipeline with 4 training
steps, made by the code before the package was divided into its present folders. Rows hold absolute paths of audio, so
it is unpacked where it was made.
"""

import fcntl
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from conftest import copied

from raytrain.config import load_config
from raytrain.console import Console
from raytrain.stages.pipeline import STAGE_NAMES, run_pipeline

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "earlier_run.tar.xz"
FOLDER = Path("/tmp/raytrain-earlier-run")


@pytest.fixture(scope="module")
def earlier():
    """The configuration of the earlier run; one process at a time has its folder."""
    with FOLDER.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(FOLDER, ignore_errors=True)
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(FOLDER, filter="data")
        yield load_config(FOLDER / "tiny.yaml")
        shutil.rmtree(FOLDER)


def test_stages_are_up_to_date_but_for_what_the_tracer_predicts_otherwise_now(earlier):
    """The tracer's version has changed since; the sizes are the same, so training is not repeated."""
    assert run_pipeline(earlier, Console(quiet=True), STAGE_NAMES) == ["oomptimize", "report"]
    assert run_pipeline(earlier, Console(quiet=True), STAGE_NAMES) == []


@pytest.mark.usefixtures("local_ray")
def test_training_resumes_from_its_checkpoint(earlier, tmp_path):
    longer = copied(earlier, tmp_path, train={"max_steps": 6})
    assert run_pipeline(longer, Console(quiet=True), ("train",)) == ["train"]
    steps = [line["step"] for line in read_lines(longer.run_dir / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not (longer.run_dir / "previous").exists()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
