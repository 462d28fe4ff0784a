"""Rows used for scoring: the dev and test splits, encoded without assignment, and how they are decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from raytrain.config import Config
from raytrain.data.assignment import Row, row_table, rows_of
from raytrain.data.audio import AudioError
from raytrain.data.corpora.blocks import Block
from raytrain.data.corpora.reading import read_blocks
from raytrain.data.corpora.rejected import RejectedRows
from raytrain.data.corpora.types import Chunk
from raytrain.data.loader import read_rows
from raytrain.data.locator import AudioLocator
from raytrain.data.sentences import quota_of_each
from raytrain.data.sequences import BlockEncoder
from raytrain.data.text.prompt import prompt_languages
from raytrain.decoding.settings import DecodeSettings
from raytrain.errors import ManifestError
from raytrain.run_folder.chunks import chunks_of
from raytrain.run_folder.workspace import Workspace

if TYPE_CHECKING:
    from raytrain.data.batch import SpeechBatch
    from raytrain.training.faults import FaultNotes
    from raytrain.training.validation import Validator


@dataclass(frozen=True)
class EncodedSplit:
    """The usable rows of a small split, and the rejected ones."""

    rows: list[Row]
    rejected: RejectedRows


def encode_split(workspace: Workspace, split: str, limit: int | None = None) -> EncodedSplit:
    """Encoded rows of a small split (dev, test), at most `limit`, spread evenly over corpora as far as they have enough
    rows."""
    config, rejected = workspace.config, RejectedRows()
    encoder = BlockEncoder(workspace.tokenizer, config.model.prompt_format, by_words=config.tokenizer.by_words)
    by_corpus: dict[str, list[Row]] = {}
    for chunk in chunks_of(config, split):
        rows, finder = by_corpus.setdefault(chunk.corpus, []), AudioLocator(chunk)
        for block in () if _is_full(rows, limit) else _checked_blocks(chunk, encoder, rejected):
            rows += _encoded_rows(block, encoder, finder, config.model.max_positions)
            if _is_full(rows, limit):
                break
    share = None
    if limit is not None:
        share = quota_of_each(Counter({name: len(rows) for name, rows in by_corpus.items()}), limit)
    return EncodedSplit([row for rows in by_corpus.values() for row in rows[:share]], rejected)


def _is_full(rows: list[Row], limit: int | None) -> bool:
    return limit is not None and len(rows) >= limit


def _checked_blocks(chunk: Chunk, encoder: BlockEncoder, rejected: RejectedRows) -> Iterator[Block]:
    """The chunk's usable rows, block by block; rejected rows are counted."""
    for raw in read_blocks(chunk):
        block = encoder.check(raw)
        rejected.num_rows += len(block) + len(block.bad)
        for row in block.bad:
            rejected.add(chunk.corpus, row)
        yield block


def _encoded_rows(block: Block, encoder: BlockEncoder, finder: AudioLocator, max_positions: int) -> Iterator[Row]:
    table, problems = row_table(block, encoder.encode(block), finder)
    for row, member, problem in zip(rows_of(table), block.paths, problems, strict=True):
        # Without its offset, the reader would treat the whole tar as the recording.
        path = row.audio_path if problem is None else f"{row.audio_path}/{member}"
        # Rows longer than the decoder's positions are excluded from the validation loss, but not from the WER.
        yield row._replace(audio_path=path, tokens=row.tokens[: max_positions + 1])


def checked_split(workspace: Workspace, split: str, limit: int | None = None) -> EncodedSplit:
    """`encode_split` for rows used for scoring.

    Raises `ManifestError` if the split or one of its corpora has no usable row, or if more than `data.max_bad_fraction`
    of its rows are bad.
    """
    encoded, data = encode_split(workspace, split, limit), workspace.config.data
    corpora = data.corpora(split)
    encoded.rejected.check(f"data.{split}", corpora, len(encoded.rows), data.max_bad_fraction)
    used = {row.corpus for row in encoded.rows}
    unused = [corpus for corpus in corpora if corpus.name not in used]
    if unused:
        lines = [line for line in encoded.rejected.lines() if line.startswith(f"corpus {unused[0].name}: ")]
        raise ManifestError(
            f"corpus {unused[0].name} of data.{split} has no usable row",
            got=", ".join(unused[0].paths),
            why="a score over the other corpora would not represent the split",
            remedy=f"check the file, or remove the corpus from data.{split}" + "".join(f"\n  {line}" for line in lines),
        )
    return encoded


def is_translation(workspace: Workspace, row: Row) -> bool:
    """Whether, according to its prompt, a row's text is in a different language than its speech."""
    prompt = row.tokens[: row.prompt_length]
    source, target = prompt_languages(workspace.tokenizer, prompt, workspace.config.model.prompt_format)
    return source != target


def decode_settings(config: Config) -> DecodeSettings:
    """How `evaluate` and validation decode."""
    evaluate = config.evaluate
    return DecodeSettings(
        evaluate.beam_size,
        evaluate.length_penalty,
        max_generation_delta=evaluate.max_generation_delta,
        ctc_weight=evaluate.ctc_weight,
    )


@dataclass(frozen=True)
class DevBatches:
    """A rank's batches of the dev rows, read from disk each time; see `Validator.batches`.

    `on_batch` is called with each batch, and `mark` with its size (see `FaultNotes.marking`).
    """

    workspace: Workspace
    rows: list[Row]
    notes: FaultNotes | None
    on_batch: Callable[[str], None]
    mark: Callable[[None, int, int], None]

    def __call__(self, on_error: Callable[[Row, Exception], object]) -> Iterable[tuple[list[Row], SpeechBatch]]:
        from raytrain.training.faults import VALIDATION

        def note(row: Row, error: AudioError) -> None:
            self.workspace.quarantine.add(row, error)
            on_error(row, error)

        config, size = self.workspace.config, self.workspace.config.evaluate.batch_size
        if self.notes is not None:
            size = self.notes.validation_size(size)
        pad_id = self.workspace.tokenizer.pad_id
        for readable, batch in read_rows(self.rows, config.model.sample_rate, pad_id, size, note):
            self.on_batch("validating")
            self.mark(None, VALIDATION, len(readable))
            yield readable, batch


def check_dev_split(workspace: Workspace) -> None:
    """Raises `ManifestError` if there are dev manifests in which nothing can be scored."""
    config = workspace.config
    if config.data.dev:
        checked_split(workspace, "dev", config.train.max_validation_utterances)


def make_validator(
    workspace: Workspace,
    rank: int,
    world_size: int,
    notes: FaultNotes | None = None,
    on_batch: Callable[[str], None] = lambda doing: None,
    mark: Callable[[None, int, int], None] = lambda step, phase, size: None,
) -> Validator | None:
    """Validation on the dev manifests, or None if there are none.

    Batches that do not fit are halved, and `notes` record that for the next time; for `on_batch` and `mark` see
    `DevBatches`.
    """
    from raytrain.training.validation import Validator

    config, tokenizer = workspace.config, workspace.tokenizer
    if not config.data.dev:
        return None
    # Longest first and dealt round-robin, so that every rank gets about the same work.
    rows = encode_split(workspace, "dev", config.train.max_validation_utterances).rows
    rows = sorted(rows, key=lambda row: -row.duration_ms)[rank::world_size]
    return Validator(
        batches=DevBatches(workspace, rows, notes, on_batch, mark),
        is_translation=partial(is_translation, workspace),
        decode=tokenizer.decode,
        eos_id=tokenizer.eos_id,
        search=decode_settings(config),
        normalize=tokenizer.normalize,
        max_bad_fraction=config.data.max_bad_fraction,
        on_out_of_memory=notes.lower_validation if notes is not None else lambda size: None,
    )
