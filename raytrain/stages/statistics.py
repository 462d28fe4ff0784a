"""Stage `statistics`: train the tokenizer if none is given, then count lengths, rejected rows and unknown pieces.

Corpora are cut into chunks (byte ranges, shards), which workers count (`raytrain.cluster.counting`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from raytrain.cluster.counting import count_all, sample_all
from raytrain.config import Config
from raytrain.data.corpora.rejected import RejectedExamples, RejectedRows
from raytrain.data.corpora.types import Chunk
from raytrain.data.counts import Counts, number_lines
from raytrain.data.probe import SHORT, UNREADABLE, came_back, least_share
from raytrain.data.sentences import SentenceSample
from raytrain.data.text.prompt import prompt_ids
from raytrain.data.text.tokenizer import FORMAT as TOKENIZER_FORMAT
from raytrain.data.text.tokenizer import CanaryTokenizer, train_tokenizer
from raytrain.run_folder.chunks import chunks_of, split_inputs
from raytrain.run_folder.documents import CHUNKS_FORMAT, STATISTICS_FORMAT
from raytrain.run_folder.histograms import write_histogram
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.context import Context
from raytrain.stages.length_statistics import length_totals, statistics_body
from raytrain.stages.unknown_pieces import UnknownPieces, check_unknown, listing_of, unknown_pieces
from raytrain.stages.unused_rows import show_rejected, warn_of_unused_corpora
from raytrain.storage.artifacts import file_id, write_json
from raytrain.storage.run_files import CHUNKS, HISTOGRAM, STATISTICS
from raytrain.training.conversion import load_model, model_stamp

OUTPUTS = ("tokenizer/tokenizer.json", "tokenizer/*.model", HISTOGRAM, STATISTICS, CHUNKS)


def key(workspace: Workspace) -> object:
    """What the stage depends on, as JSON values."""
    config = workspace.config
    return [
        [STATISTICS_FORMAT, CHUNKS_FORMAT, TOKENIZER_FORMAT],
        split_inputs(config, "train"),
        config.data.max_bad_fraction,
        config.data.audio_sample,
        config.section("tokenizer"),
        model_stamp(Path(config.tokenizer.path)) if config.tokenizer.path else None,
        config.model.prompt_format,
    ]


def is_whole(workspace: Workspace) -> bool:
    """Whether missing audio is still missing."""
    return not came_back(workspace.statistics().rejected_examples)


def run(context: Context) -> str:
    """Write the tokenizer, `histogram.parquet`, `statistics.json` and `chunks.json`."""
    config = context.config
    chunks = chunks_of(config, "train")
    with context.console.progress("sampling texts", len(chunks)) as update:
        tokenizer = make_tokenizer(config, context.path("tokenizer"), chunks, lambda number: update(advance=number))
    counts = _count(context, chunks, tokenizer)
    numbered = number_lines(counts, chunks)
    check_bad_rows(counts, config, counts.num_usable)
    unknown = unknown_pieces(counts)
    check_unknown(unknown, config.tokenizer)
    _write(context, counts, unknown, numbered, tokenizer.id)
    _warn(context, counts, unknown)
    return _summary(counts, tokenizer)


def _count(context: Context, chunks: list[Chunk], tokenizer: CanaryTokenizer) -> Counts:
    total = Counts()
    with context.console.progress("counting", len(chunks)) as update:
        for number, partial in count_all(chunks, tokenizer, context.config):
            total.add(partial)
            update(advance=number)
    return total


def _write(
    context: Context, counts: Counts, unknown: list[UnknownPieces], chunks: list[Chunk], tokenizer_id: str
) -> None:
    write_histogram(context.path(HISTOGRAM), counts.histogram)
    body = statistics_body(counts, [corpus.name for corpus in context.config.data.train], unknown)
    body["histogram_id"] = file_id(context.path(HISTOGRAM))
    write_json(context.path(STATISTICS), STATISTICS_FORMAT, body, {"tokenizer": tokenizer_id})
    write_json(context.path(CHUNKS), CHUNKS_FORMAT, [asdict(chunk) for chunk in chunks])
    context.tracker.log_metrics(length_totals(counts.histogram), 0, 0.0)
    context.tracker.log_artifact(context.path(STATISTICS))


def _warn(context: Context, counts: Counts, unknown: list[UnknownPieces]) -> None:
    show_rejected(context, counts.rejected.summary())
    used = {group[0] for group, histogram in counts.groups.items() if histogram.total().total}
    warn_of_unused_corpora(context, {corpus.name for corpus in context.config.data.train} - used)
    if unknown:
        listing = listing_of(unknown)
        context.console.warn(
            f"the tokenizer can't encode all characters of the texts, so a model can't produce them:{listing}"
        )
    for entry in counts.contradicted.summary():
        _warn_of_audio(context, entry, counts.probed[entry.corpus])


def _warn_of_audio(context: Context, contradicted: RejectedExamples, probed: int) -> None:
    """Warn where the sample's audio headers contradict the manifests."""
    first = contradicted.first[0]
    what = "are shorter than their rows say" if contradicted.reason == SHORT else "can't be read"
    context.console.warn(
        f"{contradicted.rows} of the {probed} recordings of {contradicted.corpus} that were checked {what}: "
        f"{first.file}:{first.line}: {first.detail}"
    )


def _summary(counts: Counts, tokenizer: CanaryTokenizer) -> str:
    histogram = counts.histogram
    checked = f", {counts.probed.total()} recordings checked" if counts.probed.total() else ""
    return f"{histogram.total} utterances, {histogram.hours:.2f} h{checked}, vocabulary {tokenizer.vocab_size}"


def make_tokenizer(
    config: Config, folder: Path, chunks: list[Chunk], on_chunks: Callable[[int], object] = lambda number: None
) -> CanaryTokenizer:
    """Load the configured tokenizer, or train one per language on a sample of the training texts; save it in `folder`.

    `on_chunks` is called as chunks are sampled. Raises `ManifestError` as `check_bad_rows` does.
    """
    section = config.tokenizer
    if section.path:
        return _given_tokenizer(Path(section.path).expanduser(), config.model.prompt_format, folder)
    sentences, counts = SentenceSample(section.max_sentences), Counts()
    for number, partial, rows in sample_all(chunks, config):
        sentences.add(partial)
        counts.add(rows)
        on_chunks(number)
    number_lines(counts, chunks)
    check_bad_rows(counts, config, sentences.num_rows.total())
    return train_tokenizer(
        {**sentences.texts()},
        section.vocab_size,
        folder,
        model_type=section.model_type,
        prompt_format=config.model.prompt_format,
    )


def _given_tokenizer(path: Path, prompt_format: str, folder: Path) -> CanaryTokenizer:
    if (path / "tokenizer.json").exists():
        tokenizer = CanaryTokenizer.load(path)
    else:
        tokenizer = CanaryTokenizer(load_model(path).tokenizers)
    # A tokenizer for another prompt format lacks tokens: one error now is better than one per row.
    language = tokenizer.languages[0]
    prompt_ids(tokenizer, language, language, prompt_format=prompt_format)
    tokenizer.save(folder)
    return tokenizer


def check_bad_rows(counts: Counts, config: Config, usable: int) -> None:
    """Raise `ManifestError`, naming the first bad lines, if more than `data.max_bad_fraction` of all rows are bad or no
    row is `usable`.

    Rows whose audio can't be read count as bad, since training would replace them: their share of a corpus' usable rows
    is a lower bound estimated from the sample whose headers were read.
    """
    bad = RejectedRows(num_rows=counts.num_rows.total())
    bad.merge(counts.rejected)
    for (corpus, reason), number in counts.contradicted.counts.items():
        if reason == UNREADABLE:
            usable_rows = counts.num_rows[corpus] - sum(counts.rejected.of_corpus(corpus).values())
            rows = round(least_share(number, counts.probed[corpus], usable_rows) * usable_rows)
            bad.judged_by = f"the headers of {counts.probed.total()} recordings"
            if rows:
                bad.extend(corpus, reason, rows, counts.contradicted.first(corpus, reason))
    bad.check("data.train", config.data.corpora("train"), usable, config.data.max_bad_fraction)
