"""Stage `report`: one HTML page about the output of the earlier stages."""

from __future__ import annotations

from raytrain.run_folder.workspace import Workspace
from raytrain.stages.context import Context
from raytrain.storage.artifacts import file_id
from raytrain.storage.run_files import (
    ASSIGNMENT_INDEX,
    BATCH_PROFILE,
    BUCKET_PLAN,
    HYPOTHESES,
    REPORT,
    SCORES,
    STATISTICS,
    TRAINED_NOTE,
)


def key(workspace: Workspace) -> object:
    """What the stage depends on, as JSON values."""
    names = [STATISTICS, BUCKET_PLAN, BATCH_PROFILE]
    if workspace.config.data.stream is None:
        names.append(ASSIGNMENT_INDEX)
    results = (TRAINED_NOTE, HYPOTHESES, SCORES)
    return [[name, file_id(workspace.path(name))] for name in (*names, *results)]


def run(context: Context) -> str:
    """Write `report.html`."""
    from raytrain.report.page import write_report  # with matplotlib, which no other stage needs

    path = write_report(context.workspace.run_dir, context.path(REPORT), title=context.config.name)
    context.tracker.log_artifact(path)
    return str(path)
