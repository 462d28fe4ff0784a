"""Stage `evaluate`: decode the test manifests on Ray Data (`raytrain.cluster.inference`).

A recording that can't be read gets an error instead of a hypothesis, is counted, and stays out of the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from raytrain.cluster.inference import Job, batch_sizes, find_pool, make_batches, recognise
from raytrain.cluster.workspace import Workspace
from raytrain.config import Config, check_config
from raytrain.data.assignment import Row
from raytrain.data.requests import Request
from raytrain.data.tokenizer import CanaryTokenizer
from raytrain.model.canary import Canary
from raytrain.training.evaluation import count_errors


def load_run(config: dict[str, Any], location: str, checkpoint: str) -> tuple[Canary, CanaryTokenizer]:
    """The model of a run's `best` or `last` checkpoint and its tokenizer, for a worker."""
    workspace = Workspace(check_config(config), location)
    found = workspace.checkpoints().to_decode(checkpoint)
    model = Canary(workspace.model_config())
    model.load_state_dict(found.load_weights())
    return model, workspace.tokenizer


def result_of(
    identity: int, row: Row, translated: bool, found: dict[str, Any], normalize: Callable[[str, str], str]
) -> dict[str, Any]:
    """A line of `hypotheses.jsonl`; see `raytrain.training.scoring`. `normalize` takes a text and its language."""
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
        load, workspace.search(), config.model.sample_rate, workspace.tokenizer.pad_id, precision=evaluate.precision
    )
    sizes = batch_sizes(workspace.model_config(), job.settings, pool, evaluate.batch_size)
    requests = [
        Request(row.audio_path, row.audio_start, row.audio_size, row.offset_ms, row.duration_ms,
                row.tokens[: row.prompt_length])
        for row in rows
    ]  # fmt: skip
    for done in recognise(make_batches(list(enumerate(requests)), sizes, job, pool), job, pool):
        for found in done.texts:
            row = rows[found["id"]]
            translated = workspace.is_translation(row)
            yield result_of(found["id"], row, translated, found, workspace.tokenizer.normalize)
