"""The paper's figures for your own data: a random batch, memory over steps, schemes side by side, convergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from raytrain.lengths.schemes import GpuPlan, SchemeRow
from raytrain.report.ablation_results import AblationBody, PredictedBody, TrialResult
from raytrain.report.ablation_tables import model_on
from raytrain.report.figures import BLUE, GREY, ORANGE, Figure, draw

_COLORS = {"R": GREY, "A": "#b04a4a", "B": "#c98a3d", "C": "#5f9e6e", "D": BLUE, "D+": "#1b3f73"}


def ablation_figures(predicted: PredictedBody | None, trained: AblationBody | None) -> list[Figure]:
    """Figures for `ablation_predicted.json` and `ablation.json`, as far as they exist."""
    drawn = []
    if predicted:
        for name, model in predicted.models.items():
            title = model_on(name, predicted.hardware)
            drawn += _lengths_figures(model.random_batch, model.schemes, title)
            drawn.append(_gpus(model.gpu_plans, predicted.gpus, title))
    if trained:
        drawn += _lengths_figures(trained.random_batch, trained.schemes, "this run")
        drawn += _convergence(trained)
    return drawn


def _lengths_figures(batch: Sequence[tuple[int, int]], rows: Sequence[SchemeRow], title: str) -> list[Figure]:
    drawn = [random_batch(batch, title)]
    by_name = {row.scheme: row for row in rows}
    if "A" in by_name:
        best = [by_name[name] for name in ("C", "D", "D+") if name in by_name][-1:]
        drawn.append(memory_over_steps([by_name["A"], *best], title))
    drawn.append(side_by_side(rows, title))
    return drawn


def random_batch(batch: Sequence[tuple[int, int]], title: str) -> Figure:
    """Figure 1: the two padded tensors of a random batch; rows are (ms, tokens)."""
    durations, tokens = np.array(batch, np.float64).T
    durations /= 1000

    def paint(axes: Axes) -> None:
        figure = axes.figure
        axes.remove()
        audio, text = figure.subplots(1, 2, sharey=True)
        for axis, values, name, label in (
            (audio, durations, "seconds of audio", "speech"),
            (text, tokens, "tokens", "text"),
        ):
            rows = np.arange(len(values))
            axis.barh(rows, values.max(), height=1.0, color="#e3e5e8", label="padding")
            axis.barh(rows, values, height=0.85, color=BLUE, label=label)
            axis.set(xlabel=name, xlim=(0, values.max()))
            axis.grid(visible=False)
            axis.legend(frameon=True, loc="lower right", fontsize=8)
        audio.set_ylabel("utterance of the batch")
        audio.invert_yaxis()

    shares = [1 - values.sum() / (len(values) * values.max()) for values in (durations, tokens)]
    sentence = (
        f"{len(batch)} utterances drawn at random: {shares[0]:.0%} of the audio tensor and {shares[1]:.0%} of the "
        "token tensor are padding."
    )
    return Figure(f"A random batch ({title})", draw(paint), sentence)


def memory_over_steps(rows: Sequence[SchemeRow], title: str) -> Figure:
    """Figure 2: how much of the budget steps use under scheme A and under the last scheme."""

    def paint(axes: Axes) -> None:
        for row in rows:
            trace = 100 * np.array(row.memory_trace)
            label = f"{row.scheme}: {row.title}"
            axes.plot(np.arange(1, len(trace) + 1), trace, lw=0.9, color=_COLORS[row.scheme], label=label)
        axes.axhline(100, color=ORANGE, lw=1.2, ls="--")
        axes.set(xlabel="step", ylabel="memory in use (% of the budget)", ylim=(0, 112))
        axes.legend(frameon=True, fontsize=8, loc="lower right")

    parts = [f"{row.scheme} uses {row.memory_mean:.0%} of it on average" for row in rows]
    sentence = f"The dashed line is the budget: {', '.join(parts)}. The gap below it is unused memory."
    return Figure(f"Memory over steps ({title}, predicted)", draw(paint), sentence)


@dataclass(frozen=True)
class _Panel:
    """Bars of one measure, one per scheme; `headroom` above the highest, matplotlib's default if None."""

    title: str
    values: list[float]
    format: str
    headroom: float | None = None


def _draw_panels(schemes: Sequence[str], panels: Sequence[_Panel], width: float = 6.4) -> str:
    def paint(axes: Axes) -> None:
        figure = axes.figure
        axes.remove()
        for axis, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
            bars = axis.bar(schemes, panel.values, color=[_COLORS[scheme] for scheme in schemes])
            axis.bar_label(bars, fmt=panel.format, fontsize=8)
            axis.set_title(panel.title, fontsize=9)
            if panel.headroom is not None:
                axis.set_ylim(0, panel.headroom * max(panel.values))
            axis.grid(axis="x", visible=False)

    return draw(paint, width=width)


def side_by_side(rows: Sequence[SchemeRow], title: str) -> Figure:
    """Figure 4: schemes by memory in use, mean batch size and padding."""
    panels = (
        _Panel("memory in use (%)", [100 * row.memory_mean for row in rows], "%.0f", 1.12),
        _Panel("utterances per batch", [row.mean_batch for row in rows], "%.0f", 1.12),
        _Panel("compute in padding (%)", [100 * row.compute_padding for row in rows], "%.0f", 1.12),
    )
    by_name = {row.scheme: row for row in rows}
    first, last = rows[0], rows[-1]
    sentence = (
        f"{first.scheme} spends {first.compute_padding:.0%} of its compute on padding, {last.scheme} "
        f"{last.compute_padding:.0%}"
    )
    if "A" in by_name and last.scheme != "A":
        times = last.mean_batch / by_name["A"].mean_batch
        sentence += f"; its batches are {times:.1f} times as large as under A"
    drawing = _draw_panels([row.scheme for row in rows], panels, width=7.2)
    return Figure(f"Schemes side by side ({title})", drawing, f"{sentence}.")


def _gpus(plans: Sequence[GpuPlan], gpus: int, title: str) -> Figure:
    panels = (
        _Panel("GPUs for A's global batch", [plan.gpus_same_batch for plan in plans], "%.0f"),
        _Panel("throughput over A", [plan.throughput for plan in plans], "%.2f"),
    )
    last = plans[-1]
    sentence = (
        f"Where scheme A needs {gpus} GPUs, {last.scheme} fits the same global batch on {last.gpus_same_batch}, "
        f"and on as many GPUs as A it processes {last.throughput:.2f} times as many utterances per second."
    )
    drawing = _draw_panels([plan.scheme for plan in plans], panels)
    return Figure(f"GPUs ({title}, for an assumed step time)", drawing, sentence)


def _convergence(body: AblationBody) -> list[Figure]:
    """Figures 4 and 5: validation WER against wall time, each scheme at its best learning rate."""
    trials = [trial for trial in body.best_trials() if trial.curve]
    if not trials:
        return []
    sentence = _fastest_sentence(trials, body.target_wer)
    drawn = [_curves(trials, body.target_wer, "Validation WER by wall time", sentence)]
    ends = [trial for trial in trials if trial.scheme in ("R", trials[-1].scheme)]
    if len(ends) == 2:
        sentence = _pair_sentence(ends, body.target_wer)
        drawn.append(_curves(ends, body.target_wer, "2D buckets against a fixed batch size", sentence))
    return drawn


def _curves(trials: Sequence[TrialResult], target_wer: float, title: str, sentence: str) -> Figure:
    def paint(axes: Axes) -> None:
        for trial in trials:
            minutes = [point.seconds / 60 for point in trial.curve]
            label = f"{trial.scheme}, learning rate {trial.learning_rate:g}"
            wer = [100 * min(point.wer, 1.0) for point in trial.curve]
            axes.plot(minutes, wer, color=_COLORS[trial.scheme], lw=1.4, marker="o", ms=2.5, label=label)
        axes.axhline(100 * target_wer, color=ORANGE, lw=1.0, ls="--")
        axes.set(xlabel="training (minutes)", ylabel="validation WER (%)", ylim=(0, None))
        axes.legend(frameon=False, fontsize=8)

    return Figure(title, draw(paint), sentence)


def _fastest_sentence(trials: Sequence[TrialResult], target_wer: float) -> str:
    times = {trial.scheme: trial.seconds_to_target for trial in trials if trial.seconds_to_target is not None}
    if not times:
        return f"No scheme reached the target of {target_wer:.0%}."
    scheme, seconds = min(times.items(), key=lambda item: item[1])
    return (
        f"{scheme} is the first to reach {target_wer:.0%} WER, after {seconds / 60:.1f} "
        "minutes; every scheme is shown at its best learning rate."
    )


def _pair_sentence(pair: Sequence[TrialResult], target_wer: float) -> str:
    random, last = sorted(pair, key=lambda trial: trial.scheme != "R")
    if random.seconds_to_target is None or last.seconds_to_target is None:
        return f"Not both reached the target of {target_wer:.0%}."
    share = last.seconds_to_target / random.seconds_to_target
    return f"{last.scheme} reaches {target_wer:.0%} WER in {share:.0%} of the time that random batches need."
