"""Configuration: YAML plus `section.key=value` overrides, checked strictly as a whole.

An unknown key is an error, all errors are reported together, and each unknown key comes with the nearest
known one. Settings of an algorithm live beside the class that they configure; this module nests them.

    config = load_config(Path("configs/digits.yaml"), ["train.max_steps=100"])
    config.train.max_steps        # 100
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import itertools
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from raytrain.config.selectors import check_labels, check_resources
from raytrain.data.augment import AugmentSettings
from raytrain.data.corpora.types import Corpus
from raytrain.errors import ConfigError
from raytrain.lengths.plan import BucketSettings
from raytrain.lengths.schemes import SCHEMES
from raytrain.model.config import ModelConfig
from raytrain.redaction import MLFLOW_VARIABLE, TRACKING_VARIABLE, holds_credentials, redacted, without_credentials
from raytrain.settings import Range
from raytrain.storage.filesystem import absolute, is_uri
from raytrain.storage.run_store import DEFAULT_CACHE_BYTES, local_folder
from raytrain.storage.yaml_loading import load_yaml, read_yaml
from raytrain.training.settings import MAX_WORKERS, ErrorRate, LearningRate, Minutes, Steps, TrainSettings

DATA_ROOT_VARIABLE = "RAYTRAIN_DATA_ROOT"
RUN_ROOT_VARIABLE = "RAYTRAIN_RUN_ROOT"
_SIZE = re.compile(r"^\s*(\d{1,18}(?:\.\d{1,18})?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?\s*$", re.IGNORECASE)
_LONGEST_SHOWN = 200  # characters of a value in a message
_MOST_PROBLEMS = 50
_NOT_TEXT = "without quotes YAML takes it (like no, on, 1:30, 2024-01-01) for something else than text: quote it"
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_WRITTEN = "paths are written to artefacts"
_ELSEWHERE = "give them to the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …) and leave them out of the path"


Count = Annotated[int, Range(1, 10**12)]
Bytes = Annotated[int, Range(1 << 20, 1 << 60)]
BatchSize = Annotated[int, Range(1, 1 << 24)]
Share = Annotated[float, Range(0, 1)]
Amount = Annotated[float, Range(0, 10**15)]
End = Annotated[float, Range(-(10**15), 10**15)]


def parse_bytes(value: Any) -> Any:
    """`"16GiB"` → 17179869184; whole numbers pass. KB is 1000 bytes, KiB 1024."""
    if not isinstance(value, str):
        return value
    match = _SIZE.match(value)
    if not match:
        raise ValueError(f"{value!r} is not a size; write for example 16GiB or 512MiB")
    unit = (match[2] or "B").lower()
    base = 1024 if "ib" in unit else 1000
    return int(float(match[1]) * base ** _POWERS.get(unit[0], 0))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(_Section):
    """Where results go: `<root>/<name>/`, where `root` is a folder that all nodes share, or a URI (`s3://…`).

    `root` falls back to $RAYTRAIN_RUN_ROOT, then `runs`. Of a run at a URI each node keeps what it reads in its cache,
    $RAYTRAIN_CACHE or `~/.cache/raytrain`: parts of the assignment up to `cache_size`, the least used of which make
    way.
    """

    root: str | None = None
    cache_size: Bytes = DEFAULT_CACHE_BYTES

    _sizes = field_validator("cache_size", mode="before")(parse_bytes)


class StreamSection(_Section):
    """Training without assignment; see `raytrain.data.stream.StreamSampler`."""

    buffer_size: Annotated[int, Range(1, 10**9)] = 20_000
    concurrent: bool = False


class DataSection(_Section):
    """Corpora by split; see `raytrain.data.corpora.types.Corpus` for an entry's fields. A plain path is an entry too.

    Local paths are relative to `root` (falls back to $RAYTRAIN_DATA_ROOT, then `.`). A corpus' share in training is
    weight · hours^(1/`temperature`): above 1, small corpora are heard more often. With `temperature_by: language` it
    is the small languages, each corpus holding one. `chunk_bytes` is what one worker reads at a time; unset, it grows
    with the corpus. Of each corpus the headers of `audio_sample` recordings are read and local audio files looked for
    before training; 0 is for audio that only training can reach. More bad rows, and more rows that training has to
    replace, than `max_bad_fraction` of all are an error. With `stream` (`{}` for its defaults) training reads the
    corpora as they are, without assignment. `workers: ray` decodes audio on the cluster's free CPUs instead of in
    threads beside each training worker.
    """

    root: str | None = None
    train: list[Corpus] = Field(min_length=1)
    dev: list[Corpus] = []
    test: list[Corpus] = []
    default_language: str | None = None
    temperature: Annotated[float, Range(0, 10**6, above=True)] = 1.0
    temperature_by: str = Field("corpus", pattern="^(corpus|language)$")
    max_bad_fraction: Share = 0.01
    audio_sample: Annotated[int, Range(0, 10**6)] = 256
    chunk_bytes: Annotated[int, Range(1024, 1 << 40)] | None = None
    stream: StreamSection | None = None
    workers: str = Field("threads", pattern="^(threads|ray)$")

    _sizes = field_validator("chunk_bytes", mode="before")(parse_bytes)

    @field_validator("train", "dev", "test", mode="before")
    @classmethod
    def _plain_paths(cls, value: Any) -> Any:
        """A path alone gets its file's name; names that occur twice get a number."""
        if not isinstance(value, list):
            return value
        entries = [
            {"name": "", "path": one} if isinstance(one, str) else dict(one) if isinstance(one, dict) else one
            for one in value
        ]
        taken = {one["name"] for one in entries if isinstance(one, dict) and one.get("name")}
        for entry in entries:
            if not (isinstance(entry, dict) and not entry.get("name") and isinstance(entry.get("path"), str)):
                continue
            stem = entry["path"].rstrip("/").rpartition("/")[2].partition(".")[0] or "corpus"
            numbered = (f"{stem}-{number}" for number in itertools.count(2))
            entry["name"] = stem if stem not in taken else next(name for name in numbered if name not in taken)
            taken.add(entry["name"])
        return entries

    @model_validator(mode="after")
    def _names_differ(self) -> DataSection:
        for split in ("train", "dev", "test"):
            names = [corpus.name for corpus in getattr(self, split)]
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
            raise ConfigError(f"${DATA_ROOT_VARIABLE} holds credentials", why=_WRITTEN, remedy=_ELSEWHERE)
        # An entry's own language wins.
        return [
            dataclasses.replace(corpus.below(root), language=corpus.language or self.default_language)
            for corpus in getattr(self, split)
        ]


class TokenizerSection(_Section):
    """`path` names a folder with a trained tokenizer, or a model whose tokenizer to take (a `.nemo` file, a run, a
    checkpoint); without it one is trained per language, on at most `max_sentences` texts, each language of all
    corpora having its share. More than `max_unknown_fraction` of the tokens of a corpus' texts in a language that stand
    for what the tokenizer can't write are an error. `by_words` counts each distinct word once where that is exact."""

    path: str | None = None
    vocab_size: Annotated[int, Range(8, 1 << 20)] = 1024
    model_type: str = Field("bpe", pattern="^(bpe|unigram)$")
    max_sentences: Count = 1_000_000
    max_unknown_fraction: Share = 0.01
    by_words: bool = True


class AssignSection(_Section):
    """`materialize` copies each utterance's audio beside its row, as FLAC at the model's sample rate: for audio that
    can't be read by range (Parquet), and for object stores, where many small reads are slow."""

    materialize: bool = False


class OomptimizeSection(_Section):
    """The memory budget of a step: `device_memory`·`memory_fraction` bytes (measured on a GPU if unset).

    `tolerance` ends a search: (smallest that fails − largest that fits) / smallest that fails. Each probe runs
    `steps_per_probe` steps, and at least `soak_steps` mixed ones follow. With `objective: throughput` a bucket gets the
    smallest batch that is as fast per second of audio, which `time_smaller_batches` finds.
    """

    device_memory: Bytes | None = None
    memory_fraction: Annotated[float, Range(0, 1, above=True)] = 0.9
    max_batch_size: BatchSize = 4096
    tolerance: Annotated[float, Range(0, 1, below=True)] = 0.05
    objective: str = Field("memory", pattern="^(memory|throughput)$")
    time_smaller_batches: bool = True
    steps_per_probe: Annotated[int, Range(1, 10**6)] = 3
    soak_steps: Annotated[int, Range(1, 10**9)] = 200

    _sizes = field_validator("device_memory", mode="before")(parse_bytes)

    @model_validator(mode="after")
    def _throughput_needs_times(self) -> OomptimizeSection:
        if self.objective == "throughput" and not self.time_smaller_batches:
            raise ValueError("objective throughput needs time_smaller_batches")
        return self


class Distribution(_Section):
    """What `raytrain tune` draws a setting from: one of `choice` (a list), `uniform`, `log_uniform` ([low, high])."""

    choice: list[Any] | None = Field(None, min_length=1)
    uniform: tuple[End, End] | None = None
    log_uniform: tuple[End, End] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Distribution:
        given = [name for name in ("choice", "uniform", "log_uniform") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must be one of choice, uniform, log_uniform, got {', '.join(given) or 'none of them'}")
        low, high = self.ends()
        if self.choice is None and not low < high:
            raise ValueError(f"must be [low, high], got {[low, high]}")
        if self.log_uniform is not None and low <= 0:
            raise ValueError(f"log_uniform must be above 0, got {low}")
        return self

    def ends(self) -> tuple[Any, Any]:
        """Lowest and highest value, or first and last choice."""
        if self.choice is not None:
            return self.choice[0], self.choice[-1]
        return self.uniform or self.log_uniform


class TuneSection(_Section):
    """`raytrain tune`: training runs with settings drawn from `space`, by their dotted names.

    A trial has at most `max_steps` (those of training if unset). None ends before `grace_steps` (a ninth of them);
    then one in `reduction_factor` goes on, and so on at each further multiple (ASHA, arXiv 1810.05934). As many trials
    run at a time as the cluster has room for, at most `max_concurrent`.
    """

    num_trials: Annotated[int, Range(1, 10**6)] = 16
    max_steps: Steps | None = None
    grace_steps: Steps | None = None
    reduction_factor: Annotated[int, Range(2, 10**6)] = 3
    max_concurrent: Annotated[int, Range(1, 10**6)] | None = None
    space: dict[str, Distribution] = {
        "train.learning_rate": Distribution(log_uniform=(1e-4, 5e-3)),
        "train.warmup_steps": Distribution(choice=[100, 300, 1000, 2500]),
        "train.accumulate": Distribution(choice=[1, 2, 4]),
        "model.spec_augment.time_masks": Distribution(choice=[0, 2, 5, 10]),
        "model.spec_augment.freq_masks": Distribution(choice=[0, 1, 2]),
    }


class AblateSection(_Section):
    """`raytrain ablate`: the batching `schemes` to compare, each trained at every one of `learning_rates` (the run's
    own if unset) until the validation WER is `stop_at_wer`, or for `max_minutes` or `max_steps` (those of training if
    unset). `target_wer` is the one that times are compared at.

    Schemes differ where memory binds: `device_memory` and `max_batch_size` stand for those of `oomptimize`.
    """

    schemes: list[str] = Field(["R", "A", "B", "C", "D", "D+"], min_length=1)
    learning_rates: list[LearningRate] | None = Field(None, min_length=1)
    target_wer: Annotated[float, Range(0, 100, above=True)] = 0.2
    stop_at_wer: ErrorRate | None = None
    max_minutes: Minutes | None = None
    max_steps: Steps | None = None
    validate_every_steps: Steps | None = None
    device_memory: Bytes | None = None
    max_batch_size: BatchSize | None = None

    _sizes = field_validator("device_memory", mode="before")(parse_bytes)

    @field_validator("schemes")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        unknown = [one for one in value if one not in SCHEMES]
        if unknown or len(set(value)) < len(value):
            raise ValueError(f"must be different ones of {', '.join(SCHEMES)}, got {', '.join(value)}")
        return value


class EvaluateSection(_Section):
    """Decoding of the dev and test manifests; `beam_size` 1 is greedy, see `raytrain.decoding.search.DecodeSettings`.

    With `normalizer: whisper` the test's scores also have the word error rate of texts as Whisper's evaluation compares
    them, see `raytrain.evaluation.normalize`.
    Batches have at most `batch_size` utterances; those of the test manifests fewer where memory is short.
    `precision` (fp32, bf16, int8) is that of linear layers, see `raytrain.decoding.precision`.
    """

    batch_size: BatchSize = 32
    beam_size: Annotated[int, Range(1, 4096)] = 1
    length_penalty: Annotated[float, Range(0, 1000)] = 0.0
    ctc_weight: Annotated[float, Range(0, 1, below=True)] = 0.0
    num_workers: Annotated[int, Range(1, MAX_WORKERS)] = 1
    max_generation_delta: Annotated[int, Range(1, 1 << 20)] = 50
    checkpoint: str = Field("best", pattern="^(best|last)$")
    normalizer: str = Field("none", pattern="^(none|whisper)$")
    precision: str = Field("fp32", pattern="^(fp32|bf16|int8)$")


class TrackingSection(_Section):
    """MLflow. `uri` unset means $MLFLOW_TRACKING_URI if there is one, else a SQLite file in the run folder.

    User and password in `uri` move to $RAYTRAIN_TRACKING_URI, so that no copy of the settings holds them.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = "raytrain"

    @field_validator("uri")
    @classmethod
    def _credentials_apart(cls, value: str | None) -> str | None:
        if value is None or not holds_credentials(value):
            return value
        os.environ[TRACKING_VARIABLE] = value
        return without_credentials(value)


class ClusterSection(_Section):
    """Ray. `address` unset means $RAY_ADDRESS if there is one, else a local Ray with `num_cpus`. An address that begins
    with http is the Jobs server's, for `raytrain submit`.

    Work is kept on nodes of its own by what these were started with: training and probes of batch sizes by `train_…`,
    reading, counting, assigning and decoding audio by `data_…`. Labels (`{role: train}`) are selectors: `value`,
    `!value`, `in(value, value)`. Resources (`{gpu_host: 1}`, `{cpu_host: 0.01}`) are what each training worker and each
    task takes; `CPU` among `train_resources` is the CPUs of a training worker. `accelerator_type` is Ray's name of the
    kind of GPU to train on.
    """

    address: str | None = None
    num_cpus: Annotated[int, Range(1, MAX_WORKERS)] | None = None
    train_labels: dict[str, str] = {}
    data_labels: dict[str, str] = {}
    train_resources: dict[str, Amount] = {}
    data_resources: dict[str, Amount] = {}
    accelerator_type: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

    @field_validator("train_labels", "data_labels")
    @classmethod
    def _labels(cls, value: dict[str, str]) -> dict[str, str]:
        # Ray takes the space after a comma as a part of the next value.
        return {key: selector.replace(" ", "") for key, selector in _without(check_labels(value), value).items()}

    @field_validator("train_resources", "data_resources")
    @classmethod
    def _resources(cls, value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        return _without(check_resources(value, ("CPU",) if info.field_name == "train_resources" else ()), value)


def _without(problems: list[str], value: Any) -> Any:
    if problems:
        raise ValueError("; ".join(problems))
    return value


class Config(_Section):
    """One run, whole: what to read, what to make of it, and how."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1
    run: RunSection = RunSection()
    data: DataSection
    tokenizer: TokenizerSection = TokenizerSection()
    buckets: BucketSettings = BucketSettings()
    assign: AssignSection = AssignSection()
    augment: AugmentSettings = AugmentSettings()
    oomptimize: OomptimizeSection = OomptimizeSection()
    model: ModelConfig = ModelConfig()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSection = EvaluateSection()
    tune: TuneSection = TuneSection()
    ablate: AblateSection = AblateSection()
    tracking: TrackingSection = TrackingSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        problems = [
            f"{place} holds credentials, and {_WRITTEN}; {_ELSEWHERE}"
            for place, text in _texts(self.model_dump(mode="json"))
            if holds_credentials(text)
        ]
        texts = _texts(self.model_dump(mode="json"))
        problems += [f"{place} holds a NUL character, which no name can" for place, text in texts if "\0" in text]
        longest = self.model.max_positions + 1  # the decoder does not read the last token
        if self.buckets.max_tokens > longest:
            problems.append(
                f"buckets.max_tokens is {self.buckets.max_tokens}, but the model ends at {longest} tokens "
                f"(model.max_positions + 1)"
            )
        if self.evaluate.ctc_weight and (self.evaluate.beam_size == 1 or not self.train.ctc_weight):
            problems.append("evaluate.ctc_weight needs a beam_size above 1 and train.ctc_weight, which trains the head")
        start = self.train.init_from
        if start and Path(start).expanduser().absolute().is_relative_to(self.run_dir):
            problems.append(
                "train.init_from lies in this run's own folder, whose checkpoints make way for the new "
                "ones; give the run another name, or copy the model out first"
            )
        if is_uri(self.run_location):
            if self.tracking.enabled and not (self.tracking.uri or os.environ.get(MLFLOW_VARIABLE)):
                problems.append(
                    f"run.root is {self.run_location.rpartition('/')[0]}, where MLflow can't keep its "
                    f"database; set tracking.uri to a server, or tracking.enabled to false"
                )
            if self.train.storage_path:
                problems.append(
                    "train.storage_path copies checkpoints of a run on disk; those of a run at a URI are there already"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def run_dir(self) -> Path:
        """Absolute folder of this run's artefacts on this machine; for a run at a URI, in the cache."""
        return local_folder(self.run_location)

    @property
    def run_location(self) -> str:
        """Absolute path or URI of this run's artefacts, as all nodes know it."""
        root = self.run.root or os.environ.get(RUN_ROOT_VARIABLE) or "runs"
        return f"{root.rstrip('/')}/{self.name}" if is_uri(root) else absolute(f"{root}/{self.name}")

    def section(self, *names: str) -> dict[str, Any]:
        """Named sections as plain JSON values, for keys and records."""
        return self.model_dump(mode="json", include=set(names))


def load_config(path: Path | None, overrides: list[str] | None = None, base: dict | None = None) -> Config:
    """Read YAML, apply overrides, check all. Raises `ConfigError` that lists every problem at once."""
    values = dict(base or {})
    if path is not None:
        try:
            values = read_yaml(path)
        except OSError as error:
            raise ConfigError(
                f"can't read the configuration {path}",
                why=(error.strerror or str(error)).lower(),
                remedy="check the path after --config",
            ) from error
        except ValueError as error:
            raise ConfigError(f"{path} is not valid YAML", why=str(error), remedy="correct the file") from error
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path} must hold sections",
                got=type(values).__name__,
                allowed="a mapping",
                remedy="begin the file with name: and data:",
            )
    for override in overrides or []:
        values = _override(values, override)
    return check_config(values, source=str(path) if path else "configuration")


def check_config(values: dict, source: str = "configuration") -> Config:
    """Validate plain values into a `Config`; every problem in one `ConfigError`."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = [_describe(item) for item in error.errors()[:_MOST_PROBLEMS]]
        number = error.error_count()
    listing = "\n  ".join(sorted(map(redacted, problems)))
    if number > len(problems):
        listing += f"\n  … and {number - len(problems)} more"
    raise ConfigError(f"{source} has {number} problem(s)", remedy=f"mend these settings:\n  {listing}")


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """All texts of nested settings, each with its dotted name."""
    if isinstance(value, str):
        yield place, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, one in items:
        yield from _texts(one, f"{place}.{key}" if place else str(key))


def _override(values: dict, text: str) -> dict:
    key, equals, raw = text.partition("=")
    *parents, last = key.split(".")
    if not equals or not all(part and part == part.strip() for part in (*parents, last)):
        raise ConfigError(
            "an override must look like section.key=value",
            got=_shown(text),
            remedy="name the section and the key, as in --set train.max_steps=100",
        )
    values = dict(values)
    node = values
    for part in parents:
        child = node.get(part)
        if child is not None and not isinstance(child, dict):
            kind = "a list, which is set as a whole" if isinstance(child, list) else "a value, not a section"
            raise ConfigError(f"{key} can't be set", why=f"{part} is {kind}", remedy=f"set {part}, or edit the file")
        node[part] = dict(child or {})
        node = node[part]
    try:
        node[last] = load_yaml(raw)
    except ValueError as error:
        raise ConfigError(
            f"{key} can't be set",
            got=_shown(raw),
            why=str(error),
            remedy="write the value as in YAML; quote what is text",
        ) from error
    return values


def _shown(value: Any) -> str:
    """A value for a message, long ones cut."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _describe(item: Any) -> str:
    where = [str(part) for part in item["loc"]]
    dotted = ".".join(where)
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(where[:-1])
        close = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(known)}"
        return f"{dotted}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{dotted}: missing"
    message = item["msg"].removeprefix("Value error, ")
    given = item.get("input")
    if item["type"] == "literal_error":
        choices = item["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        message = f"must be one of {choices}, got {_shown(given)}"
    if item["type"] == "string_type" and isinstance(given, bool | int | float | datetime.date):
        message += f"; {_NOT_TEXT}"
    shown = "" if isinstance(given, dict) or "got" in message else f"; got {_shown(given)}"
    return f"{dotted}: {message[0].lower() + message[1:]}{shown}"


def _known_keys(path: list[str]) -> list[str]:
    kind: Any = Config
    for part in path:
        if part.isdigit():  # an entry of a list
            kind = next(iter(typing.get_args(kind)), None)
            continue
        fields = _fields(kind)
        if part not in fields:
            return []
        kind = fields[part]
    return sorted(_fields(kind))


def _fields(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {}
