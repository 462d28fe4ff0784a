"""A small training loop without Ray, and what counts the places where it would wait for a GPU."""

from dataclasses import replace

import torch
from tiny_models import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from raytrain.data.assignment import Row
from raytrain.data.batch import LoadedStep, SpeechBatch
from raytrain.lengths.schedule import ScheduleState, StepPlan
from raytrain.model.canary import Canary
from raytrain.training.checkpoint import CheckpointFolder
from raytrain.training.hooks import LoopHooks
from raytrain.training.loop import TrainingLoop
from raytrain.training.optim import make_optimizer
from raytrain.training.settings import TrainSettings
from raytrain.training.state import RankShares, TrainState

MODEL = replace(TINY, ctc_head=True)
SETTINGS = TrainSettings(
    ctc_weight=0.5,
    warmup_steps=2,
    learning_rate=1e-3,
    max_steps=6,
    log_every_steps=2,
    validate_every_steps=2,
    checkpoint_every_steps=100,
    max_skipped_steps=3,
)


def micro_batch(number: int, broken: bool = False) -> LoadedStep:
    batch = SpeechBatch.synthetic(3, 1200, 14, vocab=40, device="cpu")
    if broken:
        batch.audio[0, 100] = float("nan")
    row = Row(f"/audio/{number}.wav", 0, 1200, "text", "en", 5, (1, 2, 3))
    return LoadedStep(batch, StepPlan(1, 0, (3,), 0), ScheduleState(0, (number, 0)), 0, rows=[row] * 3)


def make_loop(tmp_path, batches, settings=SETTINGS, model=None, *, average=None, shares=None, flops=None, **hooks):
    """A loop and the list that its log lines go to; `hooks` are those of `LoopHooks`."""
    torch.manual_seed(0)
    model = model or Canary(MODEL)
    logged = []
    loop = TrainingLoop(
        state=TrainState(model, model, make_optimizer(model, settings), average),
        settings=settings,
        batches=batches,
        checkpoints=CheckpointFolder(tmp_path / "checkpoints", settings.keep_checkpoints, settings.keep_best),
        device=torch.device("cpu"),
        checkpoint_meta={},
        seed=1,
        sample_rate=16000,
        hooks=LoopHooks(log=lambda metrics, step, seconds: logged.append({"step": step, **metrics}), **hooks),
        shares=shares or RankShares(),
        flops=flops,
    )
    return loop, logged


class Syncs(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: a tensor's value read as a number, or a shape that depends on
    values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
