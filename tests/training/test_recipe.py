"""Memory traces, the step's loss over ranks, checkpoints, error counts."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_models import TINY

from raytrain.data.batch import SpeechBatch
from raytrain.errors import CheckpointError, TrainingError
from raytrain.evaluation.error_counts import ErrorCounts, count_errors
from raytrain.model.canary import Canary
from raytrain.training.checkpoint import CheckpointFolder
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.optim import learning_rate, make_optimizer
from raytrain.training.settings import TrainSettings
from raytrain.training.step import train_step

MODEL = replace(TINY, dropout=0.0, ctc_head=True)
SETTINGS = TrainSettings(ctc_weight=0.5, warmup_steps=10, learning_rate=1e-3)


def test_activation_checkpointing_saves_memory_and_changes_nothing():
    config = replace(MODEL, encoder_layers=4, dropout=0.1)
    settings = replace(SETTINGS, activation_checkpointing="full")
    tracers = [StepTracer(config, chosen, device_type="cpu") for chosen in (settings, SETTINGS)]
    peaks = [tracer.trace(4, 4000, 20).peak_bytes for tracer in tracers]
    saved = 1 - peaks[0] / peaks[1]
    assert saved > 0.1
    results = []
    for checkpointing in ("none", "full"):
        torch.manual_seed(0)
        model = Canary(config).train()
        model.set_checkpointing(checkpointing)
        optimizer = make_optimizer(model, SETTINGS)
        batch = SpeechBatch.synthetic(2, 1500, 12, vocab=40, device="cpu")
        for _ in range(2):
            train_step(model, [batch], optimizer, SETTINGS, precision="fp32")
        results.append(model.state_dict())
    # Weights, and the running statistics of batch norm, which must not count the second forward pass.
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_steps_lower_the_loss_of_a_batch():
    torch.manual_seed(0)
    model = Canary(MODEL).train()
    optimizer = make_optimizer(model, SETTINGS)
    batch = SpeechBatch.synthetic(4, 1500, 18, vocab=40, device="cpu")
    losses = [train_step(model, [batch], optimizer, SETTINGS, precision="fp32").sums for _ in range(15)]
    first, last = (float(sums[0] / sums[3]) for sums in (losses[0], losses[-1]))
    assert last < 0.8 * first
    assert int(losses[0][3]) == 4 * 17


def test_learning_rate_warms_up_and_decays_with_the_inverse_square_root():
    settings = TrainSettings(learning_rate=1.0, warmup_steps=100, min_learning_rate=0.2)
    assert learning_rate(50, settings) == pytest.approx(0.5)
    assert learning_rate(100, settings) == 1.0
    assert learning_rate(400, settings) == pytest.approx(0.5)
    assert learning_rate(10**6, settings) == 0.2


def save(folder: CheckpointFolder, step: int) -> None:
    folder.save(step, {"model": {"w": torch.full((3,), float(step))}, "optimizer": {}}, {"schedule": {}, "seconds": 1})


def test_checkpoints_keep_the_newest_and_the_best_and_pass_over_broken_ones(tmp_path):
    folder = CheckpointFolder(tmp_path / "c", keep=2)
    assert folder.newest() is None
    for step, wer in ((10, 0.5), (20, 0.2), (30, 0.4), (40, 0.3)):
        save(folder, step)
        folder.mark_best(step, wer)
    save(folder, 50)
    assert sorted(path.name for path in folder.folder.glob("step_*")) == [
        "step_00000020",
        "step_00000040",
        "step_00000050",
    ]
    assert folder.best().step == 20
    assert folder.newest().load("model")["w"].tolist() == [50.0] * 3
    with open(folder.folder / "step_00000050" / "model.pt", "r+b") as file:
        file.truncate(100)
    assert folder.newest().step == 40
    (folder.folder / "step_00000040" / "meta.json").unlink()
    assert folder.newest().step == 20


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    checkpoint = folder.newest()
    torch.save({"w": Evil()}, checkpoint.folder / "model.pt")
    assert folder.newest() is None  # its hash is not what was written
    with pytest.raises(CheckpointError, match="can't be read"):
        checkpoint.load("model")
    shutil.rmtree(tmp_path)


def test_error_counts_add_up():
    counts = count_errors(["a b c", "d"], ["a x c c", ""])
    assert counts == ErrorCounts(substitutions=1, deletions=1, insertions=1, reference_length=4, utterances=2)
    assert counts.rate == 0.75
    assert (counts + counts).rate == 0.75 and ErrorCounts().rate is None
    assert count_errors(["abc"], ["abd"], unit="character").rate == pytest.approx(1 / 3)


def test_settings_name_all_problems():
    with pytest.raises(ValueError, match="precision must be one of auto, fp32, bf16.*max_steps must be from 1"):
        TrainSettings(max_steps=0, precision="int4")
    assert issubclass(CheckpointError, TrainingError)
