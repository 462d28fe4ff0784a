"""`raytrain ablate --decoder-depths`: what a model gains and loses when its decoder gets shallower.

The idea of the Flash models of arXiv 2503.05931: text is generated token by token, so a decoder layer costs far more
inference time than an encoder layer, while parameters are just as useful in the encoder. For each depth: parameters,
the cost of a training step, and after a short training run (a Ray Tune trial) validation WER and decoding speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from raytrain.cluster.session import ray_session
from raytrain.cluster.tasks import call_on_training_worker
from raytrain.config import Config
from raytrain.console import Console
from raytrain.errors import ConfigError
from raytrain.experiments import trial_runs
from raytrain.experiments.decoding_speed import DecodingSpeed, measure_decoding
from raytrain.experiments.outcomes import read_outcome
from raytrain.lengths.histogram import LengthHistogram
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.model.cost import cost_of
from raytrain.report.ablation_results import TrainingOutcome
from raytrain.report.ablation_tables import format_or_none
from raytrain.run_folder.trial_folder import check_on_disk
from raytrain.run_folder.workspace import Workspace
from raytrain.storage.artifacts import write_json
from raytrain.storage.ownership import owned
from raytrain.storage.run_store import RunStore
from raytrain.tracking.runs import RunTracking

DEPTHS_FORMAT = "raytrain.decoder_depths/1"


@dataclass(frozen=True)
class DepthCost:
    """A model's cost: `training_compute` is that of an epoch, relative to the first model."""

    encoder_layers: int
    decoder_layers: int
    parameters: int
    macs_per_epoch: float
    decoder_macs_per_token: float
    training_compute: float = 1.0

    @classmethod
    def of(cls, model: ModelConfig, histogram: LengthHistogram) -> DepthCost:
        """The cost of a model on a corpus."""
        cost = cost_of(model)
        macs = float((histogram.counts * cost.of(histogram.cells, histogram.tokens)).sum())
        return cls(model.encoder_layers, model.decoder_layers, num_parameters(model), macs, cost.token)


@dataclass(frozen=True)
class DepthTraining:
    """The outcome of training at a depth, `why` it failed if it did, and the trained model's speed."""

    outcome: TrainingOutcome
    why: str | None
    rtfx: DecodingSpeed | None


@dataclass(frozen=True)
class DepthRow:
    """A depth, and its training run if there was one."""

    cost: DepthCost
    training: DepthTraining | None = None

    def to_json(self) -> dict[str, Any]:
        """One flat row."""
        if self.training is None:
            return asdict(self.cost)
        rtfx = None if self.training.rtfx is None else asdict(self.training.rtfx)
        return {**asdict(self.cost), **asdict(self.training.outcome), "why": self.training.why, "rtfx": rtfx}


@dataclass(frozen=True)
class DepthsBody:
    """The body of `decoder_depths.json`."""

    rows: list[DepthRow]
    trained: bool
    target_wer: float

    def to_json(self) -> dict[str, Any]:
        """The body as written."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "trained": self.trained,
            "target_wer": self.target_wer,
        }


def depth_models(model: ModelConfig, decoders: Sequence[int], encoders: Sequence[int]) -> list[ModelConfig]:
    """The model at each decoder depth, with its own encoder depth or the given ones (one for all, or one each)."""
    if len(encoders) not in (0, 1, len(decoders)):
        raise ConfigError(
            "there must be one encoder depth for all decoder depths, or one each",
            got=len(encoders),
            allowed=f"1 or {len(decoders)}",
            remedy="pass one number to --encoder-depths, or as many as to --decoder-depths",
        )
    if min([*decoders, *encoders], default=1) < 1:
        raise ConfigError(
            "a depth must be at least 1",
            got=min([*decoders, *encoders]),
            remedy="pass whole numbers from 1 on to --decoder-depths and --encoder-depths",
        )
    encoders = encoders or [model.encoder_layers]
    if len(encoders) == 1:
        encoders = [encoders[0]] * len(decoders)
    return [
        replace(model, decoder_layers=decoder, encoder_layers=encoder)
        for decoder, encoder in zip(decoders, encoders, strict=True)
    ]


def num_parameters(model: ModelConfig) -> int:
    """A model's number of parameters, counted without building it; the tied head counts once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Canary(model).parameters())


def run_depths(
    config: Config,
    console: Console,
    decoders: Sequence[int],
    encoders: Sequence[int],
    model: ModelConfig | None = None,
    *,
    train: bool,
    take_over: bool = False,
) -> DepthsBody:
    """The body of `decoder_depths.json`: a row per depth. Without training, rows have only the columns that need none,
    and `model` may differ from the configuration's."""
    config = trial_runs.training_limits(config)
    if train:
        check_on_disk(config, "raytrain ablate --decoder-depths")
    if train and not config.data.dev:
        raise ConfigError(
            "comparing depths needs data.dev", remedy="list dev manifests under data.dev, or use --predict"
        )
    with (
        owned(config.run_location, console.say, take_over),
        ray_session(config.cluster) if train else contextlib.nullcontext(),  # counting parameters may not need Ray
    ):
        histogram = trial_runs.histogram_of(config, console)
        models = depth_models(model or Workspace(config, config.run_dir).model_config(), decoders, encoders)
        costs = [DepthCost.of(depth, histogram) for depth in models]
        base = costs[0].macs_per_epoch
        rows = [DepthRow(replace(cost, training_compute=cost.macs_per_epoch / base)) for cost in costs]
        if train:
            trainings = _train(config, console, models)
            rows = [DepthRow(row.cost, training) for row, training in zip(rows, trainings, strict=True)]
        body = DepthsBody(rows, train, config.ablate.target_wer)
        write_json(config.run_dir / "decoder_depths.json", DEPTHS_FORMAT, body.to_json())
        RunStore(config.run_location).publish()
    return body


def _train(config: Config, console: Console, models: Sequence[ModelConfig]) -> list[DepthTraining]:
    with RunTracking(config, config.run_dir) as tracking:
        jobs = [_prepare(config, console, model) for model in models]
        with console.stage("ablate") as finish, tracking.stage("ablate depths"):
            ends = trial_runs.train_trials(config, console, jobs, tracking.child_id)
            trainings = [_training(config, model, end) for model, end in zip(models, ends, strict=True)]
            finish(f"{len(trainings)} training runs")
    return trainings


def _prepare(config: Config, console: Console, model: ModelConfig) -> trial_runs.PlannedTrial:
    """A run folder for a depth, and its job."""
    encoder, decoder = model.encoder_layers, model.decoder_layers
    layers = replace(config.model, encoder_layers=encoder, decoder_layers=decoder)
    candidate = trial_runs.prepare_run(config, console, f"encoder-{encoder}-decoder-{decoder}", {"model": layers})
    return trial_runs.PlannedTrial(f"encoder {encoder}, decoder {decoder}", candidate)


def _training(config: Config, model: ModelConfig, end: trial_runs.TrialEnd) -> DepthTraining:
    rtfx = None
    if end.folder:
        values = config.model_copy(update={"model": model}).model_dump(mode="json")
        rtfx = call_on_training_worker(config, measure_decoding, values, end.folder)
    return DepthTraining(read_outcome(end.folder, config.ablate.target_wer), end.why, rtfx)


def depths_table(body: DepthsBody) -> tuple[list[str], list[list[str]]]:
    """The columns and cells that the command prints."""
    columns = ["encoder", "decoder", "parameters", "training compute"]
    if body.trained:
        columns += ["steps", "lowest WER", "RTFx, batch 1", "RTFx, batch 8", "audio s per s in training"]
    return columns, [_cells(row.cost) + (_training_cells(row.training) if row.training else []) for row in body.rows]


def _cells(cost: DepthCost) -> list[str]:
    depths = [str(cost.encoder_layers), str(cost.decoder_layers)]
    return [*depths, f"{cost.parameters / 1e6:.1f}M", f"{cost.training_compute:.2f}"]


def _training_cells(training: DepthTraining) -> list[str]:
    outcome, rtfx = training.outcome, training.rtfx
    return [
        str(outcome.steps),
        format_or_none(outcome.best_wer, ".1%"),
        format_or_none(rtfx.rtfx_batch_1 if rtfx else None, ".0f"),
        format_or_none(rtfx.rtfx_batch_8 if rtfx else None, ".0f"),
        format_or_none(outcome.audio_seconds_per_second, ".0f"),
    ]
