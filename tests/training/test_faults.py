"""Training that fails and resumes: killed, hung and starved workers, non-finite steps, fewer workers."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from conftest import copied
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from raytrain.cluster.training_job import make_job
from raytrain.cluster.training_worker import train_worker
from raytrain.config import Config
from raytrain.console import Console
from raytrain.errors import TrainingError
from raytrain.run_folder.training_plan import plan_training
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.pipeline import run_pipeline
from raytrain.training.checkpoint import CheckpointFolder

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(600)]
TRAIN = {
    "max_steps": 12,
    "checkpoint_every_steps": 4,
    "validate_every_steps": 12,
    "average_decay": 0.9,
    "max_failures": 3,
}


def run(config, *names: str) -> list[str]:
    return run_pipeline(config, Console(quiet=True), names)


@pytest.fixture
def faulty(copy_of):
    """`faulty(name, **train)`: the prepared run in a separate folder, with the settings of all trainings here and
    `train`."""
    return lambda name, **train: copy_of(name, train={**TRAIN, **train})


def train_in_turn(*configs: Config) -> None:
    """Stage `train` for each of these runs, with the same worker processes for all: they start once."""
    jobs = []
    for config in configs:
        workspace = Workspace(config, config.run_dir)
        jobs.append(make_job(plan_training(workspace), workspace.store))
        checkpoints = config.run_dir / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        (checkpoints / "lineage.json").write_text(json.dumps({"lineage": jobs[-1].meta["ids"]["lineage"]}))

    def train_all(settings: dict) -> None:
        for job in settings["jobs"]:
            train_worker(job)

    TorchTrainer(
        train_all,
        train_loop_config={"jobs": jobs},
        scaling_config=ScalingConfig(num_workers=configs[0].train.least_workers),
        run_config=RunConfig(storage_path=str(configs[0].run_dir / "ray")),
    ).fit()


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory, s3) -> dict[str, Config]:
    """Uninterrupted runs by name."""
    root = tmp_path_factory.mktemp("trained")

    def run_of(folder: str, **train) -> Config:
        return copied(prepared, root / folder, train={**TRAIN, **train})

    longer = {"max_steps": 30, "learning_rate": 3e-4}
    two_workers = {
        "undisturbed": run_of("undisturbed"),
        "two": run_of("two", **longer),
        "sharded": run_of("sharded", shard=True, max_steps=8),
        "unsharded": run_of("sharded", max_steps=10),
        "sharded again": run_of("sharded", shard=True),
        "lost": run_of("lost", max_steps=8, keep_checkpoints=1, storage_path=f"{s3}/storage"),
    }
    single_worker = {
        "one": run_of("one", num_workers=1, accumulate=2, **longer),
        "elastic": run_of("elastic", num_workers=[1, 2], max_steps=6),
    }
    train_in_turn(*two_workers.values())
    train_in_turn(*single_worker.values())
    return two_workers | single_worker


@pytest.fixture(scope="module")
def undisturbed(trained):
    """Metrics of every step, and the last checkpoint, of an uninterrupted run."""
    config = trained["undisturbed"]
    return steps_of(config), CheckpointFolder(config.run_dir / "checkpoints").newest()


def steps_of(config) -> dict[int, tuple[float, ...]]:
    """Loss, its parts, gradient norm and learning rate by step."""
    names = ("loss", "ce_loss", "ctc_loss", "grad_norm", "lr", "batch_size", "bucket")
    lines = map(json.loads, (config.run_dir / "metrics.jsonl").read_bytes().splitlines())
    return {line["step"]: tuple(line[name] for name in names) for line in lines if "loss" in line}


@contextlib.contextmanager
def signalling(config, choose, number: int = signal.SIGKILL):
    """Send a signal to the worker process of a rank each time that `choose(rank, step, bucket, size)` is true for its
    activity. Returns the list of killed activities."""
    hit, stopped, seen = [], threading.Event(), set()

    def watch() -> None:
        while not stopped.wait(0.001):
            for path in (config.run_dir / "faults").glob("doing-*"):
                with contextlib.suppress(OSError, ValueError):
                    pid, step, bucket, size = map(int, path.read_bytes().split()[:4])
                    rank = int(path.name.removeprefix("doing-"))
                    if (pid, step) not in seen and choose(rank, step, bucket, size):
                        seen.add((pid, step))
                        os.kill(pid, number)
                        hit.append((rank, step, bucket, size))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield hit
    finally:
        stopped.set()
        thread.join()


def test_losses_are_the_same_bit_for_bit_wherever_workers_were_killed(faulty, undisturbed):
    config = faulty("killed")
    # Just after a checkpoint, and in the last step.
    kill_points = {(0, 5), (1, 12)}

    def once(rank, step, bucket, size):
        if (rank, step) in kill_points:
            kill_points.remove((rank, step))
            return True
        return False

    with signalling(config, once) as hit:
        run(config, "train")
    assert [(rank, step) for rank, step, _, _ in hit] == [(0, 5), (1, 12)]
    steps, last = undisturbed
    assert steps_of(config) == steps
    newest = CheckpointFolder(config.run_dir / "checkpoints").newest()
    assert newest.step == last.step == 12
    for part in ("model", "average"):
        ours, theirs = newest.load(part), last.load(part)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert newest.meta["schedule"] == last.meta["schedule"]
    assert newest.meta["audio_seconds"] == last.meta["audio_seconds"]


def test_one_worker_that_accumulates_learns_what_two_workers_learn(trained):
    from_one_worker, from_two_workers = trained["one"], trained["two"]
    expected, learned = steps_of(from_two_workers), steps_of(from_one_worker)
    assert len(learned) == 30
    for step, values in learned.items():
        assert values[:3] == pytest.approx(expected[step][:3], abs=1e-5), f"step {step}"
        assert values[4:] == expected[step][4:]
    models = [
        CheckpointFolder(config.run_dir / "checkpoints").newest().load("model")
        for config in (from_one_worker, from_two_workers)
    ]
    norms = [name.removesuffix("batch_norm.running_mean") for name in models[0] if name.endswith("running_mean")]
    assert norms
    for name in norms:
        ours, theirs = (
            # The bias before a batch norm has no gradient but rounding, which Adam makes steps of.
            (
                model[f"{name}batch_norm.running_mean"] - model[f"{name}depthwise_conv.bias"],
                model[f"{name}batch_norm.running_var"],
            )
            for model in models
        )
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(ours[1], theirs[1], atol=1e-6, rtol=1e-4)


def test_training_resumes_with_fewer_workers(trained, undisturbed):
    # One worker took both shares of the first steps, as where there was no room for two.
    config = trained["elastic"].model_copy(update={"train": replace(trained["elastic"].train, max_steps=12)})
    run(config, "train")
    steps, _ = undisturbed
    assert {step: values[4:] for step, values in steps_of(config).items()} == {
        step: values[4:] for step, values in steps.items()
    }
    for step, values in steps_of(config).items():
        assert values[:3] == pytest.approx(steps[step][:3], abs=1e-5), f"step {step}"


def test_a_bucket_that_takes_too_much_host_memory_gets_smaller_batches(faulty):
    config = faulty("starved", max_steps=8, checkpoint_every_steps=2)
    sizes = json.loads((config.run_dir / "batch_profile.json").read_bytes())["body"]["profiles"][0]["batch_sizes"]

    # As when memory runs out: workers are killed in full batches of one bucket, with a recorded reason.
    first: list[int] = []

    def too_large(rank, step, bucket, size):
        if size < sizes[bucket] or rank:
            return False
        first[:] = first or [bucket]
        if bucket == first[0]:
            (config.run_dir / "faults" / "killed-for-memory").touch()
            return True
        return False

    with signalling(config, too_large) as hit:
        run(config, "train")
    assert len(hit) == 1
    bucket, size = hit[0][2:]
    body = json.loads((config.run_dir / "batch_profile_lowered.json").read_bytes())
    assert body["batch_sizes"][bucket] < size
    assert "ran out of host memory" in body["notes"][0]
    assert max(steps_of(config)) == 8


def test_a_hung_worker_ends_training_with_a_clear_error(faulty):
    config = faulty("hung", stall_minutes=0.2, max_failures=0)
    with (
        signalling(config, lambda rank, step, bucket, size: (rank, step) == (1, 6), signal.SIGSTOP) as hit,
        pytest.raises(TrainingError, match=r"no progress for 0.2 minutes.*worker 0: in step 6"),
    ):
        run(config, "train")
    assert hit
    assert CheckpointFolder(config.run_dir / "checkpoints").newest().step == 4  # to resume from


def test_nonfinite_steps_are_skipped_and_too_many_end_training(faulty):
    config = faulty("nan", learning_rate=100, weight_decay=100, max_skipped_steps=3, max_steps=40)
    started = time.monotonic()
    with pytest.raises(TrainingError, match="3 steps in a row were not finite.*max_skipped_steps.*bad_steps"):
        run(config, "train")
    assert time.monotonic() - started < 60  # and is not retried, which would fail the same way
    notes = sorted((config.run_dir / "bad_steps").glob("*.json"))
    assert len(notes) >= 6  # of both ranks
    rows = json.loads(notes[0].read_bytes())["rows"]
    assert rows and all(os.path.exists(row["audio_path"]) for row in rows)


def test_training_resumes_from_copies_in_s3_if_the_run_folder_is_lost(trained, undisturbed, s3):
    import pyarrow.fs

    config = trained["lost"].model_copy(update={"train": replace(trained["lost"].train, max_steps=12)})
    copies = f"{s3.removeprefix('s3://')}/storage/tiny/checkpoints"
    s3_files = pyarrow.fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"])
    names = [info.base_name for info in s3_files.get_file_info(pyarrow.fs.FileSelector(copies))]
    assert sorted(names) == ["best.json", "step_00000008"]  # nothing is left of step 4
    shutil.rmtree(config.run_dir / "checkpoints")
    run(config, "train")
    steps, last = undisturbed
    assert steps_of(config) == {step: steps[step] for step in range(9, 13)}
    newest = CheckpointFolder(config.run_dir / "checkpoints").newest()
    assert all(torch.equal(newest.load("model")[name], value) for name, value in last.load("model").items())


def test_a_sharded_run_learns_the_same_and_either_kind_resumes_the_other(trained, undisturbed):
    config = trained["sharded"]
    steps, last = undisturbed
    found = steps_of(config)
    assert sorted(found) == sorted(steps)
    for step, values in found.items():
        assert values[:4] == pytest.approx(steps[step][:4], rel=1e-4), f"step {step}"
    newest = CheckpointFolder(config.run_dir / "checkpoints").newest()
    for part in ("model", "average"):
        for name, value in last.load(part).items():
            if name.endswith("depthwise_conv.bias"):
                continue  # batch norm subtracts it: its gradient is rounding alone, which AdamW scales up
            torch.testing.assert_close(newest.load(part)[name], value, atol=2e-3, rtol=1e-2, msg=name)
