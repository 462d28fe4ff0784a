"""Stage `evaluate`: decode the test manifests on Ray Data (`raytrain.cluster.inference`) and score the hypotheses.

A recording that can't be read gets an error instead of a hypothesis; it is counted but excluded from the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import orjson

from raytrain.cluster.inference import batch_sizes, make_batches, recognize
from raytrain.cluster.inference_worker import RecognitionJob, RecognizedText
from raytrain.cluster.pool import find_pool
from raytrain.config import Config
from raytrain.data.assignment import Row
from raytrain.decoding.requests import Request
from raytrain.errors import DataError
from raytrain.evaluation.error_counts import count_errors
from raytrain.evaluation.readable import are_enough_readable
from raytrain.evaluation.scoring import Result, score, texts_of
from raytrain.evaluation.worst import worst
from raytrain.report.errors import write_errors
from raytrain.run_folder.chunks import split_inputs
from raytrain.run_folder.documents import SCORES_FORMAT
from raytrain.run_folder.scored_rows import EncodedSplit, checked_split, decode_settings, is_translation
from raytrain.run_folder.trained import load_run
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.context import Context
from raytrain.storage.artifacts import atomic_write_bytes, file_id, write_json
from raytrain.storage.run_files import ERRORS_PAGE, HYPOTHESES, SCORES, TRAINED_NOTE

_NUM_EXAMPLES = 3


def key(workspace: Workspace) -> object:
    """What the stage depends on, as JSON values."""
    config = workspace.config
    checkpoint = file_id(workspace.path(TRAINED_NOTE))
    return [SCORES_FORMAT, config.section("evaluate"), checkpoint, split_inputs(config, "test")]


def run(context: Context) -> str:
    """Write `hypotheses.jsonl`, `scores.json` and `errors.html`."""
    test = checked_split(context.workspace, "test")
    for reason, number in test.rejected.by_reason().items():
        context.console.warn(f"{number} test row(s) left out: {reason}")
    for name in (SCORES, ERRORS_PAGE):  # they belong to earlier hypotheses
        context.workspace.store.discard(name)
    results = _transcribe(context, test)
    atomic_write_bytes(context.path(HYPOTHESES), b"".join(orjson.dumps(result) + b"\n" for result in results))
    check_unreadable(results, context.config.data.max_bad_fraction)
    scores = _write_scores(context, results)
    if scores["unreadable"]:
        context.console.warn(f"{scores['unreadable']} recording(s) can't be read; hypotheses.jsonl says why")
    if scores["references_changed"]:
        context.console.warn(
            f"{scores['references_changed']} of {len(results) - scores['unreadable']} references are scored "
            "as normalized by the tokenizer; hypotheses.jsonl has both forms"
        )
    return ", ".join(_summary(scores))


def _transcribe(context: Context, test: EncodedSplit) -> list[Result]:
    results = []
    with context.console.progress("transcribing", len(test.rows)) as update:
        for result in transcribe_rows(context.config, context.workspace.store.location, test.rows):
            results.append(result)
            update(advance=1)
    return sorted(results, key=lambda result: result["id"])


def _write_scores(context: Context, results: Sequence[Result]) -> Mapping[str, Any]:
    """Write `scores.json` and `errors.html`, and log all files and metrics."""
    texts = texts_of(results, context.config.evaluate.normalizer)
    scores = score(texts).to_dict()
    parents = {"checkpoint": file_id(context.path(TRAINED_NOTE))}
    write_json(context.path(SCORES), SCORES_FORMAT, scores, parents)
    write_errors(context.path(ERRORS_PAGE), title=context.config.name, scores=scores, worst=worst(texts))
    context.tracker.log_metrics(_test_metrics(scores), 0, 0.0)
    for name in (SCORES, HYPOTHESES, ERRORS_PAGE):
        context.tracker.log_artifact(context.path(name))
    return scores


def transcribe_rows(config: Config, location: str, rows: list[Row]) -> Iterator[Result]:
    """Hypotheses of test rows, batch by batch, from a pool of `evaluate.num_workers`; `id` is the row's index."""
    workspace, evaluate = Workspace(config, location), config.evaluate
    device = "auto" if config.train.device != "cpu" else "cpu"
    pool = find_pool(evaluate.num_workers, device, None, config.cluster)
    load = partial(load_run, config.model_dump(mode="json"), location, evaluate.checkpoint)
    # Whole rows, as in training and validation: long recordings are not cut into windows here.
    job = RecognitionJob(
        load,
        decode_settings(config),
        config.model.sample_rate,
        workspace.tokenizer.pad_id,
        precision=evaluate.precision,
    )
    sizes = batch_sizes(workspace.model_config(), job.settings, pool, evaluate.batch_size)
    requests = list(enumerate(map(_request, rows)))
    for batch in recognize(make_batches(requests, sizes, job, pool), job, pool):
        for text in batch.texts:
            row = rows[text["id"]]
            yield result_of(text["id"], row, is_translation(workspace, row), text, workspace.tokenizer.normalize)


def _request(row: Row) -> Request:
    prompt = row.tokens[: row.prompt_length]
    return Request(row.audio_path, row.audio_start, row.audio_size, row.offset_ms, row.duration_ms, prompt)


def result_of(
    identity: int, row: Row, translated: bool, recognized: RecognizedText, normalize: Callable[[str, str], str]
) -> Result:
    """A line of `hypotheses.jsonl`; see `raytrain.evaluation.scoring`. `normalize` takes a text and its language."""
    reference = normalize(row.text, row.language)
    result = {
        "id": identity,
        "audio_filepath": row.audio_path,
        "duration_ms": row.duration_ms,
        "lang": row.language,
        "translated": translated,
        "text": row.text,
        "reference": reference,
    }
    if "error" in recognized:
        return {**result, "hypothesis": None, "error": recognized["error"]}
    hypothesis = normalize(recognized["text"], row.language)
    wer = count_errors([reference], [hypothesis]).rate
    return {**result, "hypothesis": hypothesis, "wer": None if wer is None else round(wer, 6)}


def check_unreadable(results: Sequence[Result], limit: float) -> None:
    """Raise `DataError` where more than `limit` of the test's recordings, or all of them, can't be read."""
    unreadable = [result for result in results if result["hypothesis"] is None]
    if are_enough_readable(len(unreadable), len(results), limit):
        return
    raise DataError(
        f"{len(unreadable)} of {len(results)} test recordings can't be read",
        got=f"{len(unreadable) / len(results):.2%}" if results else None,
        allowed=f"data.max_bad_fraction = {limit:.2%}, and at least one that can be read",
        why="a score over the remaining recordings would not represent the test set",
        remedy="check data.test, data.root and that every worker sees the audio, or raise the limit; hypotheses.jsonl "
        "has the texts of the others" + "".join(f"\n  {result['error']}" for result in unreadable[:_NUM_EXAMPLES]),
    )


def _test_metrics(scores: Mapping[str, Any]) -> dict[str, float]:
    rates = ("wer", "cer", "wer_normalized")
    metrics = {f"test_{name}": scores[name] for name in rates if scores.get(name) is not None}
    return metrics | {
        f"test_{name}_{language}": value for name in ("bleu", "chrf") for language, value in scores[name].items()
    }


def _summary(scores: Mapping[str, Any]) -> Iterator[str]:
    if scores["wer"] is not None:
        low, high = scores["wer_ci"]
        yield f"WER {scores['wer']:.1%} ({low:.1%} to {high:.1%}) on {scores['utterances']} utterances"
    if scores.get("wer_normalized") is not None:
        yield f"normalized {scores['wer_normalized']:.1%}"
    for language, value in scores["bleu"].items():
        yield f"BLEU {value:.1f} into {language}"
    if scores["wer"] is None and not scores["bleu"]:
        yield "no score: no reference has a word"
