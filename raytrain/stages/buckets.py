"""Stage `buckets`: the bucket plan for the histogram of lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from raytrain.lengths import make_plan, padding_by_scheme
from raytrain.lengths.compare import PaddingRow
from raytrain.model.cost import cost_of
from raytrain.run_folder.documents import PLAN_FORMAT
from raytrain.run_folder.histograms import read_histogram
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.context import Context
from raytrain.storage.artifacts import write_json
from raytrain.storage.run_files import BUCKET_PLAN, HISTOGRAM


def key(workspace: Workspace) -> object:
    """What the stage depends on, as JSON values."""
    config = workspace.config
    cost = asdict(cost_of(workspace.model_config())) if config.buckets.policy == "optimal" else None
    return [PLAN_FORMAT, config.section("buckets", "seed"), workspace.statistics().histogram_id, cost]


def run(context: Context) -> str:
    """Write `bucket_plan.json`, with the padding of several batching schemes."""
    workspace, config = context.workspace, context.config
    histogram = read_histogram(context.path(HISTOGRAM))
    histogram_id = workspace.statistics().histogram_id
    plan = make_plan(histogram, config.buckets, histogram_id, cost_of(workspace.model_config()))
    padding = padding_by_scheme(histogram, plan, seed=config.seed)
    body = {"plan": plan.to_body(), "padding_by_scheme": [asdict(row) for row in padding]}
    write_json(context.path(BUCKET_PLAN), PLAN_FORMAT, body, {"histogram": histogram_id})
    _track(context, padding)
    first, last = padding[0], padding[-1]
    return (
        f"{len(plan.grid.buckets)} buckets; audio padding {first.audio_padding:.1%} → {last.audio_padding:.1%}, "
        f"token padding {first.token_padding:.1%} → {last.token_padding:.1%}"
    )


def _track(context: Context, padding: Sequence[PaddingRow]) -> None:
    for row in padding:
        name = row.scheme.replace(" ", "_")
        metrics = {f"audio_padding.{name}": row.audio_padding, f"token_padding.{name}": row.token_padding}
        context.tracker.log_metrics(metrics, 0, 0.0)
    context.tracker.log_artifact(context.path(BUCKET_PLAN))
