"""Stage `oomptimize`: the largest batch of every bucket that fits the memory budget, predicted and then confirmed.

The prediction traces training steps on meta tensors, bucket by bucket, on Ray Data's workers. Where there are GPUs, Ray
Tune then runs one trial per bucket, which starts its search at the prediction and runs real steps in a process of its
own. Trials tell an actor what fits and what does not, and so narrow each other's brackets. Last, a soak mixes all
buckets as training does, and lowers those that fail. Each kind of GPU in the cluster gets a profile.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from raytrain.artifacts import content_id
from raytrain.cluster.placement import Placement, total
from raytrain.cluster.session import map_on_workers
from raytrain.config import Config
from raytrain.errors import ConfigError, ProfileError
from raytrain.lengths.plan import BucketPlan
from raytrain.lengths.profile import BatchProfile, ProbeSetting
from raytrain.model.config import ModelConfig
from raytrain.nodes import accelerator_of
from raytrain.training.settings import TrainSettings

GIB = 2**30
Progress = Callable[[str, int, int], None]  # what is done, how many of how many


@dataclass(frozen=True)
class Device:
    """What to find batch sizes for: a kind of GPU in the cluster, or (`is_real` false) one that is only named.

    `per_trial` is the share of a real GPU that a trial takes; `accelerator` is Ray's name for the kind, None where
    nodes do not tell.
    """

    name: str
    total_bytes: int
    is_real: bool
    accelerator: str | None = None
    per_trial: float = 1.0

    def budget(self, config: Config) -> int:
        """Bytes that a training step may take."""
        return int(self.total_bytes * config.oomptimize.memory_fraction)

    @property
    def gpus(self) -> float:
        """What a trial takes of a GPU."""
        return self.per_trial if self.is_real else 0.0

    def placement(self, config: Config) -> Placement:
        """Where its trials run."""
        train = Placement.train(config.cluster)
        return replace(train, accelerator_type=self.accelerator) if self.accelerator else train


def traced_device(total_bytes: int) -> Device:
    """A device that is not there."""
    return Device(f"traced for {total_bytes / GIB:g} GiB", total_bytes, is_real=False)


def find_devices(config: Config) -> list[Device]:
    """The kinds of GPU in the nodes that are for training, or the named device where there is none.

    Raises `ConfigError` with neither a GPU nor a named device, for an objective that needs a GPU's time, and where no
    node is for training.
    """
    named = config.oomptimize.device_memory
    with_gpus = [node["Resources"] for node in Placement.train(config.cluster).nodes() if total([node], "GPU")]
    if with_gpus and config.train.device != "cpu":
        kinds = sorted({accelerator_of(one) for one in with_gpus}, key=str)
        return [_real_device(kind, named, config) for kind in kinds]
    if named is None:
        raise ConfigError(
            "there is no GPU here to measure memory on",
            remedy="name the device to plan for, for example oomptimize.device_memory: 16GiB",
        )
    if config.oomptimize.objective == "throughput":
        raise ConfigError(
            "oomptimize.objective: throughput needs a GPU",
            why="without one the memory of a step is traced, but nobody knows its time",
            remedy="set it to memory, or run where the GPUs are",
        )
    return [traced_device(named)]


def _real_device(accelerator: str | None, named: int | None, config: Config) -> Device:
    import ray

    probe = Device("", 0, is_real=True, accelerator=accelerator)
    options = probe.placement(config).remote_options(gpus=probe.gpus)
    name, memory = ray.get(ray.remote(**options)(_gpu_properties).remote())
    planned = min(named or memory, memory)
    # Two searches in one GPU's memory are safe where their budgets fit side by side; their times would mean nothing.
    share = 1 / (memory // planned) if config.oomptimize.objective == "memory" else 1.0
    return Device(name, planned, True, accelerator, share)


def _gpu_properties() -> tuple[str, int]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory


# --- prediction


_TRACERS: dict[str, tuple[Any, Any]] = {}


def _predict(
    cells: list[tuple[int, int]], *, model: ModelConfig, train: TrainSettings, precision: str, device_type: str,
    budget: int, max_size: int,
) -> list[Any]:  # fmt: skip
    """Predictions for some buckets; runs on a worker, which keeps what it learns for the next."""
    import torch

    from raytrain.training.memory import Neighbours, StepTracer, predict_batch_size

    torch.set_num_threads(1)
    key = content_id([asdict(model), asdict(train), precision, device_type, budget])
    if key not in _TRACERS:
        _TRACERS.clear()
        options = {"precision": precision, "world_size": train.most_workers, "device_type": device_type}
        _TRACERS[key] = StepTracer(model, train, **options), Neighbours()
    tracer, neighbours = _TRACERS[key]
    found = []
    for cell in cells:
        found.append(predict_batch_size(tracer, *cell, budget, max_size, neighbours.guess(*cell)))
        neighbours.add(*cell, found[-1].line)
    return found


def _device_type(config: Config, device: Device) -> str:
    return "cuda" if device.is_real or config.train.device == "cuda" else "cpu"


def predict(
    config: Config, model: ModelConfig, plan: BucketPlan, device: Device, on_progress: Progress,
    device_type: str | None = None,
) -> list[Any]:  # fmt: skip
    """A `training.memory.Prediction` for each bucket. Raises `ProfileError` where not even one utterance fits."""
    from raytrain.training.step import resolve_precision

    kind = device_type or _device_type(config, device)
    edges = [(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets]
    function = partial(
        _predict, model=model, train=config.train, precision=resolve_precision(config.train.precision, kind),
        device_type=kind, budget=device.budget(config), max_size=config.oomptimize.max_batch_size,
    )  # fmt: skip
    found: list[Any] = []
    data = Placement.data(config.cluster)
    for part in map_on_workers(edges, function, 4, data):
        found += part
        on_progress("tracing buckets", len(found), len(edges))
    for number, prediction in enumerate(found):
        if prediction.batch_size is None and not device.is_real:
            alternative = None
            if not config.train.activation_checkpointing:
                saving = partial(function, train=replace(config.train, activation_checkpointing=True))
                alternative = next(map_on_workers([edges[number]], saving, 1, data))[0].peak_bytes
            raise _does_not_fit(number, edges[number], prediction.peak_bytes, device, config, alternative)
    return [_at_least(number, found, edges) for number in range(len(found))]


def _at_least(number: int, found: list[Any], edges: list[tuple[int, int]]) -> Any:
    """A bucket's prediction, with what a bucket of longer edges can take: traces end a little below the largest."""
    one, (duration, tokens) = found[number], edges[number]
    size = max(
        (
            other.batch_size or 0
            for other, (long, many) in zip(found, edges, strict=True)
            if long >= duration and many >= tokens
        )
    )
    if size <= (one.batch_size or 0):
        return one
    return replace(one, batch_size=size, peak_bytes=round(one.line.base_bytes + size * one.line.slope_bytes))


def _does_not_fit(
    number: int, edges: tuple[int, int], need: int, device: Device, config: Config, alternative: int | None = None,
    why: str | None = None,
) -> ProfileError:  # fmt: skip
    budget = device.budget(config)
    remedies = ["lower buckets.max_duration_ms or buckets.max_tokens", "take a smaller model"]
    if not config.train.activation_checkpointing:
        saved = f" (it then needs {alternative / GIB:.2f} GiB)" if alternative else ""
        remedies.insert(0, f"set train.activation_checkpointing: true{saved}")
    remedies.append("raise oomptimize.memory_fraction" if device.is_real else "raise oomptimize.device_memory")
    return ProfileError(
        f"bucket {number} (≤ {edges[0]} ms, ≤ {edges[1]} tokens): batch size 1 needs {need / GIB:.2f} GiB of "
        f"{budget / GIB:.2f} GiB",
        why=why,
        remedy=", ".join(remedies[:-1]) + ", or " + remedies[-1],
    )


# --- confirmation

_METERS: dict[str, Any] = {}
_SHOWING: list[Progress] = []


def step_meter(job: dict[str, Any]) -> Any:
    """A meter of real steps in a process of its own."""
    from raytrain.model.config import SpecAugmentSettings
    from raytrain.training.isolated import IsolatedMeter
    from raytrain.training.probe import StepMeter

    model = ModelConfig(**{**job["model"], "spec_augment": SpecAugmentSettings(**job["model"]["spec_augment"])})
    return IsolatedMeter(StepMeter, model, TrainSettings(**job["train"]), job["budget_bytes"])


def _meter(job: dict[str, Any], make_meter: Callable[[dict[str, Any]], Any]) -> Any:
    """One meter per worker process and setting: the next trial in the same process goes on with it."""
    if job["id"] not in _METERS:
        _METERS[job["id"]] = make_meter(job)
    return _METERS[job["id"]]


def probe_bucket(parameters: dict[str, Any], make_meter: Callable[[dict[str, Any]], Any] = step_meter) -> None:
    """One trial: search the batch size of one bucket and report it to Tune."""
    import ray
    from ray import tune

    from raytrain.lengths.search import BatchSizeSearch
    from raytrain.training.probe import search_batch_size, smallest_as_fast

    job, bucket = parameters["job"], parameters["job"]["bucket"]
    brackets = ray.get_actor(job["brackets"])
    meter = _meter(job, make_meter)

    def measure(size: int) -> Any:
        return meter.measure(size, (job["max_duration_ms"], job["max_tokens"]), job["steps_per_probe"])

    found = search_batch_size(
        measure,
        BatchSizeSearch(ray.get(brackets.start.remote(bucket)), job["max_size"], job["tolerance"]),
        before=lambda: ray.get(brackets.hints.remote(bucket)),
        after=lambda probe: ray.get(brackets.report.remote(bucket, probe.batch_size, probe.fits, probe.peak_bytes)),
    )
    timed: list[Any] = []
    fastest = None
    if found.batch_size is not None and job["times"]:
        best = found.best or measure(found.batch_size)
        timed = [] if found.best else [best]
        if best.fits:
            small, more = smallest_as_fast(measure, best)
            timed += more
            fastest = small.batch_size
    tune.report(
        {
            "bucket": bucket,
            "batch_size": found.batch_size,
            "probes": [asdict(probe) for probe in found.probes],
            "timed": [asdict(probe) for probe in timed],
            "smallest_as_fast": fastest,
        }
    )


class _Brackets:
    """`SharedBrackets` as a Ray actor."""

    def __init__(self, *arguments: Any) -> None:
        from raytrain.lengths.search import SharedBrackets

        self._shared = SharedBrackets(*arguments)

    def start(self, bucket: int) -> int | None:
        """See `SharedBrackets.start`."""
        return self._shared.start(bucket)

    def hints(self, bucket: int) -> tuple[Any, ...]:
        """See `SharedBrackets.hints`."""
        return self._shared.hints(bucket)

    def report(self, bucket: int, size: int, fits: bool, peak_bytes: int | None) -> None:
        """See `SharedBrackets.report`."""
        self._shared.report(bucket, size, fits, peak_bytes)


def confirm(
    config: Config, model: ModelConfig, plan: BucketPlan, device: Device, needs: list[tuple[float, float]],
    scratch: str, on_progress: Progress, make_meter: Callable[[dict[str, Any]], Any] = step_meter,
) -> list[dict[str, Any]]:  # fmt: skip
    """One Tune trial per bucket; what each reported, in the order of buckets. `needs` is the predicted memory of each
    bucket's step as (bytes, bytes per utterance).

    A stopped search goes on where it was. Raises `ProfileError` where a trial fails, and where not even one utterance
    fits.
    """
    import ray

    section, budget = config.oomptimize, device.budget(config)
    edges = [(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets]
    common = {
        "model": asdict(model), "train": asdict(config.train), "budget_bytes": budget, "device": device.name,
        "max_size": section.max_batch_size, "tolerance": section.tolerance, "steps_per_probe": section.steps_per_probe,
        "times": device.per_trial == 1.0 and section.time_smaller_batches,
    }  # fmt: skip
    common["id"] = content_id([common, edges, needs])
    common["brackets"] = f"raytrain-brackets-{common['id']}"
    jobs = [
        {**common, "bucket": number, "max_duration_ms": duration, "max_tokens": tokens}
        for number, (duration, tokens) in enumerate(edges)
    ]
    place = Placement.data(config.cluster).remote_options(cpus=0)
    shared = ray.remote(_Brackets).options(name=common["brackets"], **place)
    brackets = shared.remote(edges, needs, budget, section.tolerance)
    try:
        asked = device.placement(config).trial_resources(gpus=device.gpus)
        results = _run_trials(jobs, asked, f"{scratch}/oomptimize-{common['id']}", on_progress, make_meter)
    finally:
        ray.kill(brackets)
    for number, result in enumerate(results):
        if result["batch_size"] is None:
            why = next((probe["why"] for probe in result["probes"] if probe["batch_size"] == 1), None)
            raise _does_not_fit(number, edges[number], budget, device, config, why=why)
    return results


def _run_trials(
    jobs: list[dict[str, Any]], resources: Any, folder: str, on_progress: Progress,
    make_meter: Callable[[dict[str, Any]], Any],
) -> list[dict[str, Any]]:  # fmt: skip
    from ray import tune

    class Counted(tune.Callback):
        """Tune keeps its callbacks on disk, for a restored run; a progress bar stays with its process."""

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            from raytrain.cluster.oomptimize import _SHOWING

            for show in _SHOWING:
                show("probing buckets", sum(one.is_finished() or one is trial for one in trials), len(trials))

    # Finished trials must be on disk when the run is killed, not up to ten seconds later.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    trainable = tune.with_resources(partial(probe_bucket, make_meter=make_meter), resources)
    space = {"job": tune.grid_search(jobs)}
    parent, _, name = folder.rpartition("/")
    if tune.Tuner.can_restore(folder):
        tuner = tune.Tuner.restore(folder, trainable, restart_errored=True, param_space=space)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(name=name, storage_path=parent, verbose=0, callbacks=[Counted()]),
        )
    _SHOWING[:] = [on_progress]
    with contextlib.redirect_stdout(None):
        grid = tuner.fit()
    for result in grid:
        if result.error is not None:
            raise ProfileError("a batch-size trial failed", why=str(result.error).strip().splitlines()[-1])
    by_bucket = {result.metrics["bucket"]: result.metrics for result in grid}
    return [by_bucket[job["bucket"]] for job in jobs]


def soak_all(
    config: Config, model: ModelConfig, plan: BucketPlan, device: Device, sizes: list[int], on_progress: Progress,
    make_meter: Callable[[dict[str, Any]], Any] = step_meter,
) -> tuple[list[int], dict[int, int]]:  # fmt: skip
    """Sizes after the soak, and the measured peak bytes of each bucket at its last step.

    Raises `ProfileError` where a bucket ends below 1.
    """
    import ray

    section = config.oomptimize
    edges = [(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets]
    job = {
        "model": asdict(model), "train": asdict(config.train), "budget_bytes": device.budget(config),
        "edges": edges, "sizes": sizes, "num_steps": section.soak_steps, "seed": config.seed,
    }  # fmt: skip
    options = device.placement(config).remote_options(gpus=device.gpus)
    task = ray.remote(num_returns="streaming", max_retries=0, **options)(_soak)
    steps = max(section.soak_steps, len(edges))
    current, peaks, done = list(sizes), {}, 0
    for item in task.remote(job, make_meter):
        step = ray.get(item)
        done += 1
        if step.lowered_to is not None:
            current[step.bucket], done = step.lowered_to, 0
            if step.lowered_to < 1:
                budget = device.budget(config)
                raise _does_not_fit(step.bucket, edges[step.bucket], budget, device, config, why=step.probe.why)
        elif step.probe.peak_bytes is not None:
            peaks[step.bucket] = step.probe.peak_bytes
        on_progress("soaking", min(done, steps), steps)
    return current, peaks


def _soak(job: dict[str, Any], make_meter: Callable[[dict[str, Any]], Any]) -> Iterator[Any]:
    from raytrain.training.probe import soak

    meter = make_meter(job)
    try:
        yield from soak(meter, job["edges"], job["sizes"], job["num_steps"], job["seed"])
    finally:
        if hasattr(meter, "close"):
            meter.close()


# --- profiles


def find_profile(
    config: Config, model: ModelConfig, model_id: str, plan: BucketPlan, plan_id: str, device: Device, scratch: str,
    on_progress: Progress, make_meter: Callable[[dict[str, Any]], Any] = step_meter,
) -> tuple[BatchProfile, list[dict[str, Any]]]:  # fmt: skip
    """The profile of one device, and what each trial reported (none where the device is only named)."""
    predictions = predict(config, model, plan, device, on_progress)
    setting = probe_setting(config, model_id, device, _device_type(config, device))
    if not device.is_real:
        return BatchProfile(
            plan_id=plan_id,
            setting=setting,
            batch_sizes=tuple(one.batch_size for one in predictions),
            predicted_gib=tuple(_gib(one.peak_bytes) for one in predictions),
            num_probes=(0,) * len(predictions),
        ), []
    needs = [(one.line.base_bytes, one.line.slope_bytes) for one in predictions]
    trials = confirm(config, model, plan, device, needs, scratch, on_progress, make_meter)
    throughput = config.oomptimize.objective == "throughput"
    sizes = [
        trial["smallest_as_fast"] if throughput and trial["smallest_as_fast"] else trial["batch_size"]
        for trial in trials
    ]
    soaked, peaks = soak_all(config, model, plan, device, sizes, on_progress, make_meter)
    seconds = [_seconds_at(trial, size) for trial, size in zip(trials, soaked, strict=True)]
    durations = [bucket.max_duration_ms / 1000 for bucket in plan.grid.buckets]
    return BatchProfile(
        plan_id=plan_id,
        setting=setting,
        batch_sizes=tuple(soaked),
        predicted_gib=tuple(
            _gib(one.line.base_bytes + size * one.line.slope_bytes)
            for one, size in zip(predictions, soaked, strict=True)
        ),
        num_probes=tuple(len(trial["probes"]) for trial in trials),
        measured_gib=tuple(_gib(peaks[number]) if number in peaks else None for number in range(len(soaked))),
        step_seconds=tuple(seconds),
        audio_seconds_per_second=tuple(
            round(size * duration / time, 1) if time else None
            for size, duration, time in zip(soaked, durations, seconds, strict=True)
        ),
        smallest_as_fast=tuple(trial["smallest_as_fast"] for trial in trials),
    ), trials


def probe_setting(config: Config, model_id: str, device: Device, device_type: str) -> ProbeSetting:
    """Under what a device's sizes hold."""
    import torch

    from raytrain.training.step import resolve_precision

    return ProbeSetting(
        model_id=model_id,
        optimizer="adamw",
        precision=resolve_precision(config.train.precision, device_type),
        activation_checkpointing=config.train.activation_checkpointing,
        device_name=device.name,
        device_gib=round(device.total_bytes / GIB, 3),
        memory_fraction=config.oomptimize.memory_fraction,
        world_size=config.train.most_workers,
        torch_version=torch.__version__.split("+")[0],
        objective=config.oomptimize.objective,
    )


def _seconds_at(trial: dict[str, Any], size: int) -> float | None:
    times = [one["step_seconds"] for one in (*trial["probes"], *trial["timed"]) if one["batch_size"] == size]
    known = [round(time, 4) for time in times if time is not None]
    return min(known, default=None)


def _gib(size: float) -> float:
    return round(size / GIB, 4)
