"""Stage `train`: Ray Train runs the training loop on every worker and restarts it after a failure.

A worker gets plain settings and artefact paths, never live objects. It builds everything from them, goes on
from the newest whole checkpoint, and writes metrics itself, since Ray's own reports are throttled.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.cluster.failures import GiveUp, cause_of_kind, decide, killed_for_memory, readable, stalled
from raytrain.cluster.gpus import backend
from raytrain.cluster.placement import Placement, total
from raytrain.cluster.reservations import free_noted, free_orphans, note_reservation
from raytrain.cluster.room import Workers, choose_workers, describe_worker, find_room, trains_on_gpus, waiting_for
from raytrain.config import Config, check_config
from raytrain.errors import CheckpointError, RaytrainError, TrainingError
from raytrain.model.device import Device, worker_device
from raytrain.storage.artifacts import atomic_write_bytes, file_id, lines_of, read_state
from raytrain.storage.filesystem import absolute
from raytrain.storage.leftovers import RAY_FOLDER
from raytrain.storage.run_store import RunStore
from raytrain.tracking import metrics_of, read_metrics
from raytrain.waiting import repeating


def train_worker(job: dict[str, Any]) -> None:
    """One rank: build from artefacts, resume, train. Runs in a Ray Train worker.

    Ray Train starts again after any failure. Damaged rows would end each attempt: the first one leaves a note, at which
    the second comes back, and `run_training` says why.
    """
    from raytrain.data.assignment import DamagedPartError

    store = RunStore(job["location"])
    if any(_from_all_ranks(store.look(_GAVE_UP).exists())):
        return
    try:
        _train(job)
    except Exception as error:
        if (damage := cause_of_kind(error, DamagedPartError)) is not None:
            note_the_end(store, damage)
        raise


def note_the_end(store: RunStore, error: RaytrainError, kind: type[TrainingError] = TrainingError) -> None:
    """Leave a note that training ended with an error that another attempt would meet again, told as one of a `kind`."""
    _tell(store, _GAVE_UP, {**error.to_dict(), "kind": kind.__name__})


@dataclass(frozen=True)
class GaveUpNote:
    """The parts of the error with which training gave up, see `RaytrainError.to_dict`."""

    what: str
    got: str | None = None
    allowed: str | None = None
    why: str | None = None
    remedy: str | None = None
    kind: str = TrainingError.__name__


def _noted_end(store: RunStore) -> TrainingError | None:
    path = store.look(_GAVE_UP)
    return _gave_up(path) if path.exists() else None


def _gave_up(path: Path) -> TrainingError:
    note = read_state(path, GaveUpNote)
    if note is None:
        return TrainingError(
            "training gave up",
            why=f"its reason in {path} can't be read",
            remedy="see the messages above, and train again",
        )
    kind = CheckpointError if note.get("kind") == CheckpointError.__name__ else TrainingError
    return kind(**{name: note.get(name) for name in ("what", "got", "allowed", "why", "remedy")})


def _train(job: dict[str, Any]) -> None:
    import torch
    from ray import train

    from raytrain.lengths.schedule import shares_of
    from raytrain.model.canary import Canary
    from raytrain.model.cost import peak_flops, training_flops
    from raytrain.run_folder.workspace import Workspace
    from raytrain.training.average import WeightAverage
    from raytrain.training.faults import SAVING, Watchdog, kills_for_memory
    from raytrain.training.hooks import LoopHooks
    from raytrain.training.limits import GaveUp
    from raytrain.training.loop import TrainingLoop
    from raytrain.training.optim import make_optimizer
    from raytrain.training.parallel import is_sharded, parallel_model
    from raytrain.training.state import Progress, RankShares, TrainState
    from raytrain.training.step import resolve_precision
    from raytrain.training.window import FlopsEstimate

    config = check_config(job["config"])
    workspace = Workspace(config, job["location"])
    store = workspace.store
    context = train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    shares = shares_of(rank, world_size, job["num_shares"])
    worker = worker_device(job["cuda"], lambda: train.torch.get_device().index)
    device = worker.torch
    if device.type == "cpu":
        torch.set_num_threads(max(1, job["cpus"] // world_size))
    torch.manual_seed(config.seed)
    model_config = workspace.model_config()
    model = Canary(model_config).to(device)
    model.encoder.checkpoint_blocks = config.train.activation_checkpointing
    checkpoints = workspace.checkpoints(mirror_of(config))
    notes = _fault_notes(store, job["profile_id"], rank)
    deaths = _from_all_ranks((kills_for_memory(), notes.take_marks()))
    if rank == 0:
        _look_at_faults(store)
        notes.learn_from_deaths(dict(kills for kills, _ in deaths), [mark for _, marks in deaths for mark in marks])
        note_reservation(store)
    try:
        resume = _agreed_checkpoint(checkpoints, rank, job["meta"])
    except GaveUp as error:
        if rank == 0:
            note_the_end(store, error, CheckpointError)
        return
    _look_at_faults(store)
    _load_weights(resume, model, workspace, device)
    sharded = is_sharded(config.train, world_size)
    wrapped = parallel_model(model, config.train, world_size, device)
    optimizer = make_optimizer(model, config.train)
    average = WeightAverage(model, config.train.average_decay) if config.train.average_decay is not None else None
    state = TrainState(model, wrapped, optimizer, average, sharded)
    if resume is not None:
        state.load(resume, device)
    meta = resume.meta if resume else {}
    flops = training_flops(model_config)
    sizes = _batch_sizes(workspace, worker, notes)
    with (
        _tracker(workspace, job, rank, resume.step if resume else 0) as log,
        _batches(workspace, sizes, meta.get("schedule"), shares, job["num_shares"], worker.pins_memory) as batches,
        notes.marking() as mark,
        Watchdog(config.train.stall_minutes * 60, notes.note_stall) as watchdog,
    ):
        loop = TrainingLoop(
            state=state,
            settings=config.train,
            batches=batches,
            checkpoints=checkpoints,
            device=device,
            checkpoint_meta=job["meta"],
            seed=config.seed,
            sample_rate=model_config.sample_rate,
            hooks=LoopHooks(
                log=log,
                validate=workspace.validator(rank, world_size, notes, watchdog.beat, mark),
                before_step=lambda step, loaded: mark(step, loaded.plan.bucket, max(loaded.plan.sizes)),
                before_saving=lambda: mark(None, SAVING, 0),
                on_activity=watchdog.beat,
                on_out_of_memory=lambda bucket, size: notes.lower(bucket, size, "out of memory in a training step"),
                should_save=_Preemption(),
                should_stop=workspace.path(STOP).exists,
            ),
            progress=Progress.of_checkpoint(resume),
            shares=RankShares(rank, shares, job["num_shares"]),
            label_smoothing=model_config.label_smoothing,
            precision=resolve_precision(config.train.precision, worker.kind),
            flops=FlopsEstimate(
                lambda batch: flops(batch.audio_lengths * 1000 / model_config.sample_rate / 80, batch.token_lengths),
                None if worker.is_emulated else peak_flops(worker.name),
            ),
            max_replaced=config.data.max_bad_fraction,
        )
        try:
            loop.run()
        except GaveUp as error:
            # Ray Train would start again; coming back says that training is over, and `run_training` says why.
            if rank == 0:
                note_the_end(store, error)
        finally:
            workspace.share_quarantine()
        if rank == 0:
            checkpoints.flush()


def mirror_of(config: Config) -> Any:
    """Where copies of the checkpoints are kept, None where they are not."""
    from raytrain.training.mirror import CheckpointMirror

    path = config.train.storage_path
    return CheckpointMirror(absolute(f"{path.rstrip('/')}/{config.name}/checkpoints")) if path else None


def _fault_notes(store: RunStore, profile_id: str, rank: int = 0) -> Any:
    from raytrain.training.faults import FaultNotes

    def name(path: Path) -> str:
        return f"{_FAULTS}/{path.name}"

    return FaultNotes(
        store.local / _FAULTS,
        profile_id,
        rank,
        on_written=lambda path: store.share(name(path)),
        on_removed=lambda path: store.discard(name(path)),
    )


def _look_at_faults(store: RunStore) -> None:
    """Have what other machines noted here too."""
    from raytrain.training.faults import KILLED_FOR_MEMORY

    if store.is_remote:
        store.look(f"{_FAULTS}/{KILLED_FOR_MEMORY}")
        store.look_at_all(_FAULTS, "*.json")


def _tell(store: RunStore, name: str, body: Any) -> None:
    """Write a small file for the driver."""
    atomic_write_bytes(store.local / name, json.dumps(body, indent=1).encode())
    store.share(name)


_FAULTS = "faults"
STOP = "stop"  # training ends, as at its last step, soon after a file of this name is in its run folder
_GAVE_UP = "gave_up.json"
_LOWERED = "batch_profile_lowered.json"


def _from_all_ranks(value: Any) -> list[Any]:
    """What each rank has, in their order."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _agreed_checkpoint(checkpoints: Any, rank: int, meta: dict[str, Any]) -> Any:
    """The newest whole checkpoint, the same one on all ranks. Raises `GaveUp` on all of them where it is of another
    lineage than `meta` names: it would be the same after a restart."""
    from ray.train.collective import broadcast_from_rank_zero

    from raytrain.training.limits import GaveUp

    lineage = meta.get("ids", {}).get("lineage")
    found, refusal = checkpoints.newest() if rank == 0 else None, None
    try:
        if found is not None:
            found.check_lineage(lineage)
    except CheckpointError as error:
        refusal = error.to_dict()
    step, refusal = broadcast_from_rank_zero((found.step if found else None, refusal))
    if refusal is not None:
        raise GaveUp(**refusal)
    if rank == 0 or step is None:
        return found
    checkpoint = checkpoints.at(step)
    checkpoint.check_lineage(lineage)
    return checkpoint


def _load_weights(resume: Any, model: Any, workspace: Any, device: Any) -> None:
    from raytrain.model.formats.transfer import initialise_from
    from raytrain.training.conversion import load_model

    init_from = workspace.config.train.init_from
    if resume is not None:
        model.load_state_dict(resume.load("model", device))
    elif init_from:
        initialise_from(model, workspace.tokenizer.models, load_model(Path(init_from).expanduser()))


class _Preemption:
    """Whether a node of this run is about to be taken away: true once for each such notice. All ranks must ask."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self) -> bool:
        from ray import train

        notice = train.get_preemption_info()
        nodes = set(notice.preempted_node_ids) if notice is not None else set()
        new, self._known = nodes - self._known, self._known | nodes
        return bool(new)


def _batches(
    workspace: Any,
    sizes: tuple[int, ...],
    state: dict[str, Any] | None,
    shares: range,
    num_shares: int,
    pin_memory: bool,
) -> Any:
    """The rank's batches: from the assignment or a stream, read by threads here or by Ray Data elsewhere."""
    from ray import train

    from raytrain.cluster.ingest import RayBatches, stream_work

    context, data = train.get_context(), workspace.config.data
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if data.workers == "ray":
        return RayBatches(workspace, sizes, state, shares, num_shares, world_size, pin_memory)
    work = None
    if data.stream is not None:
        work = stream_work(workspace, sizes, state, shares, num_shares, rank, world_size)
    return workspace.loader(sizes, state, shares, num_shares, pin_memory, work, context.get_local_world_size())


def _batch_sizes(workspace: Any, worker: Device, notes: Any) -> tuple[int, ...]:
    """Those of the profile for this rank's GPU, less what notes took off; where ranks have different GPUs, what fits
    all of them."""
    from ray import train

    from raytrain.lengths.profile import choose_profile, least_sizes

    profiles = workspace.profiles()
    devices = _from_all_ranks((worker.name or None, worker.total_bytes / 2**30))
    sizes = least_sizes([choose_profile(profiles, name, gib) for name, gib in devices])
    lowered = notes.lowered(sizes)
    if lowered != tuple(sizes) and train.get_context().get_world_rank() == 0:
        body = {"batch_sizes": list(lowered), "instead_of": list(sizes), "notes": notes.reasons()}
        _tell(workspace.store, _LOWERED, body)
    return lowered


@contextlib.contextmanager
def _tracker(workspace: Any, job: dict[str, Any], rank: int, step: int) -> Iterator[Callable]:
    """The `log` function of a rank: rank 0 writes metrics.jsonl and MLflow, the others nothing."""
    from raytrain.tracking import JsonLinesTracker, MultiTracker

    if rank != 0:
        yield lambda metrics, step, seconds: None
        return
    store, path = workspace.store, workspace.store.own(METRICS)
    if store.is_remote:
        path.unlink(missing_ok=True)
        if (known := store.look(METRICS)).exists():
            atomic_write_bytes(path, known.read_bytes())
    keep_metrics_until(path, step)
    trackers = [JsonLinesTracker(path)]
    if job["mlflow"]:
        from raytrain.tracking.mlflow import MlflowTracker

        trackers.append(MlflowTracker.open(**job["mlflow"]))
        if path.exists():
            trackers[-1].catch_up(read_metrics(path))
    tracker = MultiTracker(*trackers)
    with store.sharing(METRICS, path):
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
    for line in lines_of(path):
        metrics = metrics_of(line)  # a killed writer leaves half a line
        if metrics is not None and metrics["step"] <= step:
            kept.append(line)
    atomic_write_bytes(path, b"".join(kept))


def run_training(
    config: Config,
    location: Path | str,
    *,
    meta: dict[str, Any],
    mlflow: dict[str, Any] | None,
    on_metrics: Callable[[dict[str, Any]], None],
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Train to the end in the run folder at `location`, a path or a URI. Raises `ManifestError` for dev manifests that
    nothing can be scored on.

    Starts again also where Ray Train gives up for good though training could go on: after a step that ran out of
    memory, and after a worker that Ray's memory monitor killed. Raises the worker's own error where it has a readable
    one.
    """
    from raytrain.run_folder.workspace import Workspace

    if config.data.dev:
        Workspace(config, location).checked_rows("dev", config.train.max_validation_utterances)
    store = RunStore(location, config.run.cache_size)
    job = _job(config, store, meta, mlflow)
    notes = _fault_notes(store, job["profile_id"])
    for name in (_GAVE_UP, _LOWERED, STOP):
        store.discard(name)
    left, each = config.train.max_failures, describe_worker(config, job["cuda"])
    room = find_room(config, job["cuda"])
    workers = choose_workers(config.train.num_workers, room, each)
    if line := waiting_for(workers, room, each):
        say(f"  {line}; for {config.train.stall_minutes:g} minutes at most")
    with _without_ray_folder(store), follow(store, METRICS, on_metrics):
        while True:
            _look_at_faults(store)
            known, started = len(notes.reasons()), time.time()
            try:
                with contextlib.redirect_stdout(None), _health_check(config):
                    _fit(_trainer(config, store, job, workers, max_failures=left))
                break
            except Exception as error:
                _look_at_faults(store)
                lowered = notes.reasons()[known:]
                killed = killed_for_memory(error)
                if killed:
                    notes.note_kill_for_memory()
                decision = decide(killed, lowered, left)
                if isinstance(decision, GiveUp):
                    stalls = notes.stalls(started)
                    if stalls:
                        raise stalled(stalls, config) from error
                    raise _noted_end(store) or readable(error) from error
                free_noted(store)
                left = decision.attempts_left
                say(f"  training starts again: {decision.because}")
    store.look(_LOWERED)
    if (end := _noted_end(store)) is not None:
        raise end


METRICS = "metrics.jsonl"


@contextlib.contextmanager
def _without_ray_folder(store: RunStore) -> Iterator[None]:
    """Ray Train keeps notes of each training, of which nothing goes on; they are gone before and after it."""
    store.clear(RAY_FOLDER)
    try:
        yield
    finally:
        with contextlib.suppress(RaytrainError):
            store.clear(RAY_FOLDER)


@contextlib.contextmanager
def _health_check(config: Config) -> Iterator[None]:
    """Let Ray Train give up sooner than after its ten minutes on a worker that does not even answer."""
    name = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
    kept = os.environ.get(name)
    os.environ.setdefault(name, str(min(600.0, config.train.stall_minutes * 60)))
    try:
        yield
    finally:
        if kept is None:
            del os.environ[name]


def _job(config: Config, store: RunStore, meta: dict[str, Any], mlflow: dict[str, Any] | None) -> dict[str, Any]:
    """What a worker gets. Raises `TrainingError` where the cluster can't train so."""
    from raytrain.cluster.ingest import free_cpus

    cuda = trains_on_gpus(config)
    cpus = int(total(Placement.train(config.cluster).nodes(), "CPU"))
    if config.data.workers == "ray" and free_cpus(config, config.train.most_workers) < 1:
        raise TrainingError(
            "data.workers is ray, but training leaves no CPU to decode audio",
            got=f"{cpus} CPUs for {config.train.most_workers} training workers",
            allowed="a CPU for each worker and at least one more",
            remedy="add CPU nodes, or unset data.workers",
        )
    plain = config.model_dump(mode="json")
    for name in ("init_from", "storage_path"):  # workers have other working folders
        if plain["train"][name]:
            plain["train"][name] = absolute(plain["train"][name])
    return {
        "config": plain,
        "location": store.location,
        "meta": meta,
        "mlflow": mlflow,
        "cuda": cuda,
        "backend": backend(config, cuda),
        "cpus": cpus,
        "num_shares": config.train.most_workers * config.train.accumulate,
        "profile_id": file_id(store.local / "batch_profile.json"),
    }


def _trainer(config: Config, store: RunStore, job: dict[str, Any], workers: Workers, max_failures: int) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):
        """Ray Train's own handler swallows Ctrl-C while workers wait for room, and ends the process with 0 at last."""

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

    cuda = job["cuda"]
    return Trainer(
        train_worker,
        train_loop_config=job,
        torch_config=TorchConfig(
            backend=job["backend"],
            # A rank that waits for a hung one must not end before the hung one's watchdog has said so.
            timeout_s=max(600, int(config.train.stall_minutes * 60) + 60),
        ),
        scaling_config=ScalingConfig(
            num_workers=workers,
            **Placement.train(config.cluster).scaling(gpus=1.0 if cuda else 0.0),
        ),
        run_config=RunConfig(
            # A finished name would resume past its end; our own checkpoints say where to go on.
            name=f"train-{time.time_ns()}",
            storage_path=store.place(RAY_FOLDER),
            # Ray Train waits a minute for room for its workers, and without a limit for ever.
            failure_config=FailureConfig(
                max_failures=max_failures, controller_failure_limit=max(1, round(config.train.stall_minutes))
            ),
        ),
    )


def _fit(trainer: Any) -> None:
    """Train to the end; Ctrl-C ends the workers and is raised as any `KeyboardInterrupt`."""
    import ray

    try:
        trainer.fit()
    except KeyboardInterrupt:
        with contextlib.suppress(ray.exceptions.RayError, AttributeError):  # without a controller nothing has begun
            ray.get(trainer.controller.abort.remote(), timeout=_ABORT_SECONDS)
        with contextlib.suppress(ray.exceptions.RayError):
            free_orphans(_DEATH_SECONDS)
        raise


_DEATH_SECONDS = 1.0
_ABORT_SECONDS = 3.0  # a stop has ten for everything


@contextlib.contextmanager
def follow(store: RunStore, name: str, on_line: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `on_line` for each new line of a JSON-lines file of the run while the body runs."""
    seen = (-1, False)  # a step's validation comes after its other numbers

    def look() -> None:
        nonlocal seen
        path = store.local / name
        with contextlib.suppress(RaytrainError):  # there again the next time
            path = store.look(name)
        for line in lines_of(path):
            item = metrics_of(line)
            if item is None:
                continue
            position = (item["step"], "val_loss" in item)
            if position > seen:
                on_line(item)
                seen = position

    with repeating(look, 3.0 if store.is_remote else 0.5):
        yield
