"""What each stage depends on and does: read artefacts, call the part that knows how, write the artefact."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from raytrain.cluster.gpus import device_names
from raytrain.cluster.placement import Placement
from raytrain.cluster.session import ray_session
from raytrain.config import Config
from raytrain.console import Console
from raytrain.data.assignment import INDEX_FORMAT, IndexBody, note_name, write_index
from raytrain.data.corpora.rejected import RejectedRows
from raytrain.data.corpora.rows import REASONS as ROW_REASONS
from raytrain.data.corpora.types import BadRow
from raytrain.data.probe import MISSING, SHORT, came_back
from raytrain.data.text.tokenizer import FORMAT as TOKENIZER_FORMAT
from raytrain.errors import ArtifactError, ConfigError, DataError, TrainingError
from raytrain.evaluation.error_counts import are_enough_readable
from raytrain.lengths.compare import PolicyRow, compare_policies
from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.plan import BucketPlan
from raytrain.lengths.profile import BatchProfile
from raytrain.lengths.simulate import Simulation, simulate
from raytrain.model.cost import cost_of
from raytrain.run_folder.workspace import (
    CHUNKS_FORMAT,
    PLAN_FORMAT,
    PROFILE_FORMAT,
    SCORES_FORMAT,
    STATISTICS_FORMAT,
    StatisticsBody,
    Workspace,
)
from raytrain.storage.artifacts import (
    atomic_write,
    atomic_write_bytes,
    canonical_json,
    content_id,
    file_id,
    lines_of,
    make_folder,
    read_json,
    read_state,
    write_json,
)
from raytrain.storage.filesystem import fingerprints, is_uri
from raytrain.tracking.runs import RunTracking
from raytrain.training.conversion import model_stamp
from raytrain.training.data_wait import DataPath, DataWaitMonitor
from raytrain.training.memory.coordinator import ProbeOutcome
from raytrain.training.memory.meter import Probe
from raytrain.training.memory.tracer import TRACER_VERSION

# Settings of training that say when to stop, look and save, but not what is learnt: a run goes on when they change.
_NOT_LINEAGE = (
    "max_steps",
    "max_epochs",
    "max_minutes",
    "stop_at_wer",
    "validate_every_steps",
    "max_validation_utterances",
    "checkpoint_every_steps",
    "storage_path",
    "keep_checkpoints",
    "keep_best",
    "patience",
    "max_skipped_steps",
    "accumulate",
    "log_every_steps",
    "num_loader_threads",
    "prefetch_batches",
    "max_failures",
    "stall_minutes",
    "num_workers",
    "device",
    "activation_checkpointing",
    "shard",
    "init_from",  # its content counts, wherever it lies
)


_HASHED_BYTES = 64 << 20
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Context:
    """What a stage works with; `key` is the hash of all that it depends on."""

    workspace: Workspace
    console: Console
    tracking: RunTracking
    key: str

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.workspace.config

    def path(self, *parts: str) -> Path:
        """A path below the run folder."""
        return self.workspace.path(*parts)


def _reading(config: Config, split: str) -> dict[str, Any]:
    """What a split's rows depend on. The folder counts: rows hold absolute audio paths."""
    from raytrain.cluster.counting import chunks_of

    corpora = [asdict(replace(corpus, weight=1.0)) for corpus in config.data.corpora(split)]  # weights change no row
    chunks = chunks_of(config, split)
    manifests = sorted({chunk.path for chunk in chunks})
    sources = sorted({chunk.audio for chunk in chunks} - {"", *manifests})
    stamps = [*zip(manifests, fingerprints(manifests), strict=True), *zip(sources, fingerprints(sources), strict=True)]
    # A small manifest counts as changed when its content does, all else when its size or time of change does.
    small = {
        name for name, stamp in stamps[: len(manifests)] if stamp and not is_uri(name) and stamp[0] <= _HASHED_BYTES
    }
    return {
        "corpora": corpora,
        "files": [[name, file_id(Path(name)) if name in small else stamp] for name, stamp in stamps],
    }


# --- statistics


def statistics_key(workspace: Workspace) -> Any:
    config = workspace.config
    return [
        [STATISTICS_FORMAT, CHUNKS_FORMAT, TOKENIZER_FORMAT],
        _reading(config, "train"),
        config.data.max_bad_fraction,
        config.data.audio_sample,
        config.section("tokenizer"),
        model_stamp(Path(config.tokenizer.path)) if config.tokenizer.path else None,
        config.model.prompt_format,
    ]


def statistics_are_whole(workspace: Workspace) -> bool:
    """Whether audio that was not there is still missing."""
    return not came_back(_statistics(workspace)["body"]["rejected_examples"])


def run_statistics(context: Context) -> str:
    from raytrain.cluster import counting as job

    config = context.config
    chunks = job.chunks_of(config, "train")
    with context.console.progress("sampling texts", len(chunks)) as update:
        tokenizer = job.make_tokenizer(config, context.path("tokenizer"), chunks, lambda number: update(advance=number))
    total = job.Counts()
    with context.console.progress("counting", len(chunks)) as update:
        for number, partial in job.count_all(chunks, tokenizer, config):
            total.add(partial)
            update(advance=number)
    numbered = job.number_lines(total, chunks)
    job.check_bad_rows(total, config, sum(histogram.total().total for histogram in total.groups.values()))
    job.check_unknown(job.unknown_pieces(total), config.tokenizer)
    write_histogram(context.path("histogram.parquet"), total.histogram)
    body = {**job.statistics_body(total, config), "histogram_id": file_id(context.path("histogram.parquet"))}
    write_json(context.path("statistics.json"), STATISTICS_FORMAT, body, {"tokenizer": tokenizer.id})
    write_json(context.path("chunks.json"), CHUNKS_FORMAT, [asdict(chunk) for chunk in numbered])
    context.tracking.current.log_metrics(
        {"hours": body["hours"], "utterances": body["utterances"], "tokens": body["tokens"]}, 0, 0.0
    )
    context.tracking.current.log_artifact(context.path("statistics.json"))
    _show_rejected(context, body["rejected_examples"])
    _warn_of_unused(context, {name for name, corpus in body["by_corpus"].items() if not corpus["utterances"]})
    if body["unknown"]:
        listing = "".join(f"\n  {job.unknown_line(group)}" for group in body["unknown"])
        context.console.warn(f"the tokenizer can't write all characters of the texts, nor will a model:{listing}")
    _warn_of_audio(context, body)
    probed = sum(corpus["probed"] for corpus in body["audio"].values())
    checked = f", {probed} recordings checked" if probed else ""
    return f"{body['utterances']} utterances, {body['hours']:.2f} h{checked}, vocabulary {tokenizer.vocab_size}"


def _warn_of_unused(context: Context, names: set[str]) -> None:
    """Corpora that nothing is learnt from, which their weights and the report do not tell."""
    for corpus in context.config.data.corpora("train"):
        if corpus.name in names:
            files = ", ".join(corpus.paths[:_NUM_EXAMPLES])
            context.console.warn(f"corpus {corpus.name} has no row that training can use: {files}")


def _warn_of_audio(context: Context, body: dict[str, Any]) -> None:
    """What the headers of the sample said against the manifests."""
    for example in body["audio_examples"]:
        corpus, first = example["corpus"], example["first"][0]
        what = "are shorter than their rows say" if example["reason"] == SHORT else "can't be read"
        context.console.warn(
            f"{example['rows']} of the {body['audio'][corpus]['probed']} recordings of {corpus} that were looked at "
            f"{what}: {first['file']}:{first['line']}: {first['detail']}"
        )


def _show_rejected(context: Context, rejected: list[dict[str, Any]]) -> None:
    """A table by corpus and reason, as statistics and assign record it."""
    if rejected:
        context.console.note(
            ("corpus", "rejected because", "rows", "first"),
            [
                (one["corpus"], one["reason"], str(one["rows"]), "{file}:{line}: {detail}".format(**one["first"][0]))
                for one in rejected
            ],
        )


def write_histogram(path: Path, histogram: LengthHistogram) -> None:
    """One row per cell: `duration_ms`, `tokens`, `count`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"duration_ms": histogram.cells, "tokens": histogram.tokens, "count": histogram.counts})
    table = table.replace_schema_metadata({"real_duration_ms": str(histogram.real_duration_ms)})
    with atomic_write(path) as file:
        pq.write_table(table, file)


def read_histogram(path: Path) -> LengthHistogram:
    """The inverse of `write_histogram`. Raises `ArtifactError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["duration_ms", "tokens", "count"])
        columns = [column.cast(pa.int64()).to_numpy() for column in table.itercolumns()]
        if any(column.dtype.kind != "i" or (len(column) and column.min() < 0) for column in columns):
            raise ValueError("it has lengths or counts below 0, or none")
        return LengthHistogram.from_arrays(*columns, int((table.schema.metadata or {})[b"real_duration_ms"]))
    except (OSError, pa.ArrowException, DataError, KeyError, OverflowError, ValueError) as error:
        raise ArtifactError(
            f"{path} can't be read", why=" ".join(str(error).split()), remedy="delete it and rerun statistics"
        ) from error


# --- buckets


def _statistics(workspace: Workspace) -> dict[str, Any]:
    return read_json(workspace.path("statistics.json"), STATISTICS_FORMAT, StatisticsBody)


def buckets_key(workspace: Workspace) -> Any:
    config = workspace.config
    cost = asdict(cost_of(workspace.model_config())) if config.buckets.policy == "optimal" else None
    return [PLAN_FORMAT, config.section("buckets", "seed"), _statistics(workspace)["body"]["histogram_id"], cost]


def run_buckets(context: Context) -> str:
    from raytrain.lengths import make_plan, padding_by_scheme

    histogram = read_histogram(context.path("histogram.parquet"))
    histogram_id = _statistics(context.workspace)["body"]["histogram_id"]
    cost = cost_of(context.workspace.model_config())
    plan = make_plan(histogram, context.config.buckets, histogram_id, cost)
    rows = padding_by_scheme(histogram, plan, seed=context.config.seed)
    body = {"plan": plan.to_body(), "padding_by_scheme": [asdict(row) for row in rows]}
    write_json(context.path("bucket_plan.json"), PLAN_FORMAT, body, {"histogram": histogram_id})
    for row in rows:
        name = row.scheme.replace(" ", "_")
        metrics = {f"audio_padding.{name}": row.audio_padding, f"token_padding.{name}": row.token_padding}
        context.tracking.current.log_metrics(metrics, 0, 0.0)
    context.tracking.current.log_artifact(context.path("bucket_plan.json"))
    first, last = rows[0], rows[-1]
    return (
        f"{len(plan.grid.buckets)} buckets; audio padding {first.audio_padding:.1%} → {last.audio_padding:.1%}, "
        f"token padding {first.token_padding:.1%} → {last.token_padding:.1%}"
    )


def compare_plans(config: Config) -> list[PolicyRow]:
    """Policies side by side on the run's histogram. Raises `ArtifactError` where statistics have not run."""
    workspace = Workspace(config, config.run_dir)
    workspace.store.bring("histogram.parquet")
    if not workspace.path("histogram.parquet").exists():
        raise ArtifactError(f"{workspace.path('histogram.parquet')} is missing", remedy="run raytrain statistics first")
    histogram = read_histogram(workspace.path("histogram.parquet"))
    return compare_policies(histogram, config.buckets, cost_of(workspace.model_config()))


# --- assign


def assign_key(workspace: Workspace) -> Any:
    config = workspace.config
    copies = config.model.sample_rate if config.assign.materialize else None
    identities = [workspace.plan_id, workspace.tokenizer.id, config.model.prompt_format]
    return [INDEX_FORMAT, _reading(config, "train"), *identities, copies, config.data.audio_sample > 0]


def run_assign(context: Context) -> str:
    from raytrain.cluster import assigning as job
    from raytrain.cluster.counting import chunks_of

    workspace, config = context.workspace, context.config
    chunks = workspace.numbered(chunks_of(config, "train"))
    folder = context.path(job.FOLDER)
    settings = job.AssignSettings(
        prompt_format=config.model.prompt_format,
        by_words=config.tokenizer.by_words,
        sample_rate=config.model.sample_rate if config.assign.materialize else None,
        cache_size=config.run.cache_size,
        check_audio=config.data.audio_sample > 0,
    )
    key = content_id([context.key, [[chunk.path, chunk.start, chunk.end] for chunk in chunks]])
    notes = []
    with context.console.progress("assigning", len(chunks)) as update:
        placement = Placement.data(config.cluster)
        for note in job.assign_all(
            chunks, workspace.tokenizer, workspace.plan, workspace.store, settings, key=key, placement=placement
        ):
            notes.append(note)
            update(advance=1)
    parents = {"bucket_plan": workspace.plan_id, "tokenizer": workspace.tokenizer.id}
    grid = [(bucket.max_duration_ms, bucket.max_tokens) for bucket in workspace.plan.grid.buckets]
    write_index(folder, notes, grid, _statistics(workspace)["body"]["rows"], parents)
    body = read_json(folder / "index.json", INDEX_FORMAT, IndexBody)["body"]
    rejected = sum(body["rejected"].values())
    _rejected_rows(body).check("data.train", config.data.corpora("train"), body["rows"], config.data.max_bad_fraction)
    context.tracking.current.log_metrics({"assigned": body["rows"], "rejected": rejected}, 0, 0.0)
    _show_rejected(context, body["rejected_examples"])
    used = {note["corpus"] for note in notes if any(note["rows"].values())}
    counted = _statistics(workspace)["body"]["by_corpus"]
    _warn_of_unused(context, {name for name, corpus in counted.items() if corpus["utterances"]} - used)
    listing = ", ".join(f"{number} {reason}" for reason, number in body["rejected"].items())
    return f"{body['rows']} rows; rejected {rejected}" + (f" ({listing})" if listing else "")


def _rejected_rows(body: dict[str, Any]) -> RejectedRows:
    """The bad rows that an assignment's index names. What fits no bucket is not bad, unless nothing else is there."""
    bad = (*ROW_REASONS, MISSING)
    found = RejectedRows(num_rows=body["rows"] + sum(body["rejected"].values()))
    for example in body["rejected_examples"]:
        if example["reason"] in bad or not body["rows"]:
            group = example["corpus"], example["reason"]
            found.counts[group] = example["rows"]
            found.examples[group] = [
                BadRow(row["file"], row["line"], example["reason"], row["detail"]) for row in example["first"]
            ]
    return found


def assign_is_whole(workspace: Workspace) -> bool:
    """Whether every chunk's note stands (who finds a part changed removes its note), audio that was not there is still
    missing, and no more rows are bad than may be now."""
    body = read_json(workspace.path("assignment", "index.json"), INDEX_FORMAT, IndexBody)["body"]
    standing = workspace.store.names("assignment/parts", "*.json")
    stand = all(Path(note_name(chunk)).name in standing for chunk in range(len(body["notes"])))
    few = not _rejected_rows(body).too_many(workspace.config.data.max_bad_fraction)
    return stand and few and not came_back(body["rejected_examples"])


# --- oomptimize


def oomptimize_key(workspace: Workspace) -> Any:
    config, train = workspace.config, workspace.config.train
    return [
        [PROFILE_FORMAT, TRACER_VERSION],
        config.section("oomptimize"),
        [train.precision, train.ctc_weight > 0, train.num_workers, train.device, train.activation_checkpointing],
        [train.average_decay is not None, train.accumulate > 1, train.shard],
        workspace.plan_id,
        workspace.model_id(),
        device_names(config),  # sizes of another device would waste memory or run out of it
    ]


def run_oomptimize(context: Context) -> str:
    from raytrain.stages.oomptimize import find_devices, find_profiles

    workspace, kept = context.workspace, context.path("batch_probes.json")
    workspace.store.look(kept.name)
    profiles = []
    for device in find_devices(context.config):
        with _shown(context.console) as show:
            found, outcome = find_profiles(
                context.config,
                workspace.model_config(),
                workspace.model_id(),
                workspace.plan,
                workspace.plan_id,
                device,
                kept,
                show,
            )
        profiles += found
        _track_profile(context, found[0], outcome)
    body = {"profiles": [profile.to_body() for profile in profiles]}
    write_json(context.path("batch_profile.json"), PROFILE_FORMAT, body, {"bucket_plan": workspace.plan_id})
    context.tracking.current.log_artifact(context.path("batch_profile.json"))
    return "; ".join(_profile_summary(profile, workspace.plan) for profile in profiles)


@contextlib.contextmanager
def _shown(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar whose text and length change with the work."""
    with console.progress("starting", None) as update:
        yield lambda text, done, total: update(text=text, completed=done, total=total)


def _track_profile(context: Context, profile: BatchProfile, outcome: ProbeOutcome | None) -> None:
    """Curves over buckets, a table, what each part took, and a run for each bucket with its probes as steps."""
    rows = profile_table(context.workspace.plan, profile)
    tracker, device = context.tracking.current, profile.setting.device_name
    table = context.path(f"batch_profile_{''.join(letter if letter.isalnum() else '_' for letter in device)}.csv")
    lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
    atomic_write_bytes(table, "\n".join([",".join(rows[0]), *lines, ""]).encode())
    tracker.log_artifact(table)
    for row in rows:
        tracker.log_metrics({key: row[key] for key in row if key != "bucket"}, row["bucket"], 0.0)
    if outcome is None:
        return
    tracker.log_metrics({f"seconds.{part}": spent for part, spent in outcome.seconds.items()}, 0, 0.0)
    tracker.log_metrics({"probing_processes": outcome.num_starts}, 0, 0.0)
    context.console.say(f"  {device}: {outcome.num_starts} processes; {seconds_by_part(outcome.seconds)}")
    for row, bucket in zip(rows, outcome.buckets, strict=True):
        with context.tracking.trial(f"bucket {row['bucket']:03}, {device}") as trial:
            trial.log_params({key: row[key] for key in ("bucket", "max_duration_ms", "max_tokens", "batch_size")})
            for step, probe in enumerate((*bucket.probes, *bucket.timed)):
                trial.log_metrics(_probe_metrics(probe), step, 0.0)


def _probe_metrics(probe: Probe) -> dict[str, float]:
    numbers = {"probe_batch_size": probe.batch_size, "fits": float(probe.fits)}
    numbers |= {"peak_gib": probe.peak_bytes / 2**30} if probe.peak_bytes else {}
    return numbers | ({"step_seconds": probe.step_seconds} if probe.step_seconds else {})


def seconds_by_part(seconds: dict[str, float]) -> str:
    """What the parts of a search took, for a person: those of several processes overlap."""
    return ", ".join(f"{part} {spent:.1f} s" for part, spent in seconds.items() if spent >= 0.05)


def profile_table(plan: BucketPlan, profile: BatchProfile) -> list[dict[str, Any]]:
    """One row for each bucket: edges, batch size, and what is known of it."""
    rows = []
    for number, bucket in enumerate(plan.grid.buckets):
        row = {
            "bucket": number,
            "max_duration_ms": bucket.max_duration_ms,
            "max_tokens": bucket.max_tokens,
            "batch_size": profile.batch_sizes[number],
            "audio_seconds": round(profile.batch_sizes[number] * bucket.max_duration_ms / 1000, 1),
            "predicted_gib": profile.predicted_gib[number],
            "probes": profile.num_probes[number],
        }
        for name in ("measured_gib", "step_seconds", "audio_seconds_per_second", "smallest_as_fast"):
            values = getattr(profile, name)
            row[name] = values[number] if values is not None else None
        rows.append(row)
    return rows


def _profile_summary(profile: BatchProfile, plan: BucketPlan) -> str:
    sizes = profile.batch_sizes
    text = f"batch sizes {max(sizes)} … {min(sizes)}, {profile.setting.device_name}"
    if profile.confirmed:
        text += f", {sum(profile.num_probes) / len(sizes):.1f} probes per bucket"
    if profile.smallest_as_fast and (
        halves := sum(
            fast is not None and fast < size for fast, size in zip(profile.smallest_as_fast, sizes, strict=True)
        )
    ):
        text += f"; in {halves} of {len(sizes)} buckets a smaller batch is as fast (oomptimize.objective: throughput)"
    return text


def plan_dry(config: Config, console: Console, device_memory: int) -> list[dict[str, Any]]:
    """Batch sizes for a GPU of `device_memory` bytes that need not be there; writes nothing.

    One row for each bucket, as in `profile_table`, with what is live at the peak by phase and by module (MiB). Raises
    `ArtifactError` where there is no bucket plan yet, and `ProfileError` where not even 1 fits.
    """
    from raytrain.stages.oomptimize import predict, traced_device

    workspace = Workspace(config, config.run_dir)
    kind = "cpu" if config.train.device == "cpu" else "cuda"
    plan = workspace.plan
    with ray_session(config.cluster), _shown(console) as show:
        found = predict(config, workspace.model_config(), plan, traced_device(device_memory), show, kind)
    return [
        {
            "bucket": number,
            "max_duration_ms": bucket.max_duration_ms,
            "max_tokens": bucket.max_tokens,
            "batch_size": one.batch_size,
            "audio_seconds": round(one.batch_size * bucket.max_duration_ms / 1000, 1),
            "predicted_gib": round(one.peak_bytes / 2**30, 3),
            "traced_batch_size": one.traced_size,
            "mib_by_phase": {name: round(size / 2**20, 1) for name, size in one.step.by_phase().items()},
            "mib_by_module": {name: round(size / 2**20, 1) for name, size in one.step.by_module().items()},
        }
        for number, (bucket, one) in enumerate(zip(plan.grid.buckets, found, strict=True))
    ]


# --- schedule


def describe_schedule(
    config: Config, console: Console, world_size: int, steps: int
) -> tuple[list[dict[str, Any]], Simulation | None]:
    """Rows and repeats of each corpus, and `steps` simulated steps (None for 0) with the first batch profile.

    Raises `ArtifactError` where assign or oomptimize have not run, and `ConfigError` for a stream.
    """
    if config.data.stream is not None:
        raise ConfigError(
            "a stream has no schedule to describe",
            why="its batches are what is in the buffer when they are drawn",
            remedy="unset data.stream and run assign",
        )
    workspace = Workspace(config, config.run_dir)
    assignment = workspace.assignment()
    schedule = workspace.schedule(assignment, workspace.profiles()[0].batch_sizes)
    rows = [sum(column) for column in zip(*assignment.rows_by_corpus, strict=True)]
    corpora = [
        {"corpus": name, "rows": number, "repeats": round(repeat, 4)}
        for name, number, repeat in zip(assignment.corpora, rows, schedule.mixture.repeats, strict=True)
    ]
    if not steps:
        return corpora, None
    with console.progress("simulating", steps) as update:
        lengths = [assignment.lengths(bucket) for bucket in range(len(assignment.rows_per_bucket))]
        return corpora, simulate(schedule, lengths, world_size, steps, lambda done: update(completed=done))


# --- train


def _lineage(workspace: Workspace) -> str:
    """Names what a checkpoint was learnt from: another lineage's checkpoints can't be gone on with."""
    settings = {name: value for name, value in asdict(workspace.config.train).items() if name not in _NOT_LINEAGE}
    if workspace.config.train.schedule == "cosine":  # which ends at max_steps
        settings["max_steps"] = workspace.config.train.max_steps
    data = workspace.config.data
    if data.stream is None:
        heard_rows = workspace.assigned_rows_id
    else:
        heard_rows = content_id([workspace.plan_id, _reading(workspace.config, "train"), data.stream.model_dump()])
    heard = asdict(workspace.config.augment)
    mixing = [data.temperature, data.temperature_by, [[corpus.name, corpus.weight] for corpus in data.train]]
    if data.temperature != 1 or len({corpus.weight for corpus in data.train}) > 1:
        by_corpus = _statistics(workspace)["body"]["by_corpus"]  # with rows that assign rejects
        mixing.append([by_corpus[corpus.name]["hours"] for corpus in data.train])
    model = asdict(workspace.model_config())
    start = model_stamp(Path(workspace.config.train.init_from)) if workspace.config.train.init_from else None
    return content_id(
        [settings, workspace.config.seed, heard_rows, mixing, heard, workspace.tokenizer.id, model, start]
    )


def train_key(workspace: Workspace) -> Any:
    return [_lineage(workspace), workspace.config.section("train"), *_validation(workspace)]


def _validation(workspace: Workspace) -> list[Any]:
    """What a checkpoint is validated on, and how."""
    dev = _reading(workspace.config, "dev") if workspace.config.data.dev else None
    return [dev, dev and asdict(workspace.search())]


def train_goes_on(workspace: Workspace) -> bool:
    """Whether training has checkpoints of these settings to go on from."""
    last = workspace.checkpoints().about("newest")
    return last is not None and last.lineage == _lineage(workspace)


def training_meta(workspace: Workspace) -> dict[str, Any]:
    """What every checkpoint says of where it comes from."""
    return {
        "ids": {
            "lineage": _lineage(workspace),
            "bucket_plan": workspace.plan_id,
            "tokenizer": workspace.tokenizer.id,
            "model": workspace.model_id(),
            "batch_profile": file_id(workspace.path("batch_profile.json")),
            "validation": content_id([*_validation(workspace), workspace.config.train.max_validation_utterances]),
        },
        "model": asdict(workspace.model_config()),
    }


def run_train(context: Context) -> str:
    from raytrain.cluster.trainer import METRICS, mirror_of, run_training

    workspace, config = context.workspace, context.config
    lineage = _lineage(workspace)
    _set_aside_other_lineage(context, lineage)
    folder = workspace.checkpoints()
    start, mirror = folder.about("newest"), mirror_of(config)
    if start is None and mirror is not None:
        start = mirror.fetch_newest(make_folder(folder.folder), lineage)
        if start is not None:
            context.console.say(f"  found the checkpoint of step {start.step} in {mirror.path}")
    if start is not None:
        start.check_lineage(lineage)
        context.console.say(f"  training goes on from step {start.step}")
    with _training_progress(context, start.step if start else 0) as on_metrics:
        run_training(
            config,
            workspace.store.location,
            meta=training_meta(workspace),
            mlflow=context.tracking.worker_arguments(),
            on_metrics=on_metrics,
            say=context.console.say,
        )
    lowered = context.path("batch_profile_lowered.json")
    if lowered.exists():
        context.tracking.current.log_artifact(lowered)
    workspace.store.look(METRICS)
    workspace.gather_quarantine()
    if broken := _quarantined(context.path("quarantine.jsonl")):
        context.console.warn(
            f"{broken} recording(s) can't be read (quarantine.jsonl names them); in training others take their place"
        )
    last = folder.about("newest")
    if last is None:
        raise TrainingError("training ended without a checkpoint", remedy="see the messages above")
    best = folder.about("best") or last
    for checkpoint in (last, best):
        checkpoint.check_lineage(lineage)
    note = {
        "lineage": lineage,
        "last_step": last.step,
        "last_files": last.meta["files"],
        "best_step": best.step,
        "files": best.meta["files"],
    }
    atomic_write_bytes(context.path("checkpoints", "last.json"), canonical_json(note))
    return f"{last.step} steps, {last.meta.get('seconds', 0.0) / 60:.1f} min; best checkpoint at step {best.step}"


def _quarantined(path: Path) -> int:
    """Recordings that are named in a quarantine file; workers name the same one each for itself."""
    return len(set(lines_of(path)))


@contextlib.contextmanager
def _training_progress(context: Context, step: int) -> Iterator[Any]:
    total, monitor = context.config.train.max_steps, DataWaitMonitor(_data_path(context.config))
    with context.console.progress("training", total) as update:
        update(completed=step)
        shown: dict[str, float] = {}

        def on_metrics(line: dict[str, Any]) -> None:
            shown.update({key: line[key] for key in ("loss", "wer", "bleu") if key in line})
            text = "training  " + "  ".join(f"{key} {value:.3f}" for key, value in shown.items())
            update(completed=line["step"], text=text)
            # The lines of a run that resumes come first.
            if line["step"] > step and (warning := monitor.check(line)) is not None:
                context.console.warn(warning)

        yield on_metrics


def _data_path(config: Config) -> DataPath:
    return DataPath(
        config.train.num_loader_threads, config.data.workers, config.assign.materialize, config.data.stream is not None
    )


def _set_aside_other_lineage(context: Context, lineage: str) -> None:
    """Move checkpoints and metrics of another setting to `previous/`; they are the user's until overwritten there."""
    store = context.workspace.store
    marker = store.look("checkpoints/lineage.json")
    if store.is_remote:
        _set_aside_remote(context, lineage, marker)
    elif context.path("checkpoints").exists():
        if _noted_lineage(marker) == lineage:
            return
        previous = context.path("previous")
        if any(context.path("checkpoints").glob("step_*")):  # else there is nothing that could replace the older ones
            shutil.rmtree(previous, ignore_errors=True)
        make_folder(previous)
        for name in ("checkpoints", "metrics.jsonl"):
            if context.path(name).exists() and not (previous / name).exists():
                shutil.move(context.path(name), previous / name)
        shutil.rmtree(context.path("checkpoints"), ignore_errors=True)
        context.console.say("  settings changed: training starts anew, the old checkpoints are in previous/")
    else:
        context.path("metrics.jsonl").unlink(missing_ok=True)
    atomic_write_bytes(marker, canonical_json({"lineage": lineage}))
    store.share("checkpoints/lineage.json")


@dataclass(frozen=True)
class LineageNote:
    """What `checkpoints/lineage.json` keeps."""

    lineage: str


def _noted_lineage(marker: Path) -> str | None:
    note = read_state(marker, LineageNote)
    return note and note["lineage"]


def _set_aside_remote(context: Context, lineage: str, marker: Path) -> None:
    store = context.workspace.store
    if _noted_lineage(marker) == lineage:
        return
    if context.workspace.checkpoints().about("newest") is None:
        store.clear("checkpoints")
        store.discard("metrics.jsonl")
        return
    store.clear("previous")
    store.set_aside("checkpoints", "metrics.jsonl")
    context.console.say("  settings changed: training starts anew, the old checkpoints are in previous/")


# --- evaluate


def evaluate_key(workspace: Workspace) -> Any:
    config = workspace.config
    checkpoint = file_id(workspace.path("checkpoints", "last.json"))
    return [SCORES_FORMAT, config.section("evaluate"), checkpoint, _reading(config, "test")]


def run_evaluate(context: Context) -> str:
    from raytrain.evaluation.scoring import score, texts_of
    from raytrain.evaluation.worst import worst
    from raytrain.report.errors import write_errors
    from raytrain.stages.evaluate import transcribe_rows

    rows = context.workspace.checked_rows("test")
    for reason, number in context.workspace.left_out["test"].by_reason().items():
        context.console.warn(f"{number} test row(s) left out: {reason}")
    for name in ("scores.json", "errors.html"):  # of other hypotheses than those that are written next
        context.workspace.store.discard(name)
    results = []
    with context.console.progress("transcribing", len(rows)) as update:
        for result in transcribe_rows(context.config, context.workspace.store.location, rows):
            results.append(result)
            update(advance=1)
    results.sort(key=lambda result: result["id"])
    atomic_write_bytes(context.path("hypotheses.jsonl"), b"".join(orjson.dumps(one) + b"\n" for one in results))
    check_unreadable(results, context.config.data.max_bad_fraction)
    texts = texts_of(results, context.config.evaluate.normalizer)
    body = score(texts)
    parents = {"checkpoint": file_id(context.path("checkpoints", "last.json"))}
    write_json(context.path("scores.json"), SCORES_FORMAT, body, parents)
    write_errors(context.path("errors.html"), title=context.config.name, scores=body, worst=worst(texts))
    context.tracking.current.log_metrics(_test_metrics(body), 0, 0.0)
    for name in ("scores.json", "hypotheses.jsonl", "errors.html"):
        context.tracking.current.log_artifact(context.path(name))
    if body["unreadable"]:
        context.console.warn(f"{body['unreadable']} recording(s) can't be read; hypotheses.jsonl says why")
    if body["references_changed"]:
        context.console.warn(
            f"{body['references_changed']} of {len(results) - body['unreadable']} references are compared as the "
            "tokenizer's normaliser writes them; hypotheses.jsonl has both"
        )
    return ", ".join(_said_of(body))


def check_unreadable(results: list[dict[str, Any]], limit: float) -> None:
    """Raise `DataError` where more than `limit` of the test's recordings, or all of them, can't be read."""
    unreadable = [result for result in results if result["hypothesis"] is None]
    if are_enough_readable(len(unreadable), len(results), limit):
        return
    raise DataError(
        f"{len(unreadable)} of {len(results)} test recordings can't be read",
        got=f"{len(unreadable) / len(results):.2%}" if results else None,
        allowed=f"data.max_bad_fraction = {limit:.2%}, and at least one that can be read",
        why="a score of what is left would not be the test's",
        remedy="check data.test, data.root and that every worker sees the audio, or raise the limit; hypotheses.jsonl "
        "has the texts of the others" + "".join(f"\n  {result['error']}" for result in unreadable[:_NUM_EXAMPLES]),
    )


def _test_metrics(body: dict[str, Any]) -> dict[str, float]:
    heard = ("wer", "cer", "wer_normalized")
    metrics = {f"test_{name}": body[name] for name in heard if body.get(name) is not None}
    return metrics | {
        f"test_{name}_{language}": value for name in ("bleu", "chrf") for language, value in body[name].items()
    }


def _said_of(body: dict[str, Any]) -> Iterator[str]:
    if body["wer"] is not None:
        low, high = body["wer_ci"]
        yield f"WER {body['wer']:.1%} ({low:.1%} to {high:.1%}) on {body['utterances']} utterances"
    if body.get("wer_normalized") is not None:
        yield f"normalised {body['wer_normalized']:.1%}"
    for language, value in body["bleu"].items():
        yield f"BLEU {value:.1f} into {language}"
    if body["wer"] is None and not body["bleu"]:
        yield "no score: no reference has a word"


# --- report


def report_key(workspace: Workspace) -> Any:
    names = ["statistics.json", "bucket_plan.json", "batch_profile.json"]
    if workspace.config.data.stream is None:
        names.append("assignment/index.json")
    results = ("checkpoints/last.json", "hypotheses.jsonl", "scores.json")
    return [[name, file_id(workspace.path(name))] for name in (*names, *results)]


def run_report(context: Context) -> str:
    from raytrain.report.page import write_report

    path = write_report(context.workspace.run_dir, context.path("report.html"), title=context.config.name)
    context.tracking.current.log_artifact(path)
    return str(path)
