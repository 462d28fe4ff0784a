"""`raytrain ablate --decoder-depths`: what a model gains and loses when its decoder gets shallower.

The point of the Flash models of arXiv 2503.05931: text comes out token by token, so a decoder layer costs far more time
at inference than an encoder layer, while parameters are as good in the encoder. For each depth: parameters, what a
training step costs, and after a short training (a Ray Tune trial) validation WER and decoding speed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raytrain.artifacts import write_json
from raytrain.cluster.ablate import histogram_of, prepare_folder, trial_metrics
from raytrain.cluster.session import ray_session
from raytrain.cluster.tracking import RunTracking, tracking_uri
from raytrain.cluster.trials import run_grid
from raytrain.cluster.workspace import Workspace
from raytrain.config import Config
from raytrain.console import Console
from raytrain.errors import ConfigError
from raytrain.model.config import ModelConfig
from raytrain.model.cost import cost_of

DEPTHS_FORMAT = "raytrain.decoder_depths/1"


def depth_models(model: ModelConfig, decoders: Sequence[int], encoders: Sequence[int]) -> list[ModelConfig]:
    """The model at each decoder depth, with its own encoder depth, or those given (one for all, or one for each)."""
    if len(encoders) not in (0, 1, len(decoders)):
        raise ConfigError(
            "encoder depths must be one for all decoder depths, or one for each", got=len(encoders),
            allowed=f"1 or {len(decoders)}",
        )  # fmt: skip
    if min([*decoders, *encoders], default=1) < 1:
        raise ConfigError("a depth must be at least 1", got=min([*decoders, *encoders]))
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
    config: Config, console: Console, decoders: Sequence[int], encoders: Sequence[int],
    model: ModelConfig | None = None, *, train: bool,
) -> dict[str, Any]:  # fmt: skip
    """What `decoder_depths.json` keeps: a row for each depth; without `train` the columns that need none, which may be
    of another `model` than the configuration's."""
    section = config.ablate
    updates: dict[str, Any] = {"patience": None, "stop_at_wer": section.stop_at_wer}
    for name in ("max_minutes", "max_steps", "validate_every_steps"):
        if getattr(section, name) is not None:
            updates[name] = getattr(section, name)
    config = config.model_copy(update={"train": replace(config.train, **updates)})
    if train and not config.data.dev:
        raise ConfigError("comparing depths needs data.dev", remedy="name dev manifests, or use --predict")
    with RunTracking(config, config.run_dir) as tracking, ray_session(config.cluster):
        histogram = histogram_of(config, console)
        base = Workspace(config, config.run_dir).model_config()
        models = depth_models(model or base, decoders, encoders)
        rows = [_counted(one, histogram) for one in models]
        for row in rows:
            row["training_compute"] = row["macs_per_epoch"] / rows[0]["macs_per_epoch"]
        if train:
            jobs = [_prepare(config, console, one) for one in models]
            with console.stage("ablate") as finish, tracking.stage("ablate depths"):
                trials = run_grid(config, console, jobs, config.run_dir / "ablate", tracking.child_id)
                for row, model, trial in zip(rows, models, trials, strict=True):
                    row |= trial_metrics(trial, section.target_wer)
                    row["why"] = trial["why"]
                    row["rtfx"] = _rtfx(config, model, Path(trial["folder"])) if trial["folder"] else None
                finish(f"{len(trials)} trainings")
        body = {"rows": rows, "trained": train, "target_wer": section.target_wer}
        write_json(config.run_dir / "decoder_depths.json", DEPTHS_FORMAT, body)
    return body


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


def _rtfx(config: Config, model: ModelConfig, folder: Path) -> dict[str, float]:
    """Audio-seconds per second of greedy decoding of dev recordings, one at a time and eight together, by encoder and
    decoder; reading audio does not count."""
    import torch

    from raytrain.data.loader import read_rows
    from raytrain.model.canary import Canary
    from raytrain.model.decoding import DecodeSettings, decode
    from raytrain.training.checkpoint import CheckpointFolder

    workspace = Workspace(config.model_copy(update={"model": model}), folder)
    device = torch.device("cuda" if torch.cuda.is_available() and config.train.device != "cpu" else "cpu")
    network = Canary(workspace.model_config())
    network.load_state_dict(CheckpointFolder(folder / "checkpoints").best().load_weights())
    network = network.to(device).eval()
    search = DecodeSettings(max_generation_delta=config.evaluate.max_generation_delta)
    tokenizer = workspace.tokenizer
    found: dict[str, float] = {}
    for size in (1, 8):
        rows = workspace.rows("dev", 40)
        spent, audio = {"encoder": 0.0, "decoder": 0.0}, 0.0
        batches = [
            batch.to(device)
            for _, batch in read_rows(rows, model.sample_rate, tokenizer.pad_id, size, lambda row, error: None)
        ]
        with torch.inference_mode():
            for number, batch in enumerate([batches[0], *batches]):  # the first one warms up
                start = time.perf_counter()
                states, lengths = network.encode(batch.audio, batch.audio_lengths)
                _wait(device)
                encoded = time.perf_counter()
                prompts = batch.tokens[:, : int(batch.prompt_lengths.max())]
                decode(network, states, lengths, prompts, batch.prompt_lengths, tokenizer.eos_id, search)
                _wait(device)
                if number:
                    spent["encoder"] += encoded - start
                    spent["decoder"] += time.perf_counter() - encoded
                    audio += float(batch.audio_lengths.sum()) / model.sample_rate
        found[f"rtfx_batch_{size}"] = audio / sum(spent.values())
        found[f"decoder_share_batch_{size}"] = spent["decoder"] / sum(spent.values())
    return found


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def depths_table(body: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells, as the command prints them."""
    columns = ["encoder", "decoder", "parameters", "training compute"]
    if body["trained"]:
        columns += ["steps", "lowest WER", "RTFx, batch 1", "RTFx, batch 8", "audio s per s in training"]
    cells = []
    for row in body["rows"]:
        cell = [
            str(row["encoder_layers"]), str(row["decoder_layers"]), f"{row['parameters'] / 1e6:.1f}M",
            f"{row['training_compute']:.2f}",
        ]  # fmt: skip
        if body["trained"]:
            rtfx = row["rtfx"] or {}
            numbers = (row["best_wer"], rtfx.get("rtfx_batch_1"), rtfx.get("rtfx_batch_8"))
            wer, one, eight = ("none" if value is None else value for value in numbers)
            speed = row["audio_seconds_per_second"]
            cell += [
                str(row["steps"]), wer if wer == "none" else f"{wer:.1%}", one if one == "none" else f"{one:.0f}",
                eight if eight == "none" else f"{eight:.0f}", "none" if speed is None else f"{speed:.0f}",
            ]  # fmt: skip
        cells.append(cell)
    return columns, cells
