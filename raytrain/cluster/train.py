"""Stage `train`: Ray Train runs the training loop on every worker and restarts it after a failure.

A worker gets plain settings and artefact paths, never live objects. It builds everything from them, goes on
from the newest whole checkpoint, and writes metrics itself, since Ray's own reports are throttled.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raytrain.artifacts import atomic_write_bytes
from raytrain.config import Config, check_config
from raytrain.errors import RaytrainError, TrainingError


def train_worker(job: dict[str, Any]) -> None:
    """One rank: build from artefacts, resume, train. Runs in a Ray Train worker."""
    import torch
    import torch.distributed as dist
    from ray import train

    from raytrain.cluster.workspace import Workspace
    from raytrain.convert import load_model
    from raytrain.model.canary import Canary
    from raytrain.model.transfer import initialise_from
    from raytrain.training.checkpoint import CheckpointFolder
    from raytrain.training.loop import TrainingLoop
    from raytrain.training.optim import make_optimizer

    config = check_config(job["config"])
    workspace = Workspace(config, Path(job["run_dir"]))
    context = train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = train.torch.get_device() if job["cuda"] else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(job["threads"])
    torch.manual_seed(config.seed)
    model_config = workspace.model_config()
    model = Canary(model_config).to(device)
    model.encoder.checkpoint_blocks = config.train.activation_checkpointing
    optimizer = make_optimizer(model, config.train)
    checkpoints = CheckpointFolder(workspace.path("checkpoints"), config.train.keep_checkpoints)
    resume = checkpoints.newest()
    if resume is not None:
        model.load_state_dict(resume.load("model", device))
        optimizer.load_state_dict(resume.load("optimizer", device))
    elif config.train.init_from:
        initialise_from(model, workspace.tokenizer.models, load_model(Path(config.train.init_from).expanduser()))
    step = resume.step if resume else 0
    wrapped = model
    if dist.is_initialized() and world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    with (
        _tracker(workspace, job, rank, step) as log,
        _batches(
            workspace,
            _batch_sizes(workspace, device),
            resume.meta["schedule"] if resume else None,
            rank,
            world_size,
            device.type == "cuda",
        ) as batches,
    ):
        TrainingLoop(
            model=model,
            wrapped=wrapped,
            optimizer=optimizer,
            settings=config.train,
            batches=batches,
            checkpoints=checkpoints,
            device=device,
            log=log,
            validate=workspace.validator(rank, world_size),
            checkpoint_meta=job["meta"],
            seed=config.seed,
            sample_rate=model_config.sample_rate,
            rank=rank,
            step=step,
            seconds_before=resume.meta["seconds"] if resume else 0.0,
            label_smoothing=model_config.label_smoothing,
        ).run()


def _batches(
    workspace: Any, sizes: tuple[int, ...], state: dict[str, Any] | None, rank: int, world_size: int, pin_memory: bool
) -> Any:
    """The rank's batches: from the assignment or a stream, read by threads here or by Ray Data elsewhere."""
    from raytrain.cluster.ingest import RayBatches, stream_work

    data = workspace.config.data
    if data.workers == "ray":
        return RayBatches(workspace, sizes, state, rank, world_size, pin_memory)
    work = stream_work(workspace, sizes, state, rank, world_size) if data.stream is not None else None
    return workspace.loader(sizes, state, rank, world_size, pin_memory, work)


def _batch_sizes(workspace: Any, device: Any) -> tuple[int, ...]:
    """Those of the profile for this rank's GPU; where ranks have different GPUs, what fits all of them."""
    import torch
    import torch.distributed as dist

    from raytrain.lengths.profile import choose_profile, least_sizes

    name, gib = None, 0.0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, gib = properties.name, properties.total_memory / 2**30
    known = workspace.profiles()
    devices = [(name, gib)]
    if dist.is_initialized():
        devices = [None] * dist.get_world_size()
        dist.all_gather_object(devices, (name, gib))
    return least_sizes([choose_profile(known, *one) for one in devices])


@contextlib.contextmanager
def _tracker(workspace: Any, job: dict[str, Any], rank: int, step: int) -> Iterator[Callable]:
    """The `log` function of a rank: rank 0 writes metrics.jsonl and MLflow, the others nothing."""
    from raytrain.tracking import JsonLinesTracker, MultiTracker

    if rank != 0:
        yield lambda metrics, step, seconds: None
        return
    path = workspace.path("metrics.jsonl")
    keep_metrics_until(path, step)
    trackers = [JsonLinesTracker(path)]
    if job["mlflow"]:
        from raytrain.tracking.mlflow import MlflowTracker

        trackers.append(MlflowTracker.open(**job["mlflow"]))
    tracker = MultiTracker(*trackers)
    try:
        yield lambda metrics, step, seconds: tracker.log_metrics(metrics, step, seconds)
    finally:
        for one in trackers:
            one.close()


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop lines past the step that training goes on from; they will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError):  # a killed writer leaves half a line
            if json.loads(line)["step"] <= step:
                kept.append(line)
    atomic_write_bytes(path, b"".join(kept))


def run_training(
    config: Config,
    run_dir: Path,
    *,
    meta: dict[str, Any],
    mlflow: dict[str, Any] | None,
    on_metrics: Callable[[dict[str, Any]], None],
) -> None:
    """Train to the end on Ray Train. Raises the worker's own error where it has a readable one."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from raytrain.cluster.ingest import free_cpus

    cuda = config.train.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    if config.train.device == "cuda" and not cuda:
        raise TrainingError("train.device is cuda, but the cluster has no GPU", remedy="set train.device to cpu")
    workers = config.train.num_workers
    cpus = int(ray.cluster_resources().get("CPU", 1))
    if not cuda and workers > cpus:
        raise TrainingError(
            "there are more training workers than CPUs",
            got=workers,
            allowed=cpus,
            remedy="lower train.num_workers",
        )
    if config.data.workers == "ray" and free_cpus(config, workers) < 1:
        raise TrainingError(
            "data.workers is ray, but training leaves no CPU to decode audio",
            got=f"{cpus} CPUs for {workers} training workers",
            allowed="a CPU for each worker and at least one more",
            remedy="add CPU nodes, or unset data.workers",
        )
    plain = config.model_dump(mode="json")
    if config.train.init_from:  # workers have other working folders
        plain["train"]["init_from"] = str(Path(config.train.init_from).expanduser().absolute())
    job = {
        "config": plain,
        "run_dir": str(run_dir),
        "meta": meta,
        "mlflow": mlflow,
        "cuda": cuda,
        "threads": max(1, cpus // workers),
    }
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if cuda else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=cuda,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if cuda else {}), **config.cluster.train_resources},
        ),
        run_config=RunConfig(
            # A finished name would resume past its end; our own checkpoints say where to go on.
            name=f"train-{time.time_ns()}",
            storage_path=str(run_dir / "ray"),
            failure_config=FailureConfig(max_failures=config.train.max_failures),
        ),
    )
    with follow(run_dir / "metrics.jsonl", on_metrics), contextlib.redirect_stdout(None):
        try:
            trainer.fit()
        except Exception as error:
            raise readable(error) from error


def readable(error: BaseException) -> Exception:
    """The `RaytrainError` inside Ray's wrapping, or a `TrainingError` with the last line of its cause."""
    seen = [error]
    for item in seen:
        failures = getattr(item, "worker_failures", None) or {}
        inner = [*failures.values(), item.__cause__, getattr(item, "cause", None)]
        inner.append(getattr(item, "_exc", None))
        seen.extend(one for one in inner if isinstance(one, BaseException) and one not in seen)
    for item in seen:
        if isinstance(item, RaytrainError):
            return item
    lines = [line for line in str(seen[-1]).strip().splitlines() if line.strip()]
    return TrainingError("training failed", why=lines[-1] if lines else type(error).__name__)


@contextlib.contextmanager
def follow(path: Path, on_line: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `on_line` for each new line of a JSON-lines file while the body runs."""
    stopped = threading.Event()

    def watch() -> None:
        seen = -1
        while True:
            last = stopped.wait(0.5)
            for line in path.read_bytes().splitlines() if path.exists() else []:
                with contextlib.suppress(ValueError, KeyError):
                    item = json.loads(line)
                    if item["step"] > seen or (item["step"] == seen and "wer" in item):
                        on_line(item)
                    seen = max(seen, item["step"])
            if last:
                return

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(timeout=5)
