"""Tables that commands print: columns and cells of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raytrain.cluster.tuning import TuneTrial
    from raytrain.lengths.compare import PolicyRow
    from raytrain.lengths.simulate import Simulation
    from raytrain.stages.previews import DryBucket, ScheduledCorpus

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
_SMALLEST_SHARE = 0.002  # of memory, to get its own line


def policies(rows: Sequence[PolicyRow]) -> Table:
    """Bucket policies side by side."""
    columns = ("policy", "audio padding", "token padding", "padded compute", "cells", "rejected", "seconds")
    cells = [
        (
            row.policy,
            f"{row.audio_padding:.2%}",
            f"{row.token_padding:.2%}",
            f"{row.padded_compute:.2%}",
            str(row.cells),
            str(row.rejected),
            f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    return columns, cells


def planned_sizes(rows: Sequence[DryBucket]) -> Table:
    """Batch sizes planned for a GPU, by bucket."""
    columns = ("bucket", "≤ seconds", "≤ tokens", "batch size", "seconds of audio", "peak GiB")
    cells = [
        (
            str(row.bucket),
            str(row.max_duration_ms / 1000),
            str(row.max_tokens),
            str(row.batch_size),
            str(row.audio_seconds),
            f"{row.predicted_gib:.2f}",
        )
        for row in rows
    ]
    return columns, cells


def live_memory(row: DryBucket) -> Iterator[Table]:
    """The live memory at the peak of a bucket's step, by phase and by module."""
    for kind, sizes in (("phase", row.mib_by_phase), ("module", row.mib_by_module)):
        total = sum(sizes.values())
        parts = [(name, size) for name, size in sizes.items() if size > _SMALLEST_SHARE * total]
        columns = (kind, "MiB", "share")
        yield columns, [(name, f"{size:,.0f}", f"{size / total:.1%}") for name, size in parts]


def corpora(rows: Sequence[ScheduledCorpus], simulation: Simulation | None) -> Table:
    """How often an epoch repeats each corpus, and its share of the audio if steps were simulated."""
    columns = ("corpus", "rows", "repeats per epoch", *(("share of audio",) if simulation else ()))
    shares = [(f"{share:.1%}",) for share in simulation.audio_share] if simulation else [()] * len(rows)
    cells = [(row.corpus, str(row.rows), f"{row.repeats:.2f}", *share) for row, share in zip(rows, shares, strict=True)]
    return columns, cells


def simulated(steps: Simulation) -> Table:
    """Statistics of simulated steps."""
    cells = [
        ("steps", f"{steps.steps} of {steps.world_size} workers, {steps.epochs:.2f} epochs"),
        ("mean batch", f"{steps.mean_batch:.1f} utterances per worker"),
        ("padding", f"audio {steps.audio_padding:.1%}, tokens {steps.token_padding:.1%}"),
        ("workers in one bucket", f"{steps.bucket_agreement:.0%} of steps"),
        ("slowest worker", f"{steps.slowest_rank - 1:.1%} more padded audio than the mean"),
        ("rows left in the epoch", f"{steps.remainder}"),
        ("time to draw a batch", f"{steps.seconds_per_batch * 1e6:.0f} µs"),
    ]
    return ("simulated", ""), cells


def tune_trials(trials: Sequence[TuneTrial], names: Sequence[str]) -> Table:
    """Trials of a search with the settings `names`, best first."""
    columns = ("error", "steps", *(name.rpartition(".")[2] for name in names))
    cells = [
        (
            "none" if trial.error is None else f"{trial.error:.2%}",
            f"{trial.steps}{' (stopped early)' if trial.stopped_early else ''}",
            *(_short(trial.settings.get(name)) for name in names),
        )
        for trial in trials
    ]
    return columns, cells


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
