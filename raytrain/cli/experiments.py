"""The commands `tune` and `ablate`, which compare many training runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from raytrain.cli import stopping
from raytrain.cli.options import (
    ConfigOption,
    JsonOption,
    SetOption,
    TakeOverOption,
    bytes_of,
    check_needs,
    json_option,
    print_json,
)

if TYPE_CHECKING:
    from raytrain.config import Config
    from raytrain.console import Console
    from raytrain.experiments.ablate import PredictOptions
    from raytrain.experiments.depths import DepthsBody
    from raytrain.model.config import ModelConfig
    from raytrain.report.ablation_tables import Table

_CONFIGURED = "own"  # stands for the configuration's model

Predict = Annotated[
    bool, typer.Option("--predict", help="Predict instead of training, for a GPU that need not be present.")
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", help="With --predict: a published model, or `own` for the configuration's; may be repeated."
    ),
]
Gpu = Annotated[str, typer.Option(help="With --predict: the GPU model, which determines its speed.")]
GpuMemory = Annotated[str, typer.Option(help="With --predict: the GPU's memory.")]
Gpus = Annotated[int, typer.Option(min=1, help="With --predict: number of GPUs that scheme A trains on.")]
Steps = Annotated[int, typer.Option(min=1, help="With --predict: number of steps that scheme A trains for.")]
Utilisation = Annotated[
    float, typer.Option(min=0.01, max=1, help="With --predict: the share of the GPU's peak FLOP/s that steps reach.")
]
Overhead = Annotated[
    float, typer.Option(min=0, help="With --predict: seconds per step that do not depend on the batch.")
]
DecoderDepths = Annotated[
    str | None, typer.Option(metavar="N,N,…", help="Compare decoders of these depths instead of schemes.")
]
EncoderDepths = Annotated[
    str | None,
    typer.Option(metavar="N,N,…", help="With --decoder-depths: the encoder depths, one for all or one each."),
]


def tune(
    config: ConfigOption,
    set: SetOption = None,
    json: Annotated[bool, json_option("One JSON object per trial.")] = False,
    take_over: TakeOverOption = False,
) -> None:
    """Search training settings with whole runs; ASHA stops the worst ones early.

    The configuration's `tune` section says what to search.
    """
    from raytrain.cli import tables
    from raytrain.config import load_config
    from raytrain.console import Console
    from raytrain.experiments.tune import run_tune

    stopping.say_at_stop(stopping.RESUMABLE)
    loaded, console = load_config(config, set), Console(quiet=json)
    trials = run_tune(loaded, console, take_over)
    if json:
        for trial in trials:
            print_json(trial)
        return
    console.table(*tables.tune_trials(trials, list(loaded.tune.space)))
    console.say(f"the best trial's settings are in {loaded.run_dir / 'tune_best.yaml'}; train with")
    best = " ".join(f"--set {name}={value}" for name, value in trials[0].settings.items())
    console.say(f"  raytrain run --config {config} {best}")


def ablate(
    config: ConfigOption,
    set: SetOption = None,
    predict: Predict = False,
    model: Models = None,
    gpu: Gpu = "A100",
    device_memory: GpuMemory = "80GiB",
    gpus: Gpus = 128,
    steps: Steps = 150_000,
    utilisation: Utilisation = 0.4,
    overhead_seconds: Overhead = 0.1,
    decoder_depths: DecoderDepths = None,
    encoder_depths: EncoderDepths = None,
    json: JsonOption = False,
    take_over: TakeOverOption = False,
) -> None:
    """Compare batching schemes or decoder depths on your corpus, by training each or by prediction.

    Schemes: random batches (R), buckets by seconds of audio (A), without outliers (B), with searched batch sizes (C),
    in 2D (D), with optimal edges (D+). Depths: parameters, training compute and, after a short training run, WER and
    decoding speed.
    """
    from raytrain.config import load_config
    from raytrain.console import Console
    from raytrain.experiments.ablate import PredictOptions

    stopping.say_at_stop(stopping.RESUMABLE)
    loaded, console = load_config(config, set), Console(quiet=json)
    if decoder_depths is not None:
        depths = _depths(decoder_depths, "--decoder-depths"), _depths(encoder_depths, "--encoder-depths")
        _compare_depths(loaded, console, depths, _shape(model, predict), not predict, json, take_over)
        return
    check_needs(encoder_depths is not None, "--encoder-depths", "--decoder-depths")
    options = None
    if predict:
        gib = bytes_of(device_memory, "--device-memory") / 2**30
        options = PredictOptions(gpu, gib, utilisation, overhead_seconds, gpus, steps)
    _compare_schemes(loaded, console, model, options, json, take_over)


def _compare_schemes(
    config: Config,
    console: Console,
    models: list[str] | None,
    options: PredictOptions | None,
    json: bool,
    take_over: bool,
) -> None:
    """By prediction if there are `options`, otherwise by training."""
    from dataclasses import asdict

    from raytrain.experiments.ablate import predict_ablation, run_ablation
    from raytrain.report.ablation_tables import ablation_tables

    if options:
        shapes = _published(models or ["canary-1b", "canary-1b-flash"], config)
        predicted = predict_ablation(config, console, shapes, options, take_over)
        body, schemes = asdict(predicted), ablation_tables(predicted, None, titles=False)
    else:
        trained = run_ablation(config, console, take_over)
        body, schemes = asdict(trained), ablation_tables(None, trained, titles=False)
    if json:
        print_json(body)
    else:
        _show(console, schemes)


def _published(names: list[str], config: Config) -> dict[str, ModelConfig]:
    from raytrain.model.formats.published import published

    return {name: config.model if name == _CONFIGURED else published(name) for name in names}


def _show(console: Console, ablation: list[Table]) -> None:
    from raytrain.lengths.schemes import SCHEMES, title_of

    for scheme in SCHEMES:
        console.say(f"  {scheme:<3} {title_of(scheme)}")
    for table in ablation:
        console.say(f"\n{table.title}")
        console.table(table.columns, table.rows)
        if table.note:
            console.say(table.note)


def _compare_depths(
    config: Config,
    console: Console,
    depths: tuple[list[int], list[int]],
    model: str | None,
    train: bool,
    json: bool,
    take_over: bool,
) -> None:
    from raytrain.experiments.depths import depths_table, run_depths
    from raytrain.model.formats.published import published

    shape = published(model) if model else None
    body: DepthsBody = run_depths(config, console, *depths, shape, train=train, take_over=take_over)
    if json:
        print_json(body.to_json())
    else:
        console.table(*depths_table(body))


def _depths(text: str | None, option: str) -> list[int]:
    try:
        return [int(depth) for depth in (text or "").split(",") if depth.strip()]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list like 24,12,8,4", param_hint=option) from None


def _shape(models: list[str] | None, predict: bool) -> str | None:
    """The published model whose decoder depths are compared; None for the configuration's."""
    if models and (not predict or len(models) > 1):
        raise typer.BadParameter("takes one model, and requires --predict", param_hint="--model")
    return models[0] if models and models[0] != _CONFIGURED else None
