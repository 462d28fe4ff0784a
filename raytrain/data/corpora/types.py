"""The types of a corpus: `Corpus` (an entry of the configuration's `data.train`), the `Chunk`s that workers read
independently, and the rows of a chunk: `Utterance`s, and unusable `BadRow`s."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

from raytrain.data.text.slots import PromptKey
from raytrain.settings import Range, Setting, refuse, setting_problems
from raytrain.storage.locations import absolute

Format = Literal["nemo", "nemo_tarred", "lhotse_cuts", "lhotse_shar", "parquet", "audiofolder"]
TAR_FORMATS = ("nemo_tarred", "lhotse_shar")

Fields = dict[str, Any]  # a row's fields, as JSON gives them
Problem = tuple[str, str]  # why a row can't be used: one of `rows.REASONS`, and a detail
# A row as a format's reader gives it: fields with NeMo's names, or why it can't be read, or None for a blank line.
RawRow = Fields | Problem | None


@dataclass(frozen=True)
class Corpus:
    """One corpus of a split."""

    __pydantic_config__ = {"extra": "forbid"}

    name: Annotated[str, Setting("The corpus' name, unique in its split.")]
    path: Annotated[
        str | tuple[str, ...],
        Setting("Its files: local paths, relative to data.root, or URIs, with {0..7}, _OP_0..7_CL_ or * for several."),
    ]
    format: Annotated[Format | None, Setting("What the files are; detected from them by default.")] = None
    audio: Annotated[
        str | tuple[str, ...] | None,
        Setting(
            "The tars of nemo_tarred, and for other formats the folder of relative audio paths, by default the "
            "manifest's."
        ),
    ] = None
    language: Annotated[str | None, Setting("The spoken language of rows that don't give one.")] = None
    target_language: Annotated[str | None, Setting("The language of the text of rows that don't give one.")] = None
    weight: Annotated[float, Range(0, 10**9, above=True), Setting("Multiplies the corpus' share in training.")] = 1.0

    def __post_init__(self) -> None:
        problems = setting_problems(self)
        if not self.name:
            problems.append("a corpus needs a name")
        if not self.path:
            problems.append(f"corpus {self.name} names no path")
        if self.format == "nemo_tarred" and not self.audio:
            problems.append(f"corpus {self.name}: nemo_tarred needs audio, the names of its tars")
        refuse(problems)

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)

    def below(self, root: str) -> Corpus:
        """The same corpus with absolute paths."""
        audio = self.audio
        if audio is not None:
            audio = absolute(audio, root) if isinstance(audio, str) else tuple(absolute(path, root) for path in audio)
        return replace(self, path=tuple(absolute(path, root) for path in self.paths), audio=audio)


@dataclass(frozen=True)
class Chunk:
    """A part of a corpus that one worker reads; `index` numbers the chunks of a split.

    `start` and `end` are bytes of a manifest or rows of a Parquet file. `audio` is the tar that holds the audio, or the
    folder of relative audio paths. `first_line` is the number of the first line that begins in the chunk, 0 if unknown.
    `shard` is the tar's number, None if its name has none.
    """

    path: str
    start: int
    end: int
    index: int = 0
    corpus: str = ""
    format: str = "nemo"
    audio: str = ""
    language: str | None = None
    target_language: str | None = None
    first_line: int = 0
    shard: int | None = None


class Utterance(NamedTuple):
    """A usable row. Times in whole milliseconds, the duration rounded up.

    `audio_path` is absolute or a URI. `member` is the name of the audio inside a tar, or its row in a Parquet file;
    empty where `audio_path` is the recording itself. `slots` are further prompt slots of the row, as (slot, value in
    the row). Only the slots of the prompt's format are used and checked: `timestamp` may mean something else in a
    corpus made for `canary`.
    """

    audio_path: str
    offset_ms: int
    duration_ms: int
    text: str
    source_lang: str
    target_lang: str
    pnc: bool
    slots: tuple[tuple[str, Any], ...] = ()
    member: str = ""

    @property
    def prompt_key(self) -> PromptKey:
        """The fields that determine its prompt."""
        return PromptKey(self.source_lang, self.target_lang, self.pnc, self.slots)


class BadRow(NamedTuple):
    """An unusable row: its position (1-based line, or row of a Parquet file), the reason (one of
    `raytrain.data.corpora.rows.REASONS`), and a detail."""

    file: str
    line: int
    reason: str
    detail: str
