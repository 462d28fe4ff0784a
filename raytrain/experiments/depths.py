"""`raytrain ablate --decoder-depths`: what a model gains and loses when its decoder gets shallower.

The point of the Flash models of arXiv 2503.05931: text comes out token by token, so a decoder layer costs far more time
at inference than an encoder layer, while parameters are as good in the encoder. For each depth: parameters, what a
training step costs, and after a short training (a Ray Tune trial) validation WER and decoding speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raytrain.cluster.placement import Placement
from raytrain.cluster.room import trains_on_gpus
from raytrain.cluster.session import ray_session
from raytrain.cluster.trials import run_grid
from raytrain.config import Config, check_config
from raytrain.console import Console
from raytrain.errors import ConfigError
from raytrain.experiments.ablate import histogram_of, prepare_folder, training_limits, trial_metrics
from raytrain.model.config import ModelConfig
from raytrain.model.cost import cost_of
from raytrain.model.device import worker_device
from raytrain.run_folder.trial_folder import check_on_disk
from raytrain.run_folder.workspace import Workspace
from raytrain.storage.artifacts import write_json
from raytrain.storage.ownership import owned
from raytrain.storage.run_store import RunStore
from raytrain.tracking.runs import RunTracking, tracking_uri

DEPTHS_FORMAT = "raytrain.decoder_depths/1"


def depth_models(model: ModelConfig, decoders: Sequence[int], encoders: Sequence[int]) -> list[ModelConfig]:
    """The model at each decoder depth, with its own encoder depth, or those given (one for all, or one for each)."""
    if len(encoders) not in (0, 1, len(decoders)):
        raise ConfigError(
            "encoder depths must be one for all decoder depths, or one for each",
            got=len(encoders),
            allowed=f"1 or {len(decoders)}",
            remedy="give --encoder-depths one number, or as many as --decoder-depths",
        )
    if min([*decoders, *encoders], default=1) < 1:
        raise ConfigError(
            "a depth must be at least 1",
            got=min([*decoders, *encoders]),
            remedy="give --decoder-depths and --encoder-depths whole numbers from 1 on",
        )
    own = list(encoders) * (len(decoders) if len(encoders) == 1 else 1) or [model.encoder_layers] * len(decoders)
    return [
        replace(model, decoder_layers=decoder, encoder_layers=encoder)
        for decoder, encoder in zip(decoders, own, strict=True)
    ]


def num_parameters(model: ModelConfig) -> int:
    """Trained numbers of a model, counted without making it; the tied head once."""
    import torch

    from raytrain.model.canary import Canary

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
) -> dict[str, Any]:
    """What `decoder_depths.json` keeps: a row for each depth; without `train` the columns that need none, which may be
    of another `model` than the configuration's."""
    target, config = config.ablate.target_wer, training_limits(config)
    if train:
        check_on_disk(config, "raytrain ablate --decoder-depths")
    if train and not config.data.dev:
        raise ConfigError("comparing depths needs data.dev", remedy="name dev manifests, or use --predict")
    with (
        owned(config.run_location, console.say, take_over),
        ray_session(config.cluster) if train else contextlib.nullcontext(),  # counting alone may need no Ray
    ):
        histogram = histogram_of(config, console)
        models = depth_models(model or Workspace(config, config.run_dir).model_config(), decoders, encoders)
        rows = [_counted(one, histogram) for one in models]
        for row in rows:
            row["training_compute"] = row["macs_per_epoch"] / rows[0]["macs_per_epoch"]
        if train:
            _train(config, console, models, rows, target)
        body = {"rows": rows, "trained": train, "target_wer": target}
        write_json(config.run_dir / "decoder_depths.json", DEPTHS_FORMAT, body)
        RunStore(config.run_location).publish()
    return body


def _train(
    config: Config, console: Console, models: list[ModelConfig], rows: list[dict[str, Any]], target: float
) -> None:
    """Train every depth, and add to its row what came out."""
    with RunTracking(config, config.run_dir) as tracking:
        jobs = [_prepare(config, console, one) for one in models]
        with console.stage("ablate") as finish, tracking.stage("ablate depths"):
            trials = run_grid(config, console, jobs, config.run_dir / "ablate", tracking.child_id)
            for row, model, trial in zip(rows, models, trials, strict=True):
                row |= trial_metrics(trial, target)
                row["why"] = trial["why"]
                row["rtfx"] = _measure_rtfx(config, model, trial["folder"]) if trial["folder"] else None
            finish(f"{len(trials)} trainings")


def _counted(model: ModelConfig, histogram: Any) -> dict[str, Any]:
    cost = cost_of(model)
    macs = float((histogram.counts * cost.of(histogram.cells, histogram.tokens)).sum())
    return {
        "encoder_layers": model.encoder_layers,
        "decoder_layers": model.decoder_layers,
        "parameters": num_parameters(model),
        "macs_per_epoch": macs,
        "decoder_macs_per_token": cost.token,
    }


def _prepare(config: Config, console: Console, model: ModelConfig) -> dict[str, Any]:
    """A run folder of a depth, and its job."""
    name = f"encoder-{model.encoder_layers}-decoder-{model.decoder_layers}"
    layers = {"encoder_layers": model.encoder_layers, "decoder_layers": model.decoder_layers}
    own = prepare_folder(config, console, name, {"model": replace(config.model, **layers)})
    return {
        "label": f"encoder {model.encoder_layers}, decoder {model.decoder_layers}",
        "config": {**own.model_dump(mode="json"), "tracking": config.tracking.model_dump(mode="json")},
        "run_dir": str(own.run_dir),
        "tracking_uri": tracking_uri(config, config.run_dir),
    }


def _measure_rtfx(config: Config, model: ModelConfig, folder: str) -> dict[str, float]:
    """`_rtfx` on a worker of the kind that training had: the driver may have no GPU, or one that Ray has given away."""
    import ray

    cuda = trains_on_gpus(config)
    options = Placement.train(config.cluster).remote_options(gpus=1.0 if cuda else 0.0)
    values = config.model_copy(update={"model": model}).model_dump(mode="json")
    return ray.get(ray.remote(max_calls=1, **options)(_rtfx).remote(values, folder, cuda))


def _rtfx(values: dict[str, Any], folder: str, cuda: bool) -> dict[str, float]:
    """Audio-seconds per second of greedy decoding of dev recordings, one at a time and eight together, and the
    decoder's part of the time; reading audio does not count."""

    from raytrain.data.loader import read_rows
    from raytrain.decoding.recognizer import Recognizer
    from raytrain.decoding.settings import DecodeSettings
    from raytrain.run_folder.scored_rows import encode_split
    from raytrain.run_folder.trained import load_run

    config = check_config(values)
    device = worker_device(cuda).torch
    search = DecodeSettings(max_generation_delta=config.evaluate.max_generation_delta)
    recogniser = Recognizer(*load_run(values, folder, "best"), search, device)
    rows, pad_id = encode_split(Workspace(config, folder), "dev", 40).rows, recogniser.tokenizer.pad_id
    sample_rate = config.model.sample_rate
    found: dict[str, float] = {}
    for size in (1, 8):
        batches = [batch for _, batch in read_rows(rows, sample_rate, pad_id, size, lambda row, error: None)]
        recogniser.recognize(batches[0], [0.0] * len(batches[0]), [False] * len(batches[0]))  # the first one warms up
        recogniser.take_seconds()
        for batch in batches:
            recogniser.recognize(batch, [0.0] * len(batch), [False] * len(batch))
        spent = recogniser.take_seconds()
        audio = sum(float(batch.audio_lengths.sum()) for batch in batches) / sample_rate
        found[f"rtfx_batch_{size}"] = audio / spent.total()
        found[f"decoder_share_batch_{size}"] = spent["decoder"] / spent.total()
    return found


def depths_table(body: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells, as the command prints them."""
    columns = ["encoder", "decoder", "parameters", "training compute"]
    if body["trained"]:
        columns += ["steps", "lowest WER", "RTFx, batch 1", "RTFx, batch 8", "audio s per s in training"]
    cells = []
    for row in body["rows"]:
        cell = [
            str(row["encoder_layers"]),
            str(row["decoder_layers"]),
            f"{row['parameters'] / 1e6:.1f}M",
            f"{row['training_compute']:.2f}",
        ]
        if body["trained"]:
            rtfx = row["rtfx"] or {}
            numbers = (row["best_wer"], rtfx.get("rtfx_batch_1"), rtfx.get("rtfx_batch_8"))
            wer, one, eight = ("none" if value is None else value for value in numbers)
            speed = row["audio_seconds_per_second"]
            cell += [
                str(row["steps"]),
                wer if wer == "none" else f"{wer:.1%}",
                one if one == "none" else f"{one:.0f}",
                eight if eight == "none" else f"{eight:.0f}",
                "none" if speed is None else f"{speed:.0f}",
            ]
        cells.append(cell)
    return columns, cells
