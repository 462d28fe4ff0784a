"""The training loop's callbacks: for metrics, validation and activity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from raytrain.data.batch import LoadedStep
from raytrain.model.canary import Canary

Log = Callable[[dict[str, float], int, float], None]
Validate = Callable[[Canary, torch.device], dict[str, float]]


@dataclass(frozen=True)
class LoopHooks:
    """Callbacks of `TrainingLoop`; by default they do nothing.

    `log` gets metrics, step and seconds of training, on rank 0. `validate` returns metrics; all ranks call it.
    `before_step` gets the step that begins and its first batch, `on_activity` a short description of what the rank does
    next, `on_out_of_memory` the bucket and the batch size of a step that did not fit. `before_saving` is called before
    each checkpoint. On every log line, `should_save` decides whether to save at once (a node is about to shut down)
    and, on rank 0, `should_stop` whether to stop.
    """

    log: Log = lambda metrics, step, seconds: None
    validate: Validate | None = None
    before_step: Callable[[int, LoadedStep], None] = lambda step, loaded: None
    before_saving: Callable[[], None] = lambda: None
    on_activity: Callable[[str], None] = lambda activity: None
    on_out_of_memory: Callable[[int, int], None] = lambda bucket, size: None
    should_save: Callable[[], bool] = lambda: False
    should_stop: Callable[[], bool] = lambda: False
