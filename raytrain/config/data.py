"""Sections of what is read: corpora by split, their tokenizer, and the rows that are made of them."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raytrain.config.values import AnySize, Count, Section, Share
from raytrain.data.corpora.types import Corpus
from raytrain.errors import ConfigError
from raytrain.redaction import holds_credentials
from raytrain.settings import Range, Setting

DATA_ROOT_VARIABLE = "RAYTRAIN_DATA_ROOT"
WRITTEN = "paths are written to artifacts"
ELSEWHERE = "put them into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …) and leave them out of the path"
SPLITS = ("train", "dev", "test")


class StreamSection(Section):
    """Training without assignment; see `raytrain.data.stream.StreamSampler`."""

    buffer_size: Annotated[
        int, Range(1, 10**9), Setting("Utterances among which the sampler shuffles.", unit="utterances")
    ] = 20_000
    concurrent: Annotated[
        bool, Setting("Read ahead in a thread, which is faster and gives other batches in each run.")
    ] = False


class DataSection(Section):
    """Corpora by split. An entry of `train`, `dev` and `test` is a `Corpus`, or a path alone."""

    root: Annotated[
        str | None,
        Setting("The folder or URI of relative paths; unset, it is $RAYTRAIN_DATA_ROOT, or else the current folder."),
    ] = None
    train: Annotated[list[Corpus], Setting("Corpora to train on: paths, or entries with the keys below.")] = Field(
        min_length=1
    )
    dev: Annotated[list[Corpus], Setting("Corpora to validate on, listed as those of train.", lineage=False)] = []
    test: Annotated[
        list[Corpus], Setting("Corpora that evaluate transcribes, listed as those of train.", lineage=False)
    ] = []
    default_language: Annotated[str | None, Setting("The language of corpora and rows that name none, like de.")] = None
    temperature: Annotated[
        float,
        Range(0, 10**6, above=True),
        Setting("A corpus' share in training is weight · hours^(1/temperature): above 1, small ones come more often."),
    ] = 1.0
    temperature_by: Annotated[
        Literal["corpus", "language"],
        Setting("Whether the temperature is between corpora, or between languages of which each corpus has one."),
    ] = "corpus"
    max_bad_fraction: Annotated[
        Share,
        Setting(
            "More bad rows, or more rows that training has to replace, than this fraction of all are an error.",
            lineage=False,
        ),
    ] = 0.01
    audio_sample: Annotated[
        int,
        Range(0, 10**6),
        Setting(
            "Recordings of each corpus whose headers are read, and local files looked for, before training; 0 is for "
            "audio that only training can reach.",
            unit="recordings",
            lineage=False,
        ),
    ] = 256
    chunk_bytes: Annotated[
        Annotated[int, Range(1024, 1 << 40), AnySize] | None,
        Setting("What one worker reads at a time; unset, it grows with the corpus.", unit="bytes", lineage=False),
    ] = None
    stream: Annotated[
        StreamSection | None,
        Setting("Train on the corpora as they are, without assignment; {} stands for the defaults of the keys below."),
    ] = None
    workers: Annotated[
        Literal["threads", "ray"],
        Setting(
            "Decode audio in threads beside each training worker, or with ray on the free CPUs of the cluster.",
            lineage=False,
        ),
    ] = "threads"

    @field_validator("train", "dev", "test", mode="before")
    @classmethod
    def _plain_paths(cls, value: object) -> object:
        return _named_entries(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _names_differ(self) -> DataSection:
        for split in SPLITS:
            names = [corpus.name for corpus in self._entries(split)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{split} has more than one corpus called {', '.join(twice)}")
        if self.stream is not None and self.workers == "ray":
            raise ValueError("workers: ray needs an assignment, whose rows any node can read by number; unset stream")
        return self

    def corpora(self, split: str) -> list[Corpus]:
        """One split's corpora with absolute paths and the default language. Raises `ConfigError`."""
        root = os.path.expanduser(self.root or os.environ.get(DATA_ROOT_VARIABLE) or ".")
        if holds_credentials(root):
            raise ConfigError(f"${DATA_ROOT_VARIABLE} holds credentials", why=WRITTEN, remedy=ELSEWHERE)
        # An entry's language has precedence.
        return [
            dataclasses.replace(corpus.below(root), language=corpus.language or self.default_language)
            for corpus in self._entries(split)
        ]

    def _entries(self, split: str) -> list[Corpus]:
        entries: list[Corpus] = getattr(self, split)
        return entries


def _named_entries(values: list[object]) -> list[object]:
    """Entries of a split: a path alone becomes one with its file's name, and names that occur twice get a number."""
    entries = [_as_entry(value) for value in values]
    taken = {entry["name"] for entry in entries if isinstance(entry, dict) and entry.get("name")}
    for entry in entries:
        if not (isinstance(entry, dict) and not entry.get("name") and isinstance(entry.get("path"), str)):
            continue
        stem = entry["path"].rstrip("/").rpartition("/")[2].partition(".")[0] or "corpus"
        entry["name"] = next(name for name in _numbered(stem) if name not in taken)
        taken.add(entry["name"])
    return entries


def _as_entry(value: object) -> object:
    if isinstance(value, str):
        return {"name": "", "path": value}
    return dict(value) if isinstance(value, dict) else value


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}-{number}" for number in itertools.count(2))


class TokenizerSection(Section):
    """The tokenizer: a trained one, or one that is trained for each language, which gets its share of all texts."""

    path: Annotated[
        str | None,
        Setting(
            "A folder with a trained tokenizer, or a model whose tokenizer to take (a .nemo file, a run, a "
            "checkpoint). Unset, one is trained for each language."
        ),
    ] = None
    vocab_size: Annotated[int, Range(8, 1 << 20), Setting("Pieces of each language's tokenizer.", unit="tokens")] = 1024
    model_type: Annotated[Literal["bpe", "unigram"], Setting("SentencePiece's kind of model.")] = "bpe"
    max_sentences: Annotated[
        Count, Setting("Most texts to train on, of which each language has its share.", unit="texts")
    ] = 1_000_000
    max_unknown_fraction: Annotated[
        Share,
        Setting(
            "More tokens than this fraction of a corpus' texts in a language that stand for what the tokenizer can't "
            "write are an error.",
            lineage=False,
        ),
    ] = 0.01
    by_words: Annotated[
        bool, Setting("Encode each distinct word once where that gives exactly the same tokens.", lineage=False)
    ] = True


class AssignSection(Section):
    """How rows are written into their buckets."""

    materialize: Annotated[
        bool,
        Setting(
            "Copy each utterance's audio beside its row, as FLAC at the model's sample rate: for Parquet, whose audio "
            "can't be read by range, and for object stores, where many small reads are slow."
        ),
    ] = False
