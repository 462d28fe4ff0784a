"""Figures of a run as inline SVG, each with the sentence that says what to see, computed from the numbers."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

BLUE, ORANGE, GREY = "#2f6db5", "#d9762b", "#8a8f98"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "raytrain",  # equal runs give equal bytes
}


@dataclass(frozen=True)
class Figure:
    """A drawing with its heading and the sentence below it."""

    title: str
    svg: str
    sentence: str


def draw(paint: Callable[[Any], None], width: float = 6.4, height: float = 3.2) -> str:
    """What `paint` draws on axes, as SVG."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=200)
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _every(number: int, most: int = 11) -> int:
    """Label each how-many-th of `number` places, so that labels never overlap."""
    return max(1, -(-number // most))


def lengths(durations_ms: np.ndarray, tokens: np.ndarray, counts: np.ndarray, plan: dict[str, Any]) -> Figure:
    """The length histogram with the bucket grid over it; arrays (N,) of histogram cells."""

    def paint(axes: Any) -> None:
        # Rasterized: as vectors the page would grow with the number of cells.
        style = {"s": 9, "marker": "s", "cmap": "Blues", "vmin": 0, "linewidths": 0, "rasterized": True}
        marks = axes.scatter(durations_ms / 1000, tokens, c=counts, **style)
        axes.figure.colorbar(marks, ax=axes, label="utterances")
        left, low = 0.0, 0
        for duration, limit in plan["buckets"]:
            if duration / 1000 != right_of(axes):
                left, low = right_of(axes), 0
            axes.add_patch(
                plt.Rectangle((left, low), duration / 1000 - left, limit - low, fill=False, ec=ORANGE, lw=0.9)
            )
            axes.raytrain_right, axes.raytrain_left, low = duration / 1000, left, limit
        axes.set(xlabel="duration (s)", ylabel="tokens, prompt included", xlim=(0, None), ylim=(0, None))

    def right_of(axes: Any) -> float:
        return getattr(axes, "raytrain_right", 0.0)

    if not counts.sum():
        raise ValueError("the histogram is empty")
    share = counts[np.argsort(-counts)].cumsum() / counts.sum()
    sentence = (
        f"{int(counts.sum())} utterances in {len(plan['buckets'])} buckets; each orange box is one bucket, and "
        f"half of all utterances lie in {int(np.searchsorted(share, 0.5) + 1)} of {len(counts)} cells."
    )
    return Figure("Lengths and buckets", draw(paint), sentence)


def padding(rows: list[dict[str, Any]]) -> Figure:
    """Share of padding in audio and tokens by scheme."""

    def paint(axes: Any) -> None:
        places = np.arange(len(rows))
        for shift, key, color, label in (
            (-0.2, "audio_padding", BLUE, "audio"),
            (0.2, "token_padding", ORANGE, "tokens"),
        ):
            bars = axes.bar(places + shift, [100 * row[key] for row in rows], 0.38, color=color, label=label)
            axes.bar_label(bars, fmt="%.1f %%", fontsize=8)
        axes.set_xticks(places, [row["scheme"] for row in rows])
        axes.set_ylabel("padding (%)")
        axes.legend(frameon=False)
        axes.grid(axis="x", visible=False)

    first, last = rows[0], rows[-1]
    sentence = (
        f"{first['scheme'].capitalize()} batches spend {first['audio_padding']:.0%} of the audio and "
        f"{first['token_padding']:.0%} of the tokens on padding; {last['scheme']} {last['audio_padding']:.0%} and "
        f"{last['token_padding']:.0%}."
    )
    return Figure("Padding by scheme", draw(paint), sentence)


def speaking_rate(rows: list[dict[str, Any]]) -> Figure:
    """Tokens per second by duration bin, mean ± standard deviation."""

    def paint(axes: Any) -> None:
        names = [f"{row['from_ms'] // 1000}–{row['to_ms'] // 1000}" for row in rows]
        places, step = np.arange(len(rows)), _every(len(rows))
        heights, spread = [row["mean"] for row in rows], [row["std"] for row in rows]
        axes.bar(places, heights, yerr=spread, color=BLUE, ecolor=GREY)
        axes.set_xticks(places[::step], names[::step])
        axes.set(xlabel="duration (s)", ylabel="tokens per second")
        axes.grid(axis="x", visible=False)

    sentence = (
        f"Utterances under {rows[0]['to_ms'] / 1000:.0f} s have {rows[0]['mean']:.1f} tokens per second, the longest "
        f"{rows[-1]['mean']:.1f}"
    )
    falls = rows[0]["mean"] > rows[-1]["mean"]
    sentence += ": the prompt's fixed tokens weigh more in short ones." if falls else "."
    return Figure("Tokens per second", draw(paint), sentence)


def batch_profile(plan: dict[str, Any], profile: dict[str, Any]) -> Figure:
    """Batch size and peak memory of every bucket."""
    sizes, peaks = profile["batch_sizes"], profile["peak_gib"]
    if len(sizes) != len(plan["buckets"]):
        raise ValueError(f"{len(sizes)} sizes for {len(plan['buckets'])} buckets: it is of another plan")
    budget = profile["setting"]["device_gib"] * profile["setting"]["memory_fraction"]

    def paint(axes: Any) -> None:
        places = np.arange(len(sizes))
        axes.bar(places, sizes, color=BLUE)
        names = [f"{duration / 1000:g}s\n{tokens}" for duration, tokens in plan["buckets"]]
        step = _every(len(names))
        axes.set_xticks(places[::step], names[::step], fontsize=7)
        axes.set(xlabel="bucket (longest, most tokens)", ylabel="batch size")
        axes.grid(axis="x", visible=False)
        right = axes.twinx()
        right.plot(places, peaks, "o-", color=ORANGE, ms=3, lw=1)
        right.axhline(budget, color=ORANGE, ls=":", lw=1)
        right.set_ylabel("peak memory (GiB), dotted: budget", color=ORANGE)
        right.set_ylim(0, budget * 1.1)
        right.grid(visible=False)

    sentence = (
        f"Batch sizes run from {max(sizes)} to {min(sizes)}; peaks reach {max(peaks) / budget:.0%} of the budget of "
        f"{budget:.2f} GiB ({'measured on ' * profile['confirmed']}{profile['setting']['device_name']})."
    )
    return Figure("Batch profile", draw(paint), sentence)


def curve(
    title: str,
    rows: list[dict[str, Any]],
    keys: dict[str, str],
    ylabel: str,
    sentence: str,
    *,
    by: str = "step",
    scale: float = 1.0,
    percent: bool = False,
) -> Figure:
    """Lines of metrics over steps (`by="step"`) or minutes (`by="time_s"`); `keys` maps a metric to its label."""

    def paint(axes: Any) -> None:
        for color, (key, label) in zip((BLUE, ORANGE, GREY), keys.items(), strict=False):
            points = [(row[by] * scale, row[key] * (100 if percent else 1)) for row in rows if key in row]
            points = points[:: _every(len(points), 2000)]  # more than a screen has pixels
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=color,
                    label=label,
                    lw=1.3,
                    marker="o" if len(points) < 40 else "",
                    ms=3,
                )
        axes.set(xlabel="minutes of training" if by == "time_s" else "step", ylabel=ylabel)
        axes.set_ylim(0, None)
        if len(keys) > 1:
            axes.legend(frameon=False)

    return Figure(title, draw(paint), sentence)
