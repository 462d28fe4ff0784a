"""The paper's figures on one's own data: a random batch, memory over steps, schemes side by side, convergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raytrain.lengths.schemes import SCHEMES
from raytrain.report.figures import BLUE, GREY, ORANGE, Figure, draw

_COLORS = {"R": GREY, "A": "#b04a4a", "B": "#c98a3d", "C": "#5f9e6e", "D": BLUE, "D+": "#1b3f73"}


def ablation_figures(predicted: dict[str, Any] | None, trained: dict[str, Any] | None) -> list[Figure]:
    """Figures of `ablation_predicted.json` and `ablation.json`, each where there is one."""
    found = []
    for name, model in (predicted or {}).get("models", {}).items():
        hardware = predicted["hardware"]
        where = f"{name} on {hardware['gpu']} {hardware['memory_gib']:g} GiB"
        found += _lengths_figures(model["random_batch"], model["schemes"], where)
        found.append(_gpus(model["gpu_plans"], predicted["gpus"], where))
    if trained:
        found += _lengths_figures(trained["random_batch"], trained["schemes"], "this run")
        found += _convergence(trained)
    return found


def _lengths_figures(batch: list[list[int]], rows: list[dict[str, Any]], where: str) -> list[Figure]:
    drawn = [random_batch(batch, where)]
    by_name = {row["scheme"]: row for row in rows}
    if "A" in by_name:
        others = [by_name[name] for name in ("C", "D", "D+") if name in by_name][-1:]
        drawn.append(memory_over_steps([by_name["A"], *others], where))
    drawn.append(side_by_side(rows, where))
    return drawn


def random_batch(batch: list[list[int]], where: str) -> Figure:
    """Figure 1: the two padded tensors of a batch put together without care; rows are (ms, tokens)."""
    durations, tokens = np.array(batch, np.float64).T
    durations /= 1000

    def paint(axes: Any) -> None:
        figure = axes.figure
        axes.remove()
        for axis, (values, name) in zip(
            figure.subplots(1, 2, sharey=True), ((durations, "seconds of audio"), (tokens, "tokens")), strict=True
        ):
            places = np.arange(len(values))
            axis.barh(places, values.max(), height=1.0, color="#e3e5e8", label="padding")
            axis.barh(places, values, height=0.85, color=BLUE, label="speech" if axis is figure.axes[0] else "text")
            axis.set(xlabel=name, xlim=(0, values.max()))
            axis.grid(visible=False)
            axis.legend(frameon=True, loc="lower right", fontsize=8)
        figure.axes[0].set_ylabel("utterance of the batch")
        figure.axes[0].invert_yaxis()

    shares = [1 - values.sum() / (len(values) * values.max()) for values in (durations, tokens)]
    sentence = (
        f"{len(batch)} utterances drawn at random: {shares[0]:.0%} of the audio tensor and {shares[1]:.0%} of the "
        "token tensor hold nothing."
    )
    return Figure(f"A random batch ({where})", draw(paint), sentence)


def memory_over_steps(rows: list[dict[str, Any]], where: str) -> Figure:
    """Figure 2: what steps take of the budget under scheme A, and under the last one."""

    def paint(axes: Any) -> None:
        for row in rows:
            trace = 100 * np.array(row["memory_trace"])
            label = f"{row['scheme']}: {row['title']}"
            axes.plot(np.arange(1, len(trace) + 1), trace, lw=0.9, color=_COLORS[row["scheme"]], label=label)
        axes.axhline(100, color=ORANGE, lw=1.2, ls="--")
        axes.set(xlabel="step", ylabel="memory in use (% of the budget)", ylim=(0, 112))
        axes.legend(frameon=True, fontsize=8, loc="lower right")

    parts = [f"{row['scheme']} uses {row['memory_mean']:.0%} of it on average" for row in rows]
    sentence = f"The dashed line is the budget: {', '.join(parts)}. What lies under it is paid for and does nothing."
    return Figure(f"Memory over steps ({where}, predicted)", draw(paint), sentence)


def side_by_side(rows: list[dict[str, Any]], where: str) -> Figure:
    """Figure 4: schemes by memory in use, mean batch size and padding."""
    panels = (
        ("memory in use (%)", [100 * row["memory_mean"] for row in rows]),
        ("utterances per batch", [row["mean_batch"] for row in rows]),
        ("compute in padding (%)", [100 * row["compute_padding"] for row in rows]),
    )

    def paint(axes: Any) -> None:
        figure = axes.figure
        axes.remove()
        names = [row["scheme"] for row in rows]
        for axis, (name, values) in zip(figure.subplots(1, 3), panels, strict=True):
            bars = axis.bar(names, values, color=[_COLORS[one] for one in names])
            axis.bar_label(bars, fmt="%.0f", fontsize=8)
            axis.set_title(name, fontsize=9)
            axis.set_ylim(0, 1.12 * max(values))
            axis.grid(axis="x", visible=False)

    by_name = {row["scheme"]: row for row in rows}
    first, last = rows[0], rows[-1]
    sentence = (
        f"{first['scheme']} spends {first['compute_padding']:.0%} of its compute on padding, {last['scheme']} "
        f"{last['compute_padding']:.0%}"
    )
    if "A" in by_name and last["scheme"] != "A":
        times = last["mean_batch"] / by_name["A"]["mean_batch"]
        sentence += f"; batches are {times:.1f} times as large as under A"
    return Figure(f"Schemes side by side ({where})", draw(paint, width=7.2), f"{sentence}.")


def _gpus(plans: list[dict[str, Any]], gpus: int, where: str) -> Figure:
    def paint(axes: Any) -> None:
        figure = axes.figure
        axes.remove()
        names = [one["scheme"] for one in plans]
        panels = (("GPUs for A's global batch", "gpus_same_batch", "%.0f"), ("throughput over A", "throughput", "%.2f"))
        for axis, (name, key, shown) in zip(figure.subplots(1, 2), panels, strict=True):
            bars = axis.bar(names, [one[key] for one in plans], color=[_COLORS[one] for one in names])
            axis.bar_label(bars, fmt=shown, fontsize=8)
            axis.set_title(name, fontsize=9)
            axis.grid(axis="x", visible=False)

    last = plans[-1]
    sentence = (
        f"Where scheme A takes {gpus} GPUs, {last['scheme']} holds the same global batch on {last['gpus_same_batch']}, "
        f"and on as many GPUs as A it sees {last['throughput']:.2f} times as many utterances a second."
    )
    return Figure(f"GPUs ({where}, by assumption on a step's time)", draw(paint), sentence)


def _convergence(body: dict[str, Any]) -> list[Figure]:
    """Figures 4 and 5: validation WER against wall time, each scheme at its best learning rate."""
    chosen = _best(body)
    chosen = [one for one in chosen if one["curve"]]
    if not chosen:
        return []
    drawn = [_curves(chosen, body, "Validation WER by wall time", _all_sentence(chosen, body))]
    ends = [one for one in chosen if one["scheme"] in ("R", chosen[-1]["scheme"])]
    if len(ends) == 2:
        drawn.append(_curves(ends, body, "2D buckets against a fixed batch size", _pair_sentence(ends, body)))
    return drawn


def _curves(trials: list[dict[str, Any]], body: dict[str, Any], title: str, sentence: str) -> Figure:
    def paint(axes: Any) -> None:
        for one in trials:
            minutes = [point["seconds"] / 60 for point in one["curve"]]
            label = f"{one['scheme']}, learning rate {one['learning_rate']:g}"
            wer = [100 * min(point["wer"], 1.0) for point in one["curve"]]
            axes.plot(minutes, wer, color=_COLORS[one["scheme"]], lw=1.4, marker="o", ms=2.5, label=label)
        axes.axhline(100 * body["target_wer"], color=ORANGE, lw=1.0, ls="--")
        axes.set(xlabel="training (minutes)", ylabel="validation WER (%)", ylim=(0, None))
        axes.legend(frameon=False, fontsize=8)

    return Figure(title, draw(paint), sentence)


def _all_sentence(trials: list[dict[str, Any]], body: dict[str, Any]) -> str:
    reached = [one for one in trials if one["seconds_to_target"] is not None]
    if not reached:
        return f"No scheme came to the target of {body['target_wer']:.0%}."
    first = min(reached, key=lambda one: one["seconds_to_target"])
    return (
        f"{first['scheme']} is the first at {body['target_wer']:.0%} WER, after {first['seconds_to_target'] / 60:.1f} "
        "minutes; every scheme is shown at the learning rate that suits it best."
    )


def _pair_sentence(pair: list[dict[str, Any]], body: dict[str, Any]) -> str:
    random, last = sorted(pair, key=lambda one: one["scheme"] != "R")
    if random["seconds_to_target"] is None or last["seconds_to_target"] is None:
        return f"Not both came to the target of {body['target_wer']:.0%}."
    share = last["seconds_to_target"] / random["seconds_to_target"]
    return f"{last['scheme']} comes to {body['target_wer']:.0%} WER in {share:.0%} of the time of random batches."


@dataclass(frozen=True)
class Table:
    """A table with its heading and what to know of it."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def ablation_tables(
    predicted: dict[str, Any] | None, trained: dict[str, Any] | None, *, titles: bool = True
) -> list[Table]:
    """Tables of `ablation_predicted.json` and `ablation.json`, each where there is one; `titles` say in every row what
    the scheme is."""
    found = []
    for name, model in (predicted or {}).get("models", {}).items():
        hardware = predicted["hardware"]
        where = f"{name} on {hardware['gpu']} {hardware['memory_gib']:g} GiB"
        found.append(Table(f"Schemes for {where}, predicted", "", *scheme_table(model["schemes"], titles)))
        note = gpu_note(hardware, predicted["gpus"], predicted["steps"])
        found.append(Table(f"GPUs and hours for {where}", note, *gpu_table(model["gpu_plans"])))
    if trained:
        found.append(Table("Schemes for this run, predicted", "", *scheme_table(trained["schemes"], titles)))
        rates = ", ".join(f"{rate:g}" for rate in trained["learning_rates"])
        note = f"Each scheme was trained at the learning rates {rates}; the row is of the best. All else is equal."
        found.append(Table("Schemes for this run, trained", note, *trial_table(trained)))
    return found


def gpu_note(hardware: dict[str, Any], gpus: int, steps: int) -> str:
    """The arithmetic behind the table of GPUs, and what it assumes."""
    return (
        f"Scheme A trains on {gpus} GPUs for {steps} steps. A step takes {hardware['overhead_seconds']:g} s whatever "
        f"its batch, and its operations at {hardware['utilisation']:.0%} of {hardware['peak_flops'] / 1e12:g} TFLOP/s: "
        "assumptions: trust ratios more than hours. GPUs for A's global batch: A's mean batch · GPUs / the scheme's. "
        "Throughput: mean batch per second of a step. Hours on A's GPUs: A's hours / throughput. GPUs for A's hours: "
        "A's GPUs / throughput."
    )


def scheme_table(rows: list[dict[str, Any]], titles: bool) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of a table of schemes."""
    columns = [
        "scheme",
        *(["what it is"] if titles else []),
        "buckets",
        "audio padding",
        "token padding",
        "compute in padding",
        "mean batch",
        "memory, mean",
        "memory, worst",
        "steps per epoch",
    ]
    cells = [
        [
            row["scheme"],
            *([row["title"]] if titles else []),
            str(row["buckets"]),
            f"{row['audio_padding']:.1%}",
            f"{row['token_padding']:.1%}",
            f"{row['compute_padding']:.1%}",
            f"{row['mean_batch']:.1f}",
            f"{row['memory_mean']:.0%}",
            f"{row['memory_worst']:.0%}",
            f"{row['steps_per_epoch']:.0f}",
        ]
        for row in rows
    ]
    return columns, cells


def gpu_table(plans: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of a table of GPUs and hours."""
    columns = [
        "scheme",
        "step (s)",
        "throughput over A",
        "GPUs for A's global batch",
        "hours there",
        "hours on A's GPUs",
        "GPUs for A's hours",
        "GPU hours",
    ]
    cells = [
        [
            one["scheme"],
            f"{one['step_seconds']:.3f}",
            f"{one['throughput']:.2f}",
            str(one["gpus_same_batch"]),
            f"{one['hours_same_batch']:.1f}",
            f"{one['hours_same_gpus']:.1f}",
            str(one["gpus_same_hours"]),
            f"{one['gpu_hours']:.0f}",
        ]
        for one in plans
    ]
    return columns, cells


def trial_table(body: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of a table of trained schemes, each at its best learning rate."""
    target = f"minutes to {body['target_wer']:.0%} WER"
    columns = ["scheme", "learning rate", "utterances a step", "audio s per s", "steps", target, "lowest WER"]
    cells = []
    for one in _best(body):
        reached = one["seconds_to_target"]
        cells.append(
            [
                one["scheme"],
                f"{one['learning_rate']:g}",
                _number(one["batch_size"], ".1f"),
                _number(one["audio_seconds_per_second"], ".0f"),
                str(one["steps"]),
                "not reached" if reached is None else f"{reached / 60:.1f}",
                _number(one["best_wer"], ".1%"),
            ]
        )
    return columns, cells


def _best(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Each scheme's best trial, in the order in which schemes build on one another."""
    return [body["trials"][body["best"][scheme]] for scheme in SCHEMES if scheme in body["best"]]


def _number(value: float | None, shown: str) -> str:
    return "none" if value is None else format(value, shown)
