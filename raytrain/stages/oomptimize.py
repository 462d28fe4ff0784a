"""Stage `oomptimize`: the largest batch of every bucket that fits the memory budget, predicted and then confirmed.

Sizes are predicted by tracing (`predicted_sizes`). If there are GPUs, a process on each of them then runs real steps
(`raytrain.cluster.probing`): searches that start at the prediction and narrow each other's bounds, timing of smaller
batches, and a soak that mixes all buckets as training does. Each kind of GPU in the cluster gets its own profile
(`batch_profiles`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from raytrain.cluster.gpus import device_names
from raytrain.console import Console
from raytrain.lengths.profile import BatchProfile
from raytrain.run_folder.documents import PROFILE_FORMAT
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.batch_profiles import Cell, find_profiles, profile_summary, profile_table
from raytrain.stages.context import Context
from raytrain.stages.devices import GIB, find_devices
from raytrain.storage.artifacts import atomic_write_bytes, write_json
from raytrain.storage.run_files import BATCH_PROBES, BATCH_PROFILE
from raytrain.training.memory.coordinator import ProbeOutcome
from raytrain.training.memory.meter import Probe
from raytrain.training.memory.tracer import TRACER_VERSION
from raytrain.training.settings import CHECKPOINTING


def key(workspace: Workspace) -> object:
    """What the stage depends on, as JSON values."""
    config, train = workspace.config, workspace.config.train
    return [
        [PROFILE_FORMAT, TRACER_VERSION],
        config.section("oomptimize"),
        [
            train.precision,
            train.ctc_weight > 0,
            train.num_workers,
            train.device,
            CHECKPOINTING.earlier(train.activation_checkpointing),
        ],
        train.compile,
        [train.average_decay is not None, train.accumulate > 1, train.shard],
        *([train.reduce_in] if train.reduce_in != "fp32" else []),  # a later setting: earlier runs keep their keys
        workspace.plan_id,
        workspace.model_id(),
        device_names(config),  # another device's sizes would waste memory or run out of it
    ]


def run(context: Context) -> str:
    """Write `batch_profile.json`, and a table per kind of device."""
    workspace = context.workspace
    workspace.store.refresh(BATCH_PROBES)
    profiles: list[BatchProfile] = []
    for device in find_devices(context.config):
        with tracing_progress(context.console) as show:
            of_device, outcome = find_profiles(workspace, device, context.path(BATCH_PROBES), show)
        profiles += of_device
        _track(context, of_device[0], outcome)
    body = {"profiles": [profile.to_body() for profile in profiles]}
    write_json(context.path(BATCH_PROFILE), PROFILE_FORMAT, body, {"bucket_plan": workspace.plan_id})
    context.tracker.log_artifact(context.path(BATCH_PROFILE))
    return "; ".join(map(profile_summary, profiles))


@contextlib.contextmanager
def tracing_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar whose text and length change with the work."""
    with console.progress("starting", None) as update:
        yield lambda text, done, total: update(text=text, completed=done, total=total)


def _track(context: Context, profile: BatchProfile, outcome: ProbeOutcome | None) -> None:
    """Log curves over buckets, a table, the seconds of each part, and a run per bucket with its probes as steps."""
    rows, tracker, device = profile_table(context.workspace.plan, profile), context.tracker, profile.setting.device_name
    _write_table(context, rows, device)
    for number, row in enumerate(rows):
        metrics = {name: value for name, value in row.items() if name != "bucket" and isinstance(value, int | float)}
        tracker.log_metrics(metrics, number, 0.0)
    if outcome is None:
        return
    tracker.log_metrics({f"seconds.{part}": spent for part, spent in outcome.seconds.items()}, 0, 0.0)
    tracker.log_metrics({"probing_processes": outcome.num_starts}, 0, 0.0)
    context.console.say(f"  {device}: {outcome.num_starts} processes; {seconds_by_part(outcome.seconds)}")
    for number, (row, bucket) in enumerate(zip(rows, outcome.buckets, strict=True)):
        with context.tracking.trial(f"bucket {number:03}, {device}") as trial:
            trial.log_params({name: row[name] for name in ("bucket", "max_duration_ms", "max_tokens", "batch_size")})
            for step, probe in enumerate((*bucket.probes, *bucket.timed)):
                trial.log_metrics(_probe_metrics(probe), step, 0.0)


def _write_table(context: Context, rows: Sequence[Mapping[str, Cell]], device: str) -> None:
    name = "".join(letter if letter.isalnum() else "_" for letter in device)
    path = context.path(f"batch_profile_{name}.csv")
    lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
    atomic_write_bytes(path, "\n".join([",".join(rows[0]), *lines, ""]).encode())
    context.tracker.log_artifact(path)


def _probe_metrics(probe: Probe) -> dict[str, float]:
    metrics = {"probe_batch_size": probe.batch_size, "fits": float(probe.fits)}
    if probe.peak_bytes:
        metrics["peak_gib"] = probe.peak_bytes / GIB
    if probe.step_seconds:
        metrics["step_seconds"] = probe.step_seconds
    return metrics


def seconds_by_part(seconds: Mapping[str, float]) -> str:
    """The seconds of each part of a search, as text; parts of several processes overlap."""
    return ", ".join(f"{part} {spent:.1f} s" for part, spent in seconds.items() if spent >= 0.05)
