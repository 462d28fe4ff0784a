"""The run folder seen as objects: reads artefacts, builds the tokenizer, plan, profile, model and loader.

Everything here can be rebuilt on any node, from the configuration and the run folder's path or URI.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.cluster.counting import chunks_of
from raytrain.config import Config
from raytrain.data.assignment import INDEX_FORMAT, Assignment, IndexBody, Row, row_table, rows_of
from raytrain.data.audio import AudioError
from raytrain.data.augment import Augmenter
from raytrain.data.corpora.rejected import RejectedRows
from raytrain.data.corpora.types import Chunk, read_blocks
from raytrain.data.loader import (
    BatchLoader,
    Quarantine,
    StepReader,
    StepWork,
    available_cpus,
    loader_threads,
    read_rows,
    scheduled_work,
)
from raytrain.data.materialize import AudioFinder
from raytrain.data.probe import AudioListing
from raytrain.data.text.prompt import prompt_languages
from raytrain.data.text.sentences import places_of_each
from raytrain.data.text.sequences import BlockEncoder
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.decoding.search import DecodeSettings
from raytrain.errors import ArtifactError, ConfigError, ManifestError
from raytrain.lengths.mixture import Mixture, repeats_of, sampling_shares
from raytrain.lengths.plan import BucketPlan, BucketPlanBody
from raytrain.lengths.profile import BatchProfile
from raytrain.lengths.schedule import BatchSchedule
from raytrain.model.config import ModelConfig
from raytrain.storage.artifacts import atomic_write_bytes, content_id, make_folder, read_json
from raytrain.storage.filesystem import is_uri
from raytrain.storage.run_store import RunStore
from raytrain.training.mirror import checkpoints_of

if TYPE_CHECKING:
    from raytrain.data.stream import StreamSampler
    from raytrain.training.checkpoint import CheckpointFolder
    from raytrain.training.faults import FaultNotes

PLAN_FORMAT = "raytrain.bucket_plan/1"
PROFILE_FORMAT = "raytrain.batch_profile/2"
STATISTICS_FORMAT = "raytrain.statistics/4"
CHUNKS_FORMAT = "raytrain.chunks/2"
SCORES_FORMAT = "raytrain.scores/2"


@dataclass(frozen=True)
class CorpusStatistics:
    """What `statistics.json` says of a corpus, as far as it is read again."""

    hours: float
    languages: list[str]


@dataclass(frozen=True)
class StatisticsBody:
    """What `statistics.json` holds, as far as it is read again."""

    rows: int
    histogram_id: str
    by_corpus: dict[str, CorpusStatistics]


@dataclass(frozen=True)
class PlanBody:
    """What `bucket_plan.json` holds."""

    plan: BucketPlanBody


@dataclass(frozen=True)
class ProfileBody:
    """What `batch_profile.json` holds."""

    profiles: list[BatchProfile]

    def __post_init__(self) -> None:
        if not self.profiles:
            raise ValueError("it holds no profile")


_KINDS = {
    PLAN_FORMAT: PlanBody,
    PROFILE_FORMAT: ProfileBody,
    STATISTICS_FORMAT: StatisticsBody,
    CHUNKS_FORMAT: list[Chunk],
    INDEX_FORMAT: IndexBody,
}


class Workspace:
    """Artefacts of one run by name; each is read once, when first asked for."""

    def __init__(self, config: Config, location: Path | str) -> None:
        if is_uri(config.run_location) and Path(location) == config.run_dir:
            location = config.run_location
        self.config, self.store = config, RunStore(location, config.run.cache_size)
        self.run_dir = self.store.local
        self.left_out: dict[str, RejectedRows] = {}

    def path(self, *parts: str) -> Path:
        """A path below the run folder, or below what this machine has of it."""
        return self.run_dir.joinpath(*parts)

    def _read(self, name: str, format: str) -> dict[str, Any]:
        self.store.bring(name)
        return read_json(self.path(name), format, _KINDS.get(format))

    @cached_property
    def tokenizer(self) -> CanaryTokenizer:
        """The run's tokenizer."""
        self.store.bring_folder("tokenizer")
        return CanaryTokenizer.load(self.path("tokenizer"))

    def assignment(self) -> Assignment:
        """The assigned rows. Raises `ArtifactError` where assign has not run."""
        self.store.bring("assignment/index.json")
        return Assignment(self.path("assignment"), self.store)

    @cached_property
    def assigned_rows_id(self) -> str:
        """The content id of all assigned rows. Raises `ArtifactError` where assign has not run."""
        return self._read("assignment/index.json", INDEX_FORMAT)["body"]["rows_id"]

    @cached_property
    def _plan_document(self) -> dict[str, Any]:
        return self._read("bucket_plan.json", PLAN_FORMAT)

    @property
    def plan(self) -> BucketPlan:
        """The bucket plan."""
        return BucketPlan.from_body(self._plan_document["body"]["plan"])

    @property
    def plan_id(self) -> str:
        """The bucket plan's content id."""
        return self._plan_document["id"]

    def numbered(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks with the `first_line` that statistics counted; as they are if those were cut otherwise."""
        names = [part.name for part in fields(Chunk)]
        body = self._read("chunks.json", CHUNKS_FORMAT)["body"]
        known = [Chunk(**{name: one[name] for name in names if name in one}) for one in body]
        places = [[replace(chunk, first_line=0) for chunk in some] for some in (known, chunks)]
        return known if places[0] == places[1] else chunks

    def model_config(self) -> ModelConfig:
        """The configured model with the tokenizer's vocabulary, and a CTC head if training uses one."""
        return replace(
            self.config.model,
            vocab_size=self.tokenizer.vocab_size,
            ctc_head=self.config.train.ctc_weight > 0,
        )

    def model_id(self) -> str:
        """Names the model's shape: what a batch profile depends on. What is masked takes no memory."""
        values = asdict(self.model_config())
        return content_id({name: value for name, value in values.items() if name != "spec_augment"})

    def profiles(self) -> list[BatchProfile]:
        """The batch profiles, one for each kind of device. Raises `ProfileError` where they were made for another plan
        or model."""
        body = self._read("batch_profile.json", PROFILE_FORMAT)["body"]
        profiles = [BatchProfile.from_body(one) for one in body["profiles"]]
        for profile in profiles:
            profile.check_matches(plan_id=self.plan_id, model_id=self.model_id())
        return profiles

    def checkpoints(self, mirror: Any = None) -> CheckpointFolder:
        """The run's checkpoints; `mirror` keeps copies of those in a folder on disk."""
        train = self.config.train
        return checkpoints_of(self.store, train.keep_checkpoints, train.keep_best, mirror)

    @cached_property
    def quarantine(self) -> Quarantine:
        """Where this process names broken recordings."""
        if not self.store.is_remote:
            return Quarantine(self.path("quarantine.jsonl"))
        return Quarantine(make_folder(self.path("quarantine")) / f"{socket.gethostname()}-{os.getpid()}.jsonl")

    def share_quarantine(self) -> None:
        """Let others see what this process named."""
        for path in self.path("quarantine").glob(f"*-{os.getpid()}.jsonl") if self.store.is_remote else ():
            self.store.share(f"quarantine/{path.name}")

    def gather_quarantine(self) -> None:
        """Put what all processes named into `quarantine.jsonl`."""
        if self.store.is_remote:
            self.store.look_at_all("quarantine", "*.jsonl")
            named = [path.read_bytes().splitlines() for path in self.path("quarantine").glob("*.jsonl")]
            lines = {line for some in named for line in some}
            if lines:
                atomic_write_bytes(self.path("quarantine.jsonl"), b"".join(line + b"\n" for line in sorted(lines)))

    def mixture(self, assignment: Assignment) -> Mixture:
        """How often an epoch goes through each corpus: once, or as weights and temperature say. Raises as `repeats`."""
        return Mixture(assignment.rows_by_corpus, self.repeats(assignment.corpora))

    def repeats(self, corpora: tuple[str, ...]) -> tuple[float, ...]:
        """How often an epoch goes through each corpus.

        Raises `ConfigError` where the temperature is between languages and a corpus has several.
        """
        data = self.config.data
        weights = {corpus.name: corpus.weight for corpus in data.train}
        found = [weights[name] for name in corpora]
        if data.temperature == 1 and len(set(found)) <= 1:
            return (1.0,) * len(found)
        by_corpus = self._read("statistics.json", STATISTICS_FORMAT)["body"]["by_corpus"]
        if unknown := [name for name in corpora if name not in by_corpus]:
            raise ArtifactError(
                f"statistics.json does not know the corpus {unknown[0]}",
                got=", ".join(sorted(by_corpus)),
                remedy="run statistics again",
            )
        languages = None
        if data.temperature_by == "language":
            mixed = [name for name in corpora if len(by_corpus[name]["languages"]) > 1]
            if mixed:
                raise ConfigError(
                    f"data.temperature_by: language needs corpora of one language; {', '.join(mixed)} has several",
                    got=", ".join(by_corpus[mixed[0]]["languages"]),
                    remedy="list each language's manifest as a corpus of its own, or use temperature_by: corpus",
                )
            languages = ["".join(by_corpus[name]["languages"]) for name in corpora]
        hours = [by_corpus[name]["hours"] for name in corpora]
        return repeats_of(hours, sampling_shares(hours, found, data.temperature, languages))

    def schedule(self, assignment: Assignment, batch_sizes: tuple[int, ...]) -> BatchSchedule:
        """The run's schedule for batch sizes of a profile."""
        return BatchSchedule(self.config.seed, self.mixture(assignment), batch_sizes, self.config.train.max_epochs)

    def step_reader(self, assignment: Assignment | None, quarantine: Quarantine, num_threads: int) -> StepReader:
        """What reads the audio of steps, with the run's augmentation."""
        augment, sample_rate = self.config.augment, self.config.model.sample_rate
        buckets = self.plan.grid.buckets
        return StepReader(
            [(bucket.max_duration_ms, bucket.max_tokens) for bucket in buckets],
            sample_rate=sample_rate,
            pad_id=self.tokenizer.pad_id,
            quarantine=quarantine,
            assignment=assignment,
            augmenter=Augmenter(augment, sample_rate) if augment.is_on else None,
            num_threads=num_threads,
        )

    def loader(
        self,
        batch_sizes: tuple[int, ...],
        state: dict[str, Any] | None,
        shares: Sequence[int],
        num_shares: int,
        pin_memory: bool = False,
        work: Iterator[StepWork] | None = None,
        local_workers: int = 1,
    ) -> BatchLoader:
        """Batches of a worker's `shares` of each step from `state` on (from the start without one), or those of `work`,
        read by threads. The node has `local_workers` training workers."""
        assignment = None
        if work is None:
            assignment = self.assignment()
            schedule = self.schedule(assignment, batch_sizes)
            start = schedule.restored(state) if state else schedule.initial()
            work = scheduled_work(assignment, schedule, start, shares, num_shares)
        train = self.config.train
        num_threads = loader_threads(train.num_loader_threads, available_cpus(), local_workers)
        return BatchLoader(
            work,
            self.step_reader(assignment, self.quarantine, num_threads),
            prefetch_batches=train.prefetch_batches,
            pin_memory=pin_memory,
        )

    def stream(self, batch_sizes: tuple[int, ...], num_shares: int) -> StreamSampler:
        """The sampler of steps for all workers where training reads the corpora without assignment."""
        from raytrain.data.stream import StreamSampler

        config, settings = self.config, self.config.data.stream
        names = tuple(corpus.name for corpus in config.data.train)
        return StreamSampler(
            self.numbered(chunks_of(config, "train")),
            BlockEncoder(self.tokenizer, config.model.prompt_format, by_words=config.tokenizer.by_words),
            self.plan,
            batch_sizes,
            num_shares,
            config.seed,
            repeats=dict(zip(names, self.repeats(names), strict=True)),
            buffer_size=settings.buffer_size,
            concurrent=settings.concurrent,
            num_epochs=config.train.max_epochs,
            listing=AudioListing(config.data.audio_sample > 0),
        )

    def rows(self, split: str, limit: int | None = None) -> list[Row]:
        """Encoded rows of a small split (dev), at most `limit`, as many of each corpus as of the others where it has
        them; `left_out` then has its bad rows."""
        by_corpus: dict[str, list[Row]] = {}
        left_out = self.left_out[split] = RejectedRows()
        encoder = BlockEncoder(self.tokenizer, self.config.model.prompt_format, by_words=self.config.tokenizer.by_words)
        # What the decoder has no position for stays out of the validation loss, not of the WER.
        longest = self.config.model.max_positions + 1
        for chunk in chunks_of(self.config, split):
            rows, finder = by_corpus.setdefault(chunk.corpus, []), AudioFinder(chunk)
            for block in () if limit is not None and len(rows) >= limit else read_blocks(chunk):
                block = encoder.check(block)
                left_out.num_rows += len(block) + len(block.bad)
                for row in block.bad:
                    left_out.add(chunk.corpus, row)
                table, problems = row_table(block, encoder.encode(block), finder)
                for row, member, problem in zip(rows_of(table), block.paths, problems, strict=True):
                    # Without a place in the tar the reader would take all of it for the recording.
                    path = row.audio_path if problem is None else f"{row.audio_path}/{member}"
                    rows.append(row._replace(audio_path=path, tokens=row.tokens[:longest]))
                if limit is not None and len(rows) >= limit:
                    break
        if limit is None:
            places = None
        else:
            places = places_of_each(Counter({name: len(rows) for name, rows in by_corpus.items()}), limit)
        return [row for rows in by_corpus.values() for row in rows[:places]]

    def checked_rows(self, split: str, limit: int | None = None) -> list[Row]:
        """`rows` of a split that something is to be scored on.

        Raises `ManifestError` where it or one of its corpora has no usable row, or where it has more bad ones than
        `data.max_bad_fraction`.
        """
        rows, data = self.rows(split, limit), self.config.data
        left_out, corpora = self.left_out[split], data.corpora(split)
        left_out.check(f"data.{split}", corpora, len(rows), data.max_bad_fraction)
        used = {row.corpus for row in rows}
        unused = [corpus for corpus in corpora if corpus.name not in used]
        if unused:
            raise ManifestError(
                f"corpus {unused[0].name} of data.{split} has no usable row",
                got=", ".join(unused[0].paths),
                why="a score of the other corpora would not be that of all",
                remedy=f"check the file, or leave the corpus out of data.{split}"
                + "".join(f"\n  {line}" for line in left_out.lines() if line.startswith(f"corpus {unused[0].name}: ")),
            )
        return rows

    def is_translation(self, row: Row) -> bool:
        """Whether a row's text is in another language than its speech, as its prompt says."""
        source, target = prompt_languages(
            self.tokenizer, row.tokens[: row.prompt_length], self.config.model.prompt_format
        )
        return source != target

    def search(self) -> DecodeSettings:
        """How `evaluate` and validation decode."""
        evaluate = self.config.evaluate
        return DecodeSettings(
            evaluate.beam_size,
            evaluate.length_penalty,
            max_generation_delta=evaluate.max_generation_delta,
            ctc_weight=evaluate.ctc_weight,
        )

    def validator(
        self,
        rank: int,
        world_size: int,
        notes: FaultNotes | None = None,
        on_batch: Callable[[str], None] = lambda doing: None,
        mark: Callable[[None, int, int], None] = lambda step, phase, size: None,
    ) -> Any:
        """Validation on the dev manifests, or None where there are none.

        `on_batch` is told of each batch, and `mark` of its size (see `FaultNotes.marking`). Batches that do not fit are
        halved, which `notes` keep for the next time.
        """
        from raytrain.training.faults import VALIDATION
        from raytrain.training.validation import Validator

        if not self.config.data.dev:
            return None
        # Longest first and dealt out in turn, so that every rank gets about the same work.
        rows = sorted(self.rows("dev", self.config.train.max_validation_utterances), key=lambda row: -row.duration_ms)[
            rank::world_size
        ]
        sample_rate, most = self.config.model.sample_rate, self.config.evaluate.batch_size

        def batches(on_error: Callable[[Row, Exception], object]) -> Any:
            def note(row: Row, error: AudioError) -> None:
                self.quarantine.add(row, error)
                on_error(row, error)

            size = notes.validation_size(most) if notes is not None else most
            for kept, batch in read_rows(rows, sample_rate, self.tokenizer.pad_id, size, note):
                on_batch("validating")
                mark(None, VALIDATION, len(kept))
                yield kept, batch

        return Validator(
            batches=batches,
            is_translation=self.is_translation,
            decode=self.tokenizer.decode,
            eos_id=self.tokenizer.eos_id,
            search=self.search(),
            normalize=self.tokenizer.normalize,
            max_bad_fraction=self.config.data.max_bad_fraction,
            on_out_of_memory=notes.lower_validation if notes is not None else lambda size: None,
        )
