"""Stage `assign`: every row of the corpora goes into one bucket, or into `rejected/` with its reason.

Workers assign chunk by chunk (`raytrain.cluster.assigning`); which bucket a row goes into is decided by
`BucketPlan.assign`. No shuffle is needed: the schedule permutes row numbers when it draws batches.
"""

from __future__ import annotations

from pathlib import Path

from raytrain.cluster.assigning import assign_all
from raytrain.cluster.placement import Placement
from raytrain.config import Config
from raytrain.data.assignment import INDEX_FORMAT, IndexBody, note_name, write_index
from raytrain.data.assignment.assigner import AssignSettings
from raytrain.data.corpora.rejected import RejectedRows
from raytrain.data.corpora.rows import REASONS as ROW_REASONS
from raytrain.data.corpora.types import Chunk
from raytrain.data.probe import MISSING, came_back
from raytrain.run_folder.assigned_chunks import FOLDER
from raytrain.run_folder.chunks import chunks_of, numbered_chunks, split_inputs
from raytrain.run_folder.documents import read_artifact
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.context import Context
from raytrain.stages.unused_rows import show_rejected, warn_of_unused_corpora
from raytrain.storage.artifacts import content_id

INDEX = f"{FOLDER}/index.json"
_BAD_ROWS = (*ROW_REASONS, MISSING)


def key(workspace: Workspace) -> object:
    """What the stage depends on, as JSON values."""
    config = workspace.config
    return [
        INDEX_FORMAT,
        split_inputs(config, "train"),
        workspace.plan_id,
        workspace.tokenizer.id,
        config.model.prompt_format,
        config.model.sample_rate if config.assign.materialize else None,
        config.data.audio_sample > 0,
    ]


def is_whole(workspace: Workspace) -> bool:
    """Whether every chunk's note is present (the note of a changed part is removed), missing audio is still missing,
    and the bad rows are within the current limit."""
    index = read_artifact(workspace.path(INDEX), INDEX_FORMAT, IndexBody).body
    names = workspace.store.names(f"{FOLDER}/parts", "*.json")
    stand = all(Path(note_name(chunk)).name in names for chunk in range(len(index.notes)))
    few = not bad_rows(index).too_many(workspace.config.data.max_bad_fraction)
    return stand and few and not came_back(index.rejected_examples)


def run(context: Context) -> str:
    """Write the parts of all buckets, and `assignment/index.json`."""
    workspace, data = context.workspace, context.config.data
    _assign(context, numbered_chunks(workspace, chunks_of(context.config, "train")))
    index = read_artifact(context.path(INDEX), INDEX_FORMAT, IndexBody).body
    bad_rows(index).check("data.train", data.corpora("train"), index.rows, data.max_bad_fraction)
    rejected = sum(index.rejected.values())
    context.tracker.log_metrics({"assigned": index.rows, "rejected": rejected}, 0, 0.0)
    show_rejected(context, index.rejected_examples)
    counted = workspace.statistics().by_corpus
    usable = {name for name, corpus in counted.items() if corpus.utterances}
    warn_of_unused_corpora(context, usable - _assigned_corpora(index))
    listing = ", ".join(f"{number} {reason}" for reason, number in index.rejected.items())
    return f"{index.rows} rows; rejected {rejected}" + (f" ({listing})" if listing else "")


def _assign(context: Context, chunks: list[Chunk]) -> None:
    """Assign all chunks, and write the index of their notes."""
    workspace = context.workspace
    inputs = content_id([context.key, [[chunk.path, chunk.start, chunk.end] for chunk in chunks]])
    notes = []
    with context.console.progress("assigning", len(chunks)) as update:
        for note in assign_all(
            chunks,
            workspace.tokenizer,
            workspace.plan,
            workspace.store,
            settings_of(context.config),
            key=inputs,
            placement=Placement.data(context.config.cluster),
        ):
            notes.append(note)
            update(advance=1)
    parents = {"bucket_plan": workspace.plan_id, "tokenizer": workspace.tokenizer.id}
    grid = [(bucket.max_duration_ms, bucket.max_tokens) for bucket in workspace.plan.grid.buckets]
    write_index(context.path(FOLDER), notes, grid, workspace.statistics().rows, parents)


def settings_of(config: Config) -> AssignSettings:
    """How the run's rows are assigned."""
    return AssignSettings(
        prompt_format=config.model.prompt_format,
        by_words=config.tokenizer.by_words,
        sample_rate=config.model.sample_rate if config.assign.materialize else None,
        cache_size=config.run.cache_size,
        check_audio=config.data.audio_sample > 0,
    )


def bad_rows(index: IndexBody) -> RejectedRows:
    """The bad rows that an index lists. A row that fits no bucket is not bad, unless no row fits."""
    rows = RejectedRows(num_rows=index.rows + sum(index.rejected.values()))
    for entry in index.rejected_examples:
        if entry.reason in _BAD_ROWS or not index.rows:
            rows.extend(entry.corpus, entry.reason, entry.rows, entry.first)
    return rows


def _assigned_corpora(index: IndexBody) -> set[str]:
    """Corpora that have rows in a bucket."""
    corpus_of = [name for name, num_chunks in index.corpora for _ in range(num_chunks)]
    return {corpus_of[chunk] for rows in index.buckets for chunk, number in enumerate(rows) if number}
