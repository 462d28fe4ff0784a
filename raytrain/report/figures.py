"""Figures of a run as inline SVG, each with a caption computed from the numbers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from raytrain.lengths.compare import PaddingRow
from raytrain.report.views import Grid, Metrics, Profile, RateBin

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

BLUE, ORANGE, GREY = "#2f6db5", "#d9762b", "#8a8f98"
_STYLE: dict[RcKeyType, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "raytrain",  # equal runs produce equal bytes
}
_MOST_LABELS, _MOST_POINTS = 11, 2000  # labels never overlap; more points than pixels show nothing new


@dataclass(frozen=True)
class Figure:
    """A drawing with its heading and caption."""

    title: str
    svg: str
    sentence: str


def draw(paint: Callable[[Axes], None], width: float = 6.4, height: float = 3.2) -> str:
    """The SVG of what `paint` draws on axes."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=200)
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _stride(number: int, most: int = _MOST_LABELS) -> int:
    """The stride through `number` items that leaves at most `most`."""
    return max(1, -(-number // most))


def lengths(durations_ms: np.ndarray, tokens: np.ndarray, counts: np.ndarray, grid: Grid) -> Figure:
    """The length histogram with the bucket grid over it; arrays (N,) of histogram cells."""

    def paint(axes: Axes) -> None:
        # Rasterized, because as vectors the page would grow with the number of cells.
        marks = axes.scatter(
            durations_ms / 1000, tokens, c=counts, s=9, marker="s", cmap="Blues", vmin=0, linewidths=0, rasterized=True
        )
        axes.figure.colorbar(marks, ax=axes, label="utterances")
        left, right, low = 0.0, 0.0, 0
        for duration, limit in grid.buckets:
            if duration / 1000 != right:
                left, right, low = right, duration / 1000, 0
            axes.add_patch(Rectangle((left, low), right - left, limit - low, fill=False, ec=ORANGE, lw=0.9))
            low = limit
        axes.set(xlabel="duration (s)", ylabel="tokens, prompt included", xlim=(0, None), ylim=(0, None))

    if not counts.sum():
        raise ValueError("the histogram is empty")
    share = counts[np.argsort(-counts)].cumsum() / counts.sum()
    sentence = (
        f"{int(counts.sum())} utterances in {len(grid.buckets)} buckets; each orange box is one bucket, and "
        f"half of all utterances lie in {int(np.searchsorted(share, 0.5) + 1)} of {len(counts)} cells."
    )
    return Figure("Lengths and buckets", draw(paint), sentence)


def padding(rows: Sequence[PaddingRow]) -> Figure:
    """Share of padding in audio and tokens by scheme."""

    def paint(axes: Axes) -> None:
        ticks = np.arange(len(rows))
        for shift, shares, color, label in (
            (-0.2, [row.audio_padding for row in rows], BLUE, "audio"),
            (0.2, [row.token_padding for row in rows], ORANGE, "tokens"),
        ):
            bars = axes.bar(ticks + shift, [100 * share for share in shares], 0.38, color=color, label=label)
            axes.bar_label(bars, fmt="%.1f %%", fontsize=8)
        axes.set_xticks(ticks, [row.scheme for row in rows])
        axes.set_ylabel("padding (%)")
        axes.legend(frameon=False)
        axes.grid(axis="x", visible=False)

    first, last = rows[0], rows[-1]
    sentence = (
        f"{first.scheme.capitalize()} batches spend {first.audio_padding:.0%} of the audio and "
        f"{first.token_padding:.0%} of the tokens on padding; {last.scheme} {last.audio_padding:.0%} and "
        f"{last.token_padding:.0%}."
    )
    return Figure("Padding by scheme", draw(paint), sentence)


def speaking_rate(bins: Sequence[RateBin]) -> Figure:
    """Tokens per second by duration bin, mean ± standard deviation."""

    def paint(axes: Axes) -> None:
        names = [f"{rate.from_ms // 1000}–{rate.to_ms // 1000}" for rate in bins]
        ticks, stride = np.arange(len(bins)), _stride(len(bins))
        spread = [rate.std for rate in bins]
        axes.bar(ticks, [rate.mean for rate in bins], yerr=spread, color=BLUE, ecolor=GREY)
        axes.set_xticks(ticks[::stride], names[::stride])
        axes.set(xlabel="duration (s)", ylabel="tokens per second")
        axes.grid(axis="x", visible=False)

    shortest, longest = bins[0], bins[-1]
    sentence = (
        f"Utterances under {shortest.to_ms / 1000:.0f} s have {shortest.mean:.1f} tokens per second, the longest "
        f"{longest.mean:.1f}"
    )
    falls = shortest.mean > longest.mean
    sentence += ": the prompt's fixed tokens weigh more in short ones." if falls else "."
    return Figure("Tokens per second", draw(paint), sentence)


def batch_profile(grid: Grid, profile: Profile) -> Figure:
    """Batch size and peak memory of every bucket."""
    sizes, peaks = profile.batch_sizes, profile.peak_gib
    if len(sizes) != len(grid.buckets):
        raise ValueError(f"{len(sizes)} sizes for {len(grid.buckets)} buckets: it belongs to another plan")
    budget = profile.setting.budget_gib

    def paint(axes: Axes) -> None:
        ticks, stride = np.arange(len(sizes)), _stride(len(sizes))
        axes.bar(ticks, sizes, color=BLUE)
        names = [f"{duration / 1000:g}s\n{tokens}" for duration, tokens in grid.buckets]
        axes.set_xticks(ticks[::stride], names[::stride], fontsize=7)
        axes.set(xlabel="bucket (longest, most tokens)", ylabel="batch size")
        axes.grid(axis="x", visible=False)
        right = axes.twinx()
        right.plot(ticks, peaks, "o-", color=ORANGE, ms=3, lw=1)
        right.axhline(budget, color=ORANGE, ls=":", lw=1)
        right.set_ylabel("peak memory (GiB), dotted: budget", color=ORANGE)
        right.set_ylim(0, budget * 1.1)
        right.grid(visible=False)

    sentence = (
        f"Batch sizes run from {max(sizes)} to {min(sizes)}; peaks reach {max(peaks) / budget:.0%} of the budget of "
        f"{budget:.2f} GiB ({'measured on ' * profile.confirmed}{profile.setting.device_name})."
    )
    return Figure("Batch profile", draw(paint), sentence)


def curve(
    title: str,
    rows: Sequence[Metrics],
    labels: Mapping[str, str],
    ylabel: str,
    sentence: str,
    *,
    by: str = "step",
    scale: float = 1.0,
    percent: bool = False,
) -> Figure:
    """Lines of metrics over steps (`by="step"`) or minutes (`by="time_s"`); `labels` are keyed by metric name."""

    def paint(axes: Axes) -> None:
        for color, (metric, label) in zip((BLUE, ORANGE, GREY), labels.items(), strict=False):
            points = [(row[by] * scale, row[metric] * (100 if percent else 1)) for row in rows if metric in row]
            points = points[:: _stride(len(points), _MOST_POINTS)]
            if points:
                marker = "o" if len(points) < 40 else ""
                axes.plot(*zip(*points, strict=True), color=color, label=label, lw=1.3, marker=marker, ms=3)
        axes.set(xlabel="minutes of training" if by == "time_s" else "step", ylabel=ylabel)
        axes.set_ylim(0, None)
        if len(labels) > 1:
            axes.legend(frameon=False)

    return Figure(title, draw(paint), sentence)
