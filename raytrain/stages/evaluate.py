"""Stage `evaluate`: decode the test manifests on Ray Data (`raytrain.cluster.inference`).

A recording that can't be read gets an error instead of a hypothesis, is counted, and stays out of the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from raytrain.cluster.inference import Job, batch_sizes, find_pool, make_batches, recognise
from raytrain.config import Config
from raytrain.data.assignment import Row
from raytrain.decoding.requests import Request
from raytrain.evaluation.error_counts import count_errors
from raytrain.run_folder.scored_rows import decode_settings, is_translation
from raytrain.run_folder.trained import load_run
from raytrain.run_folder.workspace import Workspace


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
