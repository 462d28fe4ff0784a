"""Stage `evaluate`: decode the test manifests on Ray Data (`raytrain.cluster.inference`).

A recording that can't be read gets an error instead of a hypothesis, is counted, and stays out of the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from raytrain.cluster.inference import Job, batch_sizes, find_pool, make_batches, recognise
from raytrain.config import Config, check_config
from raytrain.data.assignment import Row
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.decoding.requests import Request
from raytrain.errors import CheckpointError
from raytrain.evaluation.error_counts import count_errors
from raytrain.model.canary import Canary
from raytrain.run_folder.scored_rows import decode_settings, is_translation
from raytrain.run_folder.workspace import Workspace
from raytrain.storage.artifacts import read_state
from raytrain.training.checkpoint import Checkpoint

_NOTE = "checkpoints/last.json"
_TRAIN_AGAIN = "run `raytrain train` with this configuration, then `raytrain evaluate`"


@dataclass(frozen=True)
class TrainedNote:
    """What `last.json` says of the checkpoints that training ended with: steps, and ids of files by name."""

    best_step: int
    files: dict[str, str]
    last_step: int
    last_files: dict[str, str]


def load_run(config: dict[str, Any], location: str, checkpoint: str) -> tuple[Canary, CanaryTokenizer]:
    """The model of a run's `best` or `last` checkpoint and its tokenizer, for a worker."""
    workspace = Workspace(check_config(config), location)
    found = trained_checkpoint(workspace, checkpoint)
    model = Canary(workspace.model_config())
    model.load_state_dict(found.load_weights())
    return model, workspace.tokenizer


def trained_checkpoint(workspace: Workspace, which: str) -> Checkpoint:
    """The `best` or the `last` checkpoint that training noted when it ended; the newest note where there is none, as in
    a trial's folder. Raises `CheckpointError` where it is not what training wrote."""
    folder = workspace.checkpoints()
    workspace.store.bring(_NOTE)
    path = workspace.path(_NOTE)
    if not path.exists():
        return folder.to_decode(which)
    note = read_state(path, TrainedNote)
    if note is None:
        raise CheckpointError(
            f"{path} can't be read", why="it holds something else than training writes", remedy=_TRAIN_AGAIN
        )
    step, files = (note[name] for name in (("best_step", "files") if which == "best" else ("last_step", "last_files")))
    found = folder.weights_of(step)
    if found.meta["files"] != files:
        raise CheckpointError(
            f"{found.folder} is not the checkpoint that training wrote",
            why=f"its files have other ids than {_NOTE} says; another process may have written to the run folder",
            remedy=_TRAIN_AGAIN,
        )
    return found


def result_of(
    identity: int, row: Row, translated: bool, found: dict[str, Any], normalize: Callable[[str, str], str]
) -> dict[str, Any]:
    """A line of `hypotheses.jsonl`; see `raytrain.evaluation.scoring`. `normalize` takes a text and its language."""
    result = {
        "id": identity,
        "audio_filepath": row.audio_path,
        "duration_ms": row.duration_ms,
        "lang": row.language,
        "translated": translated,
        "text": row.text,
        "reference": normalize(row.text, row.language),
    }
    if "error" in found:
        return {**result, "hypothesis": None, "error": found["error"]}
    hypothesis = normalize(found["text"], row.language)
    wer = count_errors([result["reference"]], [hypothesis]).rate
    return {**result, "hypothesis": hypothesis, "wer": None if wer is None else round(wer, 6)}


def transcribe_rows(config: Config, location: str, rows: list[Row]) -> Iterator[dict[str, Any]]:
    """Hypotheses of test rows, batch by batch, from a pool of `evaluate.num_workers`; `id` is the row's place."""
    workspace, evaluate = Workspace(config, location), config.evaluate
    device = "auto" if config.train.device != "cpu" else "cpu"
    pool = find_pool(evaluate.num_workers, device, None, config.cluster)
    load = partial(load_run, config.model_dump(mode="json"), location, evaluate.checkpoint)
    # Whole rows, as in training and validation: what is longer than a window is not cut here.
    job = Job(
        load,
        decode_settings(config),
        config.model.sample_rate,
        workspace.tokenizer.pad_id,
        precision=evaluate.precision,
    )
    sizes = batch_sizes(workspace.model_config(), job.settings, pool, evaluate.batch_size)
    requests = [
        Request(
            row.audio_path,
            row.audio_start,
            row.audio_size,
            row.offset_ms,
            row.duration_ms,
            row.tokens[: row.prompt_length],
        )
        for row in rows
    ]
    for done in recognise(make_batches(list(enumerate(requests)), sizes, job, pool), job, pool):
        for found in done.texts:
            row = rows[found["id"]]
            translated = is_translation(workspace, row)
            yield result_of(found["id"], row, translated, found, workspace.tokenizer.normalize)
