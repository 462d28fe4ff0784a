"""Sections about data: corpora by split, the tokenizer, and the assigned rows."""

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
ELSEWHERE = "put them in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …) and remove them from the path"
SPLITS = ("train", "dev", "test")


class StreamSection(Section):
    """Training without assignment; see `raytrain.data.stream.StreamSampler`."""

    buffer_size: Annotated[
        int, Range(1, 10**9), Setting("Size of the sampler's shuffle buffer.", unit="utterances")
    ] = 20_000
    concurrent: Annotated[
        bool, Setting("Read ahead in a thread, which is faster but gives different batches in each run.")
    ] = False


class DataSection(Section):
    """Corpora by split. An entry of `train`, `dev` and `test` is a `Corpus` or just a path."""

    root: Annotated[
        str | None,
        Setting(
            "The base folder or URI of relative paths; defaults to $RAYTRAIN_DATA_ROOT, or else the current folder."
        ),
    ] = None
    train: Annotated[list[Corpus], Setting("Corpora to train on: paths, or entries with the keys below.")] = Field(
        min_length=1
    )
    dev: Annotated[list[Corpus], Setting("Corpora to validate on, listed like those of train.", lineage=False)] = []
    test: Annotated[
        list[Corpus], Setting("Corpora that evaluate transcribes, listed like those of train.", lineage=False)
    ] = []
    default_language: Annotated[
        str | None, Setting("The language of corpora and rows that specify none, such as de.")
    ] = None
    temperature: Annotated[
        float,
        Range(0, 10**6, above=True),
        Setting(
            "A corpus' share in training is weight · hours^(1/temperature): above 1, small corpora come more often."
        ),
    ] = 1.0
    temperature_by: Annotated[
        Literal["corpus", "language"],
        Setting("Apply the temperature to corpora, or to languages (one per corpus)."),
    ] = "corpus"
    max_bad_fraction: Annotated[
        Share,
        Setting(
            "The largest fraction of bad rows, or of rows that training has to replace, that is not an error.",
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
        Setting(
            "Bytes that one worker reads at a time; by default it grows with the corpus.", unit="bytes", lineage=False
        ),
    ] = None
    stream: Annotated[
        StreamSection | None,
        Setting("Train directly on the corpora, without assignment; {} uses the defaults of the keys below."),
    ] = None
    workers: Annotated[
        Literal["threads", "ray"],
        Setting(
            "Decode audio in threads of each training worker or, with ray, on the cluster's free CPUs.",
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
            raise ValueError("workers: ray needs an assignment, whose rows any node can read by index; unset stream")
        return self

    def corpora(self, split: str) -> list[Corpus]:
        """One split's corpora with absolute paths and the default language. Raises `ConfigError`."""
        root = os.path.expanduser(self.root or os.environ.get(DATA_ROOT_VARIABLE) or ".")
        if holds_credentials(root):
            raise ConfigError(f"${DATA_ROOT_VARIABLE} holds credentials", why=WRITTEN, remedy=ELSEWHERE)
        # An entry's language takes precedence.
        return [
            dataclasses.replace(corpus.below(root), language=corpus.language or self.default_language)
            for corpus in self._entries(split)
        ]

    def _entries(self, split: str) -> list[Corpus]:
        entries: list[Corpus] = getattr(self, split)
        return entries


def _named_entries(values: list[object]) -> list[object]:
    """Entries of a split: a bare path becomes an entry named after its file, and duplicate names get a number."""
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
    """The tokenizer: an existing one, or one trained per language on that language's share of all texts."""

    path: Annotated[
        str | None,
        Setting(
            "A folder with a trained tokenizer, or a model whose tokenizer to use (a .nemo file, a run, a "
            "checkpoint). By default one is trained per language."
        ),
    ] = None
    vocab_size: Annotated[
        int, Range(8, 1 << 20), Setting("Vocabulary size of each language's tokenizer.", unit="tokens")
    ] = 1024
    model_type: Annotated[Literal["bpe", "unigram"], Setting("SentencePiece's model type.")] = "bpe"
    max_sentences: Annotated[
        Count, Setting("Maximum number of texts to train on, divided among languages.", unit="texts")
    ] = 1_000_000
    max_unknown_fraction: Annotated[
        Share,
        Setting(
            "The largest fraction of a corpus' tokens in a language that may be unknown pieces; more is an error.",
            lineage=False,
        ),
    ] = 0.01
    by_words: Annotated[
        bool, Setting("Encode each distinct word only once, if that gives exactly the same tokens.", lineage=False)
    ] = True


class AssignSection(Section):
    """How rows are written into their buckets."""

    materialize: Annotated[
        bool,
        Setting(
            "Copy each utterance's audio next to its row, as FLAC at the model's sample rate: for Parquet, whose audio "
            "can't be read by range, and for object stores, where many small reads are slow."
        ),
    ] = False
