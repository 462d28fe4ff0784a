"""Stage `oomptimize`: one Ray Tune trial per bucket finds its largest batch within the memory budget.

Without a GPU a trial traces the step on meta tensors for a named device; with one it runs real steps. Trials
share worker processes where they only trace, since starting a process costs more than a trace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytrain.config import Config
from raytrain.errors import ConfigError, ProfileError
from raytrain.lengths.plan import BucketPlan
from raytrain.lengths.profile import BatchProfile, ProbeSetting
from raytrain.model.config import ModelConfig, SpecAugmentSettings
from raytrain.training.settings import TrainSettings


def probe_bucket(parameters: dict[str, Any]) -> None:
    """One trial: search the batch size of one bucket and report it to Tune."""
    import torch
    from ray import tune

    from raytrain.training.probe import CudaMeter, TraceMeter, search_batch_size

    torch.set_num_threads(1)
    job = parameters["job"]
    model = ModelConfig(**{**job["model"], "spec_augment": SpecAugmentSettings(**job["model"]["spec_augment"])})
    settings = TrainSettings(**job["train"])
    edges = (job["max_duration_ms"], job["max_tokens"])
    predictor = TraceMeter(model, settings, *edges, job["budget_bytes"], world_size=settings.num_workers)
    meter = CudaMeter(model, settings, *edges, job["budget_bytes"]) if job["cuda"] else predictor
    found = search_batch_size(meter, predictor, max_size=job["max_size"], tolerance=job["tolerance"])
    tune.report({**asdict(found), "bucket": job["bucket"]})


def find_device(config: Config) -> tuple[str, float, bool]:
    """(name, GiB, has a GPU) of the device to plan for. Raises `ConfigError` with neither GPU nor budget."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    named = config.oomptimize.device_memory
    if gpus and config.train.device != "cpu":
        name, total = ray.get(ray.remote(num_gpus=1)(_gpu_properties).remote())
        return name, (named or total) / 2**30, True
    if named is None:
        raise ConfigError(
            "there is no GPU here to measure memory on",
            remedy="name the device to plan for, for example oomptimize.device_memory: 16GiB",
        )
    return f"traced for {named / 2**30:g} GiB", named / 2**30, False


def _gpu_properties() -> tuple[str, int]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory


def find_batch_sizes(
    config: Config,
    model: ModelConfig,
    model_id: str,
    plan: BucketPlan,
    plan_id: str,
    scratch: Path,
    on_trial: Callable[[], None],
) -> BatchProfile:
    """Run the trials and put their answers together. Raises `ProfileError` where batch size 1 does not fit."""
    import torch

    device_name, device_gib, cuda = find_device(config)
    section = config.oomptimize
    budget = int(device_gib * 2**30 * section.memory_fraction)
    common = {
        "model": asdict(model),
        "train": asdict(config.train),
        "budget_bytes": budget,
        "max_size": section.max_batch_size,
        "tolerance": section.tolerance,
        "cuda": cuda,
    }
    jobs = [
        {**common, "bucket": i, "max_duration_ms": b.max_duration_ms, "max_tokens": b.max_tokens}
        for i, b in enumerate(plan.grid.buckets)
    ]
    results = _run_trials(jobs, cuda, scratch, on_trial)
    for job, result in zip(jobs, results, strict=True):
        if result["batch_size"] is None:
            _refuse(job, result["peak_bytes"], budget)
    setting = ProbeSetting(
        model_id=model_id,
        optimizer="adamw",
        precision=config.train.precision,
        device_name=device_name,
        device_gib=round(device_gib, 3),
        memory_fraction=section.memory_fraction,
        world_size=config.train.num_workers,
        torch_version=torch.__version__.split("+")[0],
    )
    peaks = tuple(round(result["peak_bytes"] / 2**30, 4) for result in results)
    seconds = tuple(result["step_seconds"] for result in results) if cuda else None
    return BatchProfile(
        plan_id=plan_id,
        setting=setting,
        batch_sizes=tuple(int(result["batch_size"]) for result in results),
        peak_gib=peaks,
        predicted_gib=peaks,
        step_seconds=seconds,
        confirmed=cuda,
    )


def _run_trials(jobs: list[dict], cuda: bool, scratch: Path, on_trial: Callable[[], None]) -> list[dict[str, Any]]:
    from ray import tune

    class Progress(tune.Callback):
        def __init__(self, tell: Callable[[], None]) -> None:
            self._tell = tell

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune pickles its callbacks; a progress bar stays with its process

        def on_trial_complete(self, *args: Any, **kwargs: Any) -> None:
            self._tell()

    trainable = tune.with_resources(probe_bucket, {"CPU": 1, "GPU": 1 if cuda else 0})
    tuner = tune.Tuner(
        trainable,
        param_space={"job": tune.grid_search(jobs)},
        tune_config=tune.TuneConfig(reuse_actors=not cuda),
        run_config=tune.RunConfig(
            name="oomptimize", storage_path=str(scratch), verbose=0, callbacks=[Progress(on_trial)]
        ),
    )
    with contextlib.redirect_stdout(None):
        grid = tuner.fit()
    for result in grid:
        if result.error is not None:
            raise ProfileError("a batch-size trial failed", why=str(result.error).strip().splitlines()[-1])
    by_bucket = {result.metrics["bucket"]: result.metrics for result in grid}
    return [by_bucket[job["bucket"]] for job in jobs]


def _refuse(job: dict[str, Any], need: int, budget: int) -> None:
    raise ProfileError(
        f"bucket {job['bucket']} (≤ {job['max_duration_ms']} ms, ≤ {job['max_tokens']} tokens): batch size 1 needs "
        f"{need / 2**30:.2f} GiB of {budget / 2**30:.2f} GiB",
        remedy="lower buckets.max_duration_ms, take a smaller model, or raise oomptimize.device_memory or "
        "memory_fraction",
    )
