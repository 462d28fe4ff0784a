"""`benchmarks.gpu`: parts share the time, none takes another along, and all of it runs at toy size without a GPU."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks._gpu import step_flops
from benchmarks._gpu_parts import card, measure_cell, memory, rtfx, step
from benchmarks._gpu_pipeline import is_marked, outcomes, training_figures
from benchmarks._gpu_run import GRACE_SECONDS, Bench, Part, Skipped, limit_of, need_modules, processes_of, run_part
from benchmarks._gpu_table import print_tables
from benchmarks._models import config_of, random_model
from benchmarks.gpu import PARTS, Run, chosen
from raytrain.data.batch import SpeechBatch
from raytrain.training.memory.meter import Probe
from raytrain.training.memory.prediction import predict_batch_size
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.settings import TrainSettings

ROOT, GIB = Path(__file__).parents[1], 2**30
SHAPE = (4, 20.0, 90)


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def part(name: str, weight: float = 1.0) -> Part:
    return Part(name, f"gpu_benchmark_parts:{name}", weight, name)


@pytest.mark.parametrize(
    ("name", "status", "why"),
    [
        ("ends", "done", None),
        ("dies", "failed", "its process ended with SIGSEGV"),
        ("raises", "failed", "RuntimeError: CUDA error: an illegal memory access"),
        ("skips", "skipped", "not installed here: no_such_module_anywhere"),
        ("fails", "failed", "2 tests failed"),
    ],
)
def test_how_a_part_ends_is_told(name, status, why, importable):
    outcome = run_part(part(name), "cpu", True, 60)
    assert outcome.status == status and outcome.limit == 60
    assert outcome.why is None if why is None else why in outcome.why
    if name == "ends":
        assert outcome.results == {"first": {"tiny": True, "device": "cpu"}, "second": {"value": 2}}
    if name == "dies":
        assert outcome.results == {"before": {"value": 1}}


def test_a_part_that_hangs_is_ended_with_all_its_processes_and_the_others_run(importable, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_LEAST_SECONDS", 1.0)
    document = {"device": "cpu", "machine": {"processor": "any"}, "commit": None, "parts": {}}
    path = tmp_path / "result.json"
    run = Run((part("hangs", 1.0), part("ends", 1.0)), "cpu", True, path, document)
    start = time.monotonic()
    run.run(14)
    assert time.monotonic() - start < 14
    written = json.loads(path.read_text())["parts"]
    assert written == document["parts"]
    assert written["hangs"]["status"] == "stopped" and written["ends"]["status"] == "done"
    child = written["hangs"]["results"]["child"]["id"]
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    # It left the rest of its time to the next.
    assert written["ends"]["limit_seconds"] > 14 - written["hangs"]["limit_seconds"] - 3 * GRACE_SECONDS
    assert run.failed() == []


def test_a_signal_ends_the_part_and_keeps_what_was_measured(importable, tmp_path):
    path = tmp_path / "result.json"
    code = (
        "import signal; from benchmarks import gpu; from test_gpu_benchmark import part;"
        "gpu.PARTS = (part('ends'), part('hangs'), part('ends'));"
        "gpu.main()"
    )
    command = [sys.executable, "-c", code, "--device", "cpu", "--tiny", "--minutes", "9", "--output", str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and '"child"' not in (path.read_text() if path.exists() else ""):
        time.sleep(0.1)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by a signal" in " ".join(printed.split())
    parts = json.loads(path.read_text())["parts"]
    assert [outcome["status"] for outcome in parts.values()] == ["done", "interrupted"]


def test_processes_are_known_by_their_folder(tmp_path):
    child = subprocess.Popen(["sleep", "60"], env={"TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]})
    try:
        assert processes_of(tmp_path) == [child.pid]
        assert processes_of(tmp_path / "below") == [] == processes_of(tmp_path.parent)
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("used", [0.0, 0.4, 1.0])
def test_all_parts_end_in_time_whatever_each_takes_of_its_limit(used):
    left, weights = 480.0, [item.weight for item in PARTS]
    limits = []
    for number, weight in enumerate(weights):
        limits.append(limit_of(weight, weights[number + 1 :], left))
        left -= limits[-1] * used + GRACE_SECONDS * (used == 1.0)
    assert left > -1e-6
    first = limit_of(weights[0], weights[1:], 480.0)
    assert limits[0] == first and all(limit > 0 for limit in limits)
    if used < 1:  # what the earlier ones left is there for the last
        assert limits[-1] > 2 * limit_of(weights[-1], weights[:-1], 480.0)
    assert limit_of(1.0, [], 1.0) == 0.0


def test_parts_are_chosen_by_name():
    assert chosen(None) == PARTS
    assert [item.name for item in chosen("rtfx, card")] == ["card", "rtfx"]
    with pytest.raises(ValueError, match="there is no part steps; allowed: card, tests, pipeline"):
        chosen("card,steps")


# --- what the parts measure


@pytest.fixture
def reports() -> dict:
    return {}


@pytest.fixture
def bench(reports) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a part's process
    yield Bench("cpu", True, 60.0, reports.__setitem__)
    torch.set_num_threads(threads)


def test_the_operations_of_a_step_are_those_that_pytorch_counts():
    config = config_of("canary-1b-flash")
    model = random_model(config, "meta").train()
    batch = SpeechBatch.synthetic(SHAPE[0], int(SHAPE[1] * 1000), SHAPE[2], vocab=config.vocab_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(batch.audio, batch.audio_lengths, batch.input_ids, batch.input_lengths)
    assert step_flops(config, SHAPE) == pytest.approx(3 * counter.get_total_flops(), rel=0.03)


def test_steps_are_told_with_their_share_of_the_matrix_product_and_their_kernels(bench, reports):
    step(bench)
    assert reports.pop("compilation")["compiled"] is False  # without a GPU
    steps = {title: figures for title, figures in reports.items() if not title.startswith("profile")}
    named = {title.removeprefix("autocast ").removeprefix("uncompiled ") for title in steps}
    assert len(named) == 2 and len(steps) == 6
    for title, figures in steps.items():
        batch, _, seconds, _, tokens, _ = title.split()[-6:]
        shape = (int(batch), float(seconds), int(tokens))
        assert figures["tflop"] == pytest.approx(step_flops(config_of("canary-tiny"), shape) / 1e12, rel=1e-3)
        assert figures["tflops"] == pytest.approx(figures["tflop"] / figures["step_seconds"], rel=1e-3)
        share = figures["tflops"] / figures["matrix_product_tflops"]
        assert figures["share_of_matrix_product"] == pytest.approx(share, rel=1e-3)
    for title in named:
        kernels = reports[f"profile {title}"]["operators"]
        assert len(kernels) == 10 and kernels == sorted(kernels, key=lambda row: -row["ms"])
        assert "aten::mm" in [row["name"] for row in kernels] and sum(row["share"] for row in kernels) <= 1


def test_cells_are_predicted_and_run(bench, reports):
    memory(bench)
    assert len(reports) == 2
    for figures in reports.values():
        assert 1 <= figures["batch_size"] <= figures["predicted_size"] and figures["step_seconds"] > 0
        assert sum(figures["predicted_shares"].values()) == pytest.approx(1, abs=0.01)
        assert figures["process_gib"] > 0 and "error" not in figures


@pytest.mark.parametrize(("takes", "tries"), [(0.93, 0), (1.07, 2), (3.0, None)])
def test_the_error_is_that_of_the_batch_that_fits(takes, tries):
    """On a device that takes so much of what is predicted."""
    config, settings, cell = config_of("canary-tiny"), TrainSettings(num_workers=2, compile="never"), (4000, 30)
    tracer = StepTracer(config, settings, precision="bf16", world_size=2)
    prediction = predict_batch_size(tracer, *cell, GIB, 4096)

    class Device:
        def measure(self, batch_size, edges, num_steps, *, fresh=True):
            peak = int(takes * tracer.trace(batch_size, *edges).peak_bytes)
            return Probe(batch_size, True, peak, 0.1) if peak <= GIB else Probe(batch_size, False, why="no room")

    figures = measure_cell(Device(), cell, prediction)
    assert figures["predicted_size"] == prediction.batch_size
    if tries is None:
        assert len(figures["did_not_fit"]) == 4 and figures["why"] == "none of these fits"
        return
    assert len(figures.get("did_not_fit", [])) == tries
    assert figures["error"] == pytest.approx(1 / takes - 1, abs=5e-3)
    assert figures["measured_gib"] == pytest.approx(takes * figures["predicted_gib"], rel=5e-3)


def test_the_card_and_rtfx(bench, reports):
    card(bench)
    assert reports["facts"]["torch"] == torch.__version__ and reports["matrix product"]["tflops"] > 0
    reports.clear()
    rtfx(bench)
    assert [title.split()[2] for title in reports] == ["1", "2"]
    for figures in reports.values():
        assert figures["rtfx"] < min(figures["encoder_rtfx"], figures["decoder_rtfx"])


def test_outcomes_are_read_while_pytest_runs(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2\n"
        "@pytest.mark.parametrize('word', ['a b'])\n"
        "def test_skips(word): pytest.skip('no second card')\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('no such thing')\n"
        "def test_errs(broken): pass\n"
    )
    (tmp_path / "test_other.py").write_text("import no_such_module_anywhere\n")
    command = [sys.executable, "-m", "pytest", "-v", "-ra", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "COLUMNS": "400"})
    steps = list(outcomes(iter(done.stdout.splitlines())))
    last = steps[-1]
    assert (last["passed"], last["failed"], last["skipped"]) == (1, 1, 1)
    assert len(last["failed_tests"]) == 1 and "assert 1 == 2" in last["failed_tests"][0]
    assert "no second card" in last["skipped_tests"][0]
    assert any("no_such_module_anywhere" in row or "test_other" in row for row in last["error_tests"])
    assert steps[0] == {"passed": 1} or steps[0].keys() <= {"passed", "error"}


def test_files_with_gpu_tests_are_seen():
    assert is_marked(ROOT / "tests" / "test_gpu.py") and not is_marked(ROOT / "tests" / "lengths" / "test_plan.py")


def test_the_design_names_a_gpu_test_for_all_that_only_a_card_shows():
    section = (ROOT / "docs" / "design.md").read_text().split("## What a Ray that claims GPUs can't show")[1]
    named = re.findall(r"`([a-z_/]*test_\w+\.py)::(test_\w+)`", section.split("\n## ")[0])
    assert len(named) >= 10
    for file, name in named:
        text = (ROOT / "tests" / file).read_text()
        assert f"def {name}(" in text and is_marked(ROOT / "tests" / file)
    # And none of those in test_gpu.py is left out.
    written = re.findall(r"^def (test_\w+)\(", (ROOT / "tests" / "test_gpu.py").read_text(), re.MULTILINE)
    assert set(written) == {name for file, name in named if file == "test_gpu.py"}


def test_training_is_told_by_medians_without_the_start():
    lines = [
        {"step": step, "data_wait": wait, "batch_size": size, "steps_per_second": 2.0}
        for step, wait, size in ((5, 0.9, 40), (10, 0.1, 512), (15, 0.3, 119))
    ] + [{"step": 15, "val_loss": 1.0}]
    assert training_figures(lines) == {"steps": 15, "batch_size": [40, 512], "data_wait": 0.2, "steps_per_second": 2.0}
    assert training_figures([]) == {"steps": 0}


def test_tables_have_all_that_was_measured(capsys, monkeypatch):
    document = {
        "machine": {"gpu": "NVIDIA H200", "processor": "any", "torch": "2.11"},
        "commit": "abc",
        "parts": {
            "step": {
                "status": "done",
                "seconds": 3.0,
                "results": {
                    "64 x 20 s": {"step_seconds": 0.42, "sizes": [3, 4]},
                    "profile": {"kernels": [{"name": "gemm[x]", "calls": 7, "ms": 1.5, "share": 0.25}]},
                },
            },
            "ddp": {"status": "skipped", "why": "needs 2 GPUs, there is 1", "seconds": 0.2, "results": {}},
        },
    }
    for plain in (False, True):
        if plain:
            monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        print_tables(document)
        printed = " ".join(capsys.readouterr().out.split())
        for text in ("NVIDIA H200", "step seconds 0.42, sizes 3 4", "1.50 ms 25.0% 7 × gemm[x]", "needs 2 GPUs"):
            assert text in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--device", "cpu"], "add --tiny"), (["--device", "cpu", "--tiny", "--only", "steps"], "there is no part steps")],
)
def test_what_can_not_run_is_said_at_once(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert message in capsys.readouterr().err


def command_on_this_machine(path: Path, *arguments: str) -> dict:
    """The document that the command writes here."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--output", str(path), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(path.read_text())


@pytest.mark.timeout(200)
def test_the_command_runs_to_its_end_without_a_gpu(tmp_path):
    document = command_on_this_machine(tmp_path / "gpu.json", "--only", "card,tests,ddp", "--minutes", "3")
    statuses = {name: outcome["status"] for name, outcome in document["parts"].items()}
    assert statuses["card"] == statuses["ddp"] == "done" and statuses["tests"] == "skipped"
    assert document["tiny"] and document["machine"]["torch"] == torch.__version__
    ranks = document["parts"]["ddp"]["results"]
    assert [rank["ranks_agree"] for rank in ranks.values()] == [True, True]
    assert ranks["rank 0"]["backend"] == "gloo"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_parts_run_to_their_end_without_a_gpu(tmp_path):
    document = command_on_this_machine(tmp_path / "gpu.json", "--minutes", "4.5")
    statuses = {name: outcome["status"] for name, outcome in document["parts"].items()}
    assert set(statuses) == {item.name for item in PARTS} and set(statuses.values()) <= {"done", "skipped"}
    results = document["parts"]["pipeline"]["results"]
    assert results["run"]["exit_code"] == 0 and set(results["stage seconds"]) >= {"oomptimize", "train", "evaluate"}
    assert results["oomptimize"]["batch_sizes"] and results["train"]["steps"] == 4


def test_a_missing_module_is_a_reason_to_skip():
    need_modules(["json", "torch"])
    with pytest.raises(Skipped, match="not installed here: no_ray, no_pyarrow"):
        need_modules(["json", "no_ray", "no_pyarrow"])
