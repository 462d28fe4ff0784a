"""Training batches of a run: how often corpora are repeated, the schedule, and the reader of its steps' audio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raytrain.data.assignment import Assignment
from raytrain.data.augment import Augmenter
from raytrain.data.loader import BatchLoader, StepReader
from raytrain.data.probe import AudioListing
from raytrain.data.quarantine import Quarantine
from raytrain.data.sequences import BlockEncoder
from raytrain.data.threads import available_cpus, loader_threads
from raytrain.data.work import StepWork, scheduled_work
from raytrain.errors import ArtifactError, ConfigError
from raytrain.lengths.mixture import Mixture, repeats_of, sampling_shares
from raytrain.lengths.schedule import BatchSchedule
from raytrain.run_folder.chunks import chunks_of, numbered_chunks
from raytrain.run_folder.documents import CorpusStatistics
from raytrain.run_folder.workspace import Workspace

if TYPE_CHECKING:
    from raytrain.data.stream import StreamSampler


def corpus_repeats(workspace: Workspace, corpora: Sequence[str]) -> tuple[float, ...]:
    """How often an epoch repeats each corpus: once, or according to weights and temperature.

    Raises `ConfigError` if the temperature applies to languages and a corpus has several.
    """
    data = workspace.config.data
    configured = {corpus.name: corpus.weight for corpus in data.train}
    weights = [configured[name] for name in corpora]
    if data.temperature == 1 and len(set(weights)) <= 1:
        return (1.0,) * len(weights)
    statistics = _statistics_of(workspace, corpora)
    languages = None
    if data.temperature_by == "language":
        _check_single_languages(statistics)
        languages = ["".join(corpus.languages) for corpus in statistics.values()]
    hours = [statistics[name].hours for name in corpora]
    return repeats_of(hours, sampling_shares(hours, weights, data.temperature, languages))


def _statistics_of(workspace: Workspace, corpora: Sequence[str]) -> dict[str, CorpusStatistics]:
    counted = workspace.statistics().by_corpus
    if missing := [name for name in corpora if name not in counted]:
        raise ArtifactError(
            f"statistics.json has no corpus {missing[0]}",
            got=", ".join(sorted(counted)),
            remedy="run statistics again",
        )
    return {name: counted[name] for name in corpora}


def _check_single_languages(corpora: dict[str, CorpusStatistics]) -> None:
    mixed = [name for name, corpus in corpora.items() if len(corpus.languages) > 1]
    if mixed:
        raise ConfigError(
            f"data.temperature_by: language needs corpora of one language; {', '.join(mixed)} has several",
            got=", ".join(corpora[mixed[0]].languages),
            remedy="list each language's manifest as a corpus of its own, or use temperature_by: corpus",
        )


def make_mixture(workspace: Workspace, assignment: Assignment) -> Mixture:
    """The corpora as an epoch mixes them. Raises what `corpus_repeats` raises."""
    return Mixture(assignment.rows_by_corpus, corpus_repeats(workspace, assignment.corpora))


def make_schedule(workspace: Workspace, assignment: Assignment, batch_sizes: tuple[int, ...]) -> BatchSchedule:
    """The run's schedule for a profile's batch sizes."""
    config = workspace.config
    return BatchSchedule(config.seed, make_mixture(workspace, assignment), batch_sizes, config.train.max_epochs)


def make_step_reader(
    workspace: Workspace, assignment: Assignment | None, quarantine: Quarantine, num_threads: int
) -> StepReader:
    """The reader of steps' audio, with the run's augmentation."""
    augment, sample_rate = workspace.config.augment, workspace.config.model.sample_rate
    return StepReader(
        [(bucket.max_duration_ms, bucket.max_tokens) for bucket in workspace.plan.grid.buckets],
        sample_rate=sample_rate,
        pad_id=workspace.tokenizer.pad_id,
        quarantine=quarantine,
        assignment=assignment,
        augmenter=Augmenter(augment, sample_rate) if augment.is_on else None,
        num_threads=num_threads,
    )


def make_loader(
    workspace: Workspace,
    batch_sizes: tuple[int, ...],
    state: Mapping[str, Any] | None,
    shares: Sequence[int],
    num_shares: int,
    pin_memory: bool = False,
    work: Iterator[StepWork] | None = None,
    local_workers: int = 1,
) -> BatchLoader:
    """Batches of a worker's `shares` of each step, starting at `state` (from the beginning if None), or those of
    `work`, read by threads. The node has `local_workers` training workers."""
    assignment = None
    if work is None:
        assignment = workspace.assignment()
        schedule = make_schedule(workspace, assignment, batch_sizes)
        start = schedule.restored(state) if state else schedule.initial()
        work = scheduled_work(assignment, schedule, start, shares, num_shares)
    train = workspace.config.train
    num_threads = loader_threads(train.num_loader_threads, available_cpus(), local_workers)
    return BatchLoader(
        work,
        make_step_reader(workspace, assignment, workspace.quarantine, num_threads),
        prefetch_batches=train.prefetch_batches,
        pin_memory=pin_memory,
    )


def make_stream(workspace: Workspace, batch_sizes: tuple[int, ...], num_shares: int) -> StreamSampler:
    """The sampler of steps for all workers if training reads the corpora without assignment."""
    from raytrain.data.stream import StreamSampler

    config, settings = workspace.config, workspace.config.data.stream
    assert settings is not None
    names = tuple(corpus.name for corpus in config.data.train)
    return StreamSampler(
        numbered_chunks(workspace, chunks_of(config, "train")),
        BlockEncoder(workspace.tokenizer, config.model.prompt_format, by_words=config.tokenizer.by_words),
        workspace.plan,
        batch_sizes,
        num_shares,
        config.seed,
        repeats=dict(zip(names, corpus_repeats(workspace, names), strict=True)),
        buffer_size=settings.buffer_size,
        concurrent=settings.concurrent,
        num_epochs=config.train.max_epochs,
        listing=AudioListing(config.data.audio_sample > 0),
    )
