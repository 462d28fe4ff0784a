"""The tables of an ablation, as `report.html` and `raytrain ablate` show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from raytrain.lengths.schemes import GpuPlan, Hardware, SchemeRow
from raytrain.report.ablation_results import AblationBody, PredictedBody, TrialResult

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Table:
    """A table with its heading and an explanatory note."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def ablation_tables(
    predicted: PredictedBody | None, trained: AblationBody | None, *, titles: bool = True
) -> list[Table]:
    """Tables for `ablation_predicted.json` and `ablation.json`, as far as they exist; with `titles`, every row says
    what the scheme is."""
    tables = []
    if predicted:
        for name, model in predicted.models.items():
            title = model_on(name, predicted.hardware)
            tables.append(scheme_table(model.schemes, titles, f"Schemes for {title}, predicted"))
            note = gpu_note(predicted.hardware, predicted.gpus, predicted.steps)
            tables.append(gpu_table(model.gpu_plans, f"GPUs and hours for {title}", note))
    if trained:
        tables.append(scheme_table(trained.schemes, titles, "Schemes for this run, predicted"))
        tables.append(trial_table(trained))
    return tables


def model_on(name: str, hardware: Hardware) -> str:
    """`canary-1b on A100 80 GiB`."""
    return f"{name} on {hardware.gpu} {hardware.memory_gib:g} GiB"


def gpu_note(hardware: Hardware, gpus: int, steps: int) -> str:
    """The arithmetic behind the table of GPUs, and its assumptions."""
    return (
        f"Scheme A trains on {gpus} GPUs for {steps} steps. A step takes {hardware.overhead_seconds:g} s regardless "
        f"of its batch, plus its FLOPs at {hardware.utilisation:.0%} of {hardware.peak_flops / 1e12:g} TFLOP/s; these "
        "are assumptions, so trust ratios more than hours. GPUs for A's global batch: A's mean batch · GPUs / the "
        "scheme's. Throughput: mean batch per second of a step. Hours on A's GPUs: A's hours / throughput. GPUs for "
        "A's hours: A's GPUs / throughput."
    )


def _table(title: str, note: str, rows: Sequence[_Row], columns: Mapping[str, Callable[[_Row], str]]) -> Table:
    """A table from its columns, each a function that formats a row's cell."""
    return Table(title, note, list(columns), [[show(row) for show in columns.values()] for row in rows])


def scheme_table(rows: Sequence[SchemeRow], titles: bool, heading: str) -> Table:
    """The schemes as they were planned."""
    names: dict[str, Callable[[SchemeRow], str]] = {"scheme": lambda row: row.scheme}
    if titles:
        names["what it is"] = lambda row: row.title
    return _table(
        heading,
        "",
        rows,
        {
            **names,
            "buckets": lambda row: str(row.buckets),
            "audio padding": lambda row: f"{row.audio_padding:.1%}",
            "token padding": lambda row: f"{row.token_padding:.1%}",
            "compute in padding": lambda row: f"{row.compute_padding:.1%}",
            "mean batch": lambda row: f"{row.mean_batch:.1f}",
            "memory, mean": lambda row: f"{row.memory_mean:.0%}",
            "memory, worst": lambda row: f"{row.memory_worst:.0%}",
            "steps per epoch": lambda row: f"{row.steps_per_epoch:.0f}",
        },
    )


def gpu_table(plans: Sequence[GpuPlan], heading: str, note: str) -> Table:
    """GPUs and hours that each scheme needs."""
    return _table(
        heading,
        note,
        plans,
        {
            "scheme": lambda plan: plan.scheme,
            "step (s)": lambda plan: f"{plan.step_seconds:.3f}",
            "throughput over A": lambda plan: f"{plan.throughput:.2f}",
            "GPUs for A's global batch": lambda plan: str(plan.gpus_same_batch),
            "hours there": lambda plan: f"{plan.hours_same_batch:.1f}",
            "hours on A's GPUs": lambda plan: f"{plan.hours_same_gpus:.1f}",
            "GPUs for A's hours": lambda plan: str(plan.gpus_same_hours),
            "GPU hours": lambda plan: f"{plan.gpu_hours:.0f}",
        },
    )


def trial_table(body: AblationBody) -> Table:
    """The trained schemes, each at its best learning rate."""
    rates = ", ".join(f"{rate:g}" for rate in body.learning_rates)
    columns: dict[str, Callable[[TrialResult], str]] = {
        "scheme": lambda trial: trial.scheme,
        "learning rate": lambda trial: f"{trial.learning_rate:g}",
        "utterances a step": lambda trial: format_or_none(trial.batch_size, ".1f"),
        "audio s per s": lambda trial: format_or_none(trial.audio_seconds_per_second, ".0f"),
        "steps": lambda trial: str(trial.steps),
        f"minutes to {body.target_wer:.0%} WER": lambda trial: _minutes(trial.seconds_to_target),
        "lowest WER": lambda trial: format_or_none(trial.best_wer, ".1%"),
    }
    note = f"Each scheme was trained at the learning rates {rates}; the row shows the best. Everything else is equal."
    return _table("Schemes for this run, trained", note, body.best_trials(), columns)


def _minutes(seconds: float | None) -> str:
    return "not reached" if seconds is None else f"{seconds / 60:.1f}"


def format_or_none(value: float | None, shown: str) -> str:
    """The number in `format`, or `none`."""
    return "none" if value is None else format(value, shown)
