"""Warnings that training waits for data: when, how often, and with which advice."""

import io

import pytest
from conftest import tiny_config
from rich.console import Console as RichConsole

from raytrain.console import Console
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.context import Context
from raytrain.stages.train import _training_progress
from raytrain.training.data_wait import REPEAT_SECONDS, DataPath, DataWaitMonitor, advice


def report_waits(waits: list[float], seconds: float = 10.0) -> list[int]:
    """Numbers of the lines, one each `seconds`, at which there is a warning."""
    monitor = DataWaitMonitor(DataPath())
    lines = [{"time_s": seconds * number, "data_wait": wait} for number, wait in enumerate(waits)]
    return [number for number, line in enumerate(lines) if monitor.check(line) is not None]


def test_a_warning_comes_once_when_waiting_begins():
    assert report_waits([0.0] * 20) == report_waits([0.05] * 20) == []
    assert report_waits([0.06] * 20) == [2]
    assert report_waits([0.01] * 10 + [0.2] * 20) == [12]


def test_a_slow_start_or_a_slow_file_is_not_waiting():
    assert report_waits([0.9] + [0.01] * 20) == []
    assert report_waits(([0.01] * 4 + [0.9]) * 10) == []


def test_the_warning_repeats_when_waiting_doubles_and_after_a_while():
    assert report_waits([0.06] * 10 + [0.10] * 10) == [2]
    assert report_waits([0.06] * 10 + [0.13] * 10) == [2, 12]
    seconds = REPEAT_SECONDS / 10
    assert report_waits([0.06] * 25, seconds) == [2, 12, 22]
    assert report_waits([0.06] * 5 + [0.04] * 30 + [0.06] * 5, seconds) == [2, 37]


def test_intermittent_waiting_does_not_repeat_the_warning():
    assert len(report_waits(([0.06] * 5 + [0.04] * 5) * 5)) == 1


def test_lines_of_validations_do_not_count():
    monitor = DataWaitMonitor(DataPath())
    assert [monitor.check({"time_s": 1.0, "val_loss": 2.0}) for _ in range(9)] == [None] * 9


THREADS, COPY, RAY = "num_loader_threads", "assign.materialize", "data.workers: ray"
ADVICE = [
    (DataPath(2), 0.9, 0.9, "decoding", {THREADS, COPY, RAY}),
    (DataPath("auto"), 0.9, 0.9, "decoding", {COPY, RAY}),
    (DataPath(2, materialize=True), 0.9, 0.9, "decoding", {THREADS, RAY}),
    (DataPath("auto", stream=True), 0.9, 0.9, "decoding", {"more CPUs"}),
    (DataPath("auto"), 0.9, 0.2, "80%", {THREADS, COPY, "faster storage"}),
    (DataPath(2, materialize=True), 0.9, 0.2, "80%", {THREADS, "faster storage"}),
    (DataPath("auto"), 0.3, 0.9, "70%", {"prefetch_batches"}),
    (DataPath("auto", stream=True), 0.3, 0.9, "sampler", {"unset data.stream"}),
    (DataPath("auto", workers="ray"), None, None, "decode", {COPY, "CPU nodes"}),
    (DataPath("auto", workers="ray", materialize=True), None, None, "decode", {"CPU nodes"}),
]


@pytest.mark.parametrize(("data_path", "busy", "cpu", "reason", "remedies"), ADVICE)
def test_advice_depends_on_the_bottleneck(data_path, busy, cpu, reason, remedies):
    text = advice(data_path, busy, cpu)
    everything = set.union(*(named for *_, named in ADVICE))
    assert reason in text.split(";")[0]
    assert {remedy for remedy in everything if remedy in text.split(";")[1]} == remedies


def test_the_warning_reaches_the_terminal_but_earlier_lines_do_not(corpus, tmp_path):
    config = tiny_config(corpus, tmp_path)
    console, shown = Console(), io.StringIO()
    console.rich = RichConsole(file=shown, width=400)
    context = Context(Workspace(config, tmp_path), console, tracking=None, key="")
    before = [{"step": step, "time_s": float(step), "data_wait": 0.5} for step in range(1, 30)]
    with _training_progress(context, step=30) as on_metrics:
        for line in before:
            on_metrics(line)
        assert "warning" not in shown.getvalue()
        for step in range(31, 40):
            on_metrics({"step": step, "time_s": float(step), "data_wait": 0.35, "loader_busy": 1.0, "loader_cpu": 0.97})
    assert shown.getvalue().count("warning: training waits for data 35% of its time: decoding takes all") == 1
