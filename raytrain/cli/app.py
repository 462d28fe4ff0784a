"""The command line: one command per stage, `run` for all of them, `tune`, `ablate`, `convert`, `transcribe`, …"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from raytrain.cli import jobs as jobs_commands
from raytrain.cli import stopping
from raytrain.cli.clean import clean
from raytrain.cli.config import config as explain_config
from raytrain.cli.doctor import doctor
from raytrain.cli.options import ConfigOption, SetOption, StagesArgument, TakeOverOption
from raytrain.cli.transcribe import transcribe
from raytrain.errors import RaytrainError
from raytrain.redaction import guard_output, redacted, with_credentials


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises `Stopped` for Ctrl-C, which Typer would turn into an exit without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise stopping.Stopped from error


app = typer.Typer(
    name="raytrain",
    cls=_Commands,
    help="Train and tune encoder-decoder speech models on Ray: from manifests to word error rate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_STAGE_HELP = {
    "statistics": "Train the tokenizer where none is given and count durations and tokens.",
    "buckets": "Cut durations and tokens into a 2D grid of buckets.",
    "assign": "Write every manifest row into its bucket, or into rejected/ with a reason.",
    "oomptimize": "Find every bucket's largest batch size within the memory budget.",
    "train": "Train on all workers; goes on from the newest checkpoint.",
    "evaluate": "Transcribe the test manifests, score them with intervals, and show the worst in errors.html.",
    "report": "Write report.html from the run folder.",
}


def _run(
    config: Path, overrides: list[str] | None, names: tuple[str, ...] | None = None, take_over: bool = False
) -> None:
    from raytrain.config import load_config
    from raytrain.console import Console
    from raytrain.stages.pipeline import STAGE_NAMES, run_pipeline

    stopping.say_at_stop(stopping.GOES_ON)
    run_pipeline(load_config(config, overrides), Console(), names or STAGE_NAMES, take_over=take_over)


@app.command()
def run(
    config: ConfigOption, stages: StagesArgument = None, set: SetOption = None, take_over: TakeOverOption = False
) -> None:
    """Run all stages, or those named; what did not change in settings and inputs is left as it is."""
    unknown = [one for one in stages or [] if one not in _STAGE_HELP]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(_STAGE_HELP)}", param_hint="STAGE")
    _run(config, set, tuple(stages or ()), take_over)


def _add_stage(name: str) -> None:
    def command(config: ConfigOption, set: SetOption = None, take_over: TakeOverOption = False) -> None:
        _run(config, set, (name,), take_over)

    app.command(name, help=_STAGE_HELP[name])(command)


for _name in _STAGE_HELP:
    if _name not in ("buckets", "oomptimize"):
        _add_stage(_name)


@app.command(help=_STAGE_HELP["buckets"])
def buckets(
    config: ConfigOption,
    set: SetOption = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Print all policies side by side and write nothing.")
    ] = False,
    take_over: TakeOverOption = False,
) -> None:
    if not compare:
        _run(config, set, ("buckets",), take_over)
        return
    from raytrain.config import load_config
    from raytrain.console import Console
    from raytrain.stages.planning import compare_plans

    rows = compare_plans(load_config(config, set))
    columns = ("policy", "audio padding", "token padding", "padded compute", "cells", "rejected", "seconds")
    shares = [(f"{row.audio_padding:.2%}", f"{row.token_padding:.2%}", f"{row.padded_compute:.2%}") for row in rows]
    Console().table(
        columns,
        [
            (row.policy, *share, str(row.cells), str(row.rejected), f"{row.seconds:.1f}")
            for row, share in zip(rows, shares, strict=True)
        ],
    )


@app.command(help=_STAGE_HELP["oomptimize"])
def oomptimize(
    config: ConfigOption,
    set: SetOption = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="Trace for a GPU that need not be here, print the sizes and write nothing.")
    ] = False,
    device_memory: Annotated[
        str | None, typer.Option(help="Memory of the GPU to plan for, as 80GiB; sets oomptimize.device_memory.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="With --dry: one JSON object per bucket.")] = False,
    take_over: TakeOverOption = False,
) -> None:
    overrides = list(set or [])
    if device_memory is not None:
        overrides.append(f"oomptimize.device_memory={device_memory}")
    if not dry:
        if json:
            raise typer.BadParameter("goes with --dry", param_hint="--json")
        _run(config, overrides, ("oomptimize",), take_over)
        return
    from raytrain.config import load_config
    from raytrain.console import Console
    from raytrain.stages.planning import plan_dry

    loaded = load_config(config, overrides)
    if loaded.oomptimize.device_memory is None:
        raise typer.BadParameter("--dry needs it, for example 80GiB", param_hint="--device-memory")
    rows = plan_dry(loaded, Console(), loaded.oomptimize.device_memory)
    if json:
        import orjson

        for row in rows:
            typer.echo(orjson.dumps(row).decode())
        return
    console = Console()
    columns = ("bucket", "≤ seconds", "≤ tokens", "batch size", "seconds of audio", "peak GiB")
    cells = [
        (
            row.bucket,
            row.max_duration_ms / 1000,
            row.max_tokens,
            row.batch_size,
            row.audio_seconds,
            f"{row.predicted_gib:.2f}",
        )
        for row in rows
    ]
    console.table(columns, [[str(value) for value in row] for row in cells])
    last = rows[-1]
    console.say(f"\nLive at the peak of bucket {last.bucket}'s step with {last.traced_batch_size} utterances:")
    for label, sizes in (("phase", last.mib_by_phase), ("module", last.mib_by_module)):
        total = sum(sizes.values())
        parts = [(name, f"{size:,.0f}", f"{size / total:.1%}") for name, size in sizes.items() if size > 0.002 * total]
        console.table((label, "MiB", "share"), parts)


@app.command()
def tune(
    config: ConfigOption,
    set: SetOption = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per trial.")] = False,
    take_over: TakeOverOption = False,
) -> None:
    """Search settings of training with whole runs, of which the worse ones end early (ASHA).

    The section `tune` of the configuration says what to search.
    """
    import orjson

    from raytrain.config import load_config
    from raytrain.console import Console
    from raytrain.experiments.tune import run_tune

    stopping.say_at_stop(stopping.GOES_ON)
    loaded, console = load_config(config, set), Console(quiet=json)
    trials = run_tune(loaded, console, take_over)
    if json:
        for trial in trials:
            typer.echo(orjson.dumps(trial).decode())
        return
    names = list(loaded.tune.space)
    rows = [
        (
            "none" if one["error"] is None else f"{one['error']:.2%}",
            f"{one['steps']}{' (ended early)' if one['stopped_early'] else ''}",
            *(_shown(one["settings"].get(name)) for name in names),
        )
        for one in trials
    ]
    console.table(("error", "steps", *(name.rpartition(".")[2] for name in names)), rows)
    console.say(f"the best trial's settings are in {loaded.run_dir / 'tune_best.yaml'}; train with")
    best = " ".join(f"--set {name}={value}" for name, value in trials[0]["settings"].items())
    console.say(f"  raytrain run --config {config} {best}")


@app.command()
def ablate(
    config: ConfigOption,
    set: SetOption = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Train nothing; predict for a GPU that need not be here.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="With --predict: a published model, or `own`: the configuration's; may be repeated."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="With --predict: the kind of GPU, for its speed.")] = "A100",
    device_memory: Annotated[str, typer.Option(help="With --predict: the GPU's memory.")] = "80GiB",
    gpus: Annotated[int, typer.Option(min=1, help="With --predict: GPUs that scheme A trains on.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="With --predict: steps that scheme A trains for.")] = 150_000,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="With --predict: the share of the GPU's peak that steps reach.")
    ] = 0.4,
    overhead_seconds: Annotated[
        float, typer.Option(min=0, help="With --predict: seconds of a step that do not depend on its batch.")
    ] = 0.1,
    decoder_depths: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Compare decoders of these depths instead of schemes.")
    ] = None,
    encoder_depths: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="With --decoder-depths: the encoders' depths, one or as many.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    take_over: TakeOverOption = False,
) -> None:
    """Compare batching schemes, or decoder depths, on your corpus: by training each, or by prediction.

    Schemes: random batches (R), buckets by seconds of audio (A), without outliers (B), with searched sizes (C), in 2D
    (D), with optimal edges (D+). Depths: parameters, training compute, and after a short training WER and decoding
    speed.
    """
    import orjson

    from raytrain.config import load_config, parse_bytes
    from raytrain.console import Console
    from raytrain.experiments.ablate import PredictOptions, predict_ablation, run_ablation
    from raytrain.lengths.schemes import SCHEMES, title_of
    from raytrain.model.formats.published import published
    from raytrain.report.ablation import ablation_tables

    stopping.say_at_stop(stopping.GOES_ON)
    loaded, console = load_config(config, set), Console(quiet=json)
    if decoder_depths is not None:
        _compare_depths(loaded, console, decoder_depths, encoder_depths, model, predict, json, take_over)
        return
    if encoder_depths is not None:
        raise typer.BadParameter("goes with --decoder-depths", param_hint="--encoder-depths")
    if predict:
        try:
            gib = parse_bytes(device_memory) / 2**30
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--device-memory") from None
        names = model or ["canary-1b", "canary-1b-flash"]
        models = {name: loaded.model if name == "own" else published(name) for name in names}
        options = PredictOptions(gpu, gib, utilisation, overhead_seconds, gpus, steps)
        found = predict_ablation(loaded, console, models, options, take_over=take_over)
    else:
        found = run_ablation(loaded, console, take_over)
    if json:
        typer.echo(orjson.dumps(found).decode())
        return
    for scheme in SCHEMES:
        console.say(f"  {scheme:<3} {title_of(scheme)}")
    for table in ablation_tables(*((found, None) if predict else (None, found)), titles=False):
        console.say(f"\n{table.title}")
        console.table(table.columns, table.rows)
        if table.note:
            console.say(table.note)


def _compare_depths(
    config: Any,
    console: Any,
    decoders: str,
    encoders: str | None,
    models: list[str] | None,
    predict: bool,
    json: bool,
    take_over: bool,
) -> None:
    import orjson

    from raytrain.experiments.depths import depths_table, run_depths
    from raytrain.model.formats.published import published

    def depths(text: str | None, option: str) -> list[int]:
        try:
            return [int(one) for one in (text or "").split(",") if one.strip()]
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not like 24,12,8,4", param_hint=option) from None

    if models and (not predict or len(models) > 1):
        raise typer.BadParameter("one model, and with --predict", param_hint="--model")
    shape = published(models[0]) if models and models[0] != "own" else None
    chosen = depths(decoders, "--decoder-depths"), depths(encoders, "--encoder-depths")
    found = run_depths(config, console, *chosen, shape, train=not predict, take_over=take_over)
    if json:
        typer.echo(orjson.dumps(found).decode())
    else:
        console.table(*depths_table(found))


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@app.command()
def schedule(
    config: ConfigOption,
    set: SetOption = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Go through steps without audio and measure them.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Ranks; those of the configuration by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to simulate.")] = 1000,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show how often an epoch goes through each corpus, and simulate training's steps without any audio."""
    from dataclasses import asdict

    import orjson

    from raytrain.config import load_config
    from raytrain.console import Console
    from raytrain.stages.planning import describe_schedule

    console = Console()
    loaded = load_config(config, set)
    corpora, found = describe_schedule(loaded, console, workers or loaded.train.most_workers, steps if simulate else 0)
    if json:
        typer.echo(orjson.dumps({"corpora": corpora, **(asdict(found) if found else {})}).decode())
        return
    columns = ("corpus", "rows", "times an epoch", *(("share of audio",) if found else ()))
    shares = [(f"{share:.1%}",) for share in found.audio_share] if found else [()] * len(corpora)
    console.table(
        columns,
        [
            (corpus.corpus, str(corpus.rows), f"{corpus.repeats:.2f}", *share)
            for corpus, share in zip(corpora, shares, strict=True)
        ],
    )
    if found is None:
        return
    rows = [
        ("steps", f"{found.steps} of {found.world_size} workers, {found.epochs:.2f} epochs"),
        ("mean batch", f"{found.mean_batch:.1f} utterances per worker"),
        ("padding", f"audio {found.audio_padding:.1%}, tokens {found.token_padding:.1%}"),
        ("workers in one bucket", f"{found.bucket_agreement:.0%} of steps"),
        ("slowest worker", f"{found.slowest_rank - 1:.1%} more padded audio than the mean"),
        ("left of the epoch", f"{found.remainder} rows"),
        ("row numbers of a batch", f"{found.seconds_per_batch * 1e6:.0f} µs"),
    ]
    console.table(("simulated", ""), rows)


@app.command()
def demo(
    root: Annotated[Path, typer.Option(help="Folder for the corpus and the run.")] = Path("runs"),
    set: SetOption = None,
    take_over: TakeOverOption = False,
) -> None:
    """Make a small spoken corpus in four languages, train a Canary on it, and show what came out."""
    from raytrain.demo.run import run_demo

    stopping.say_at_stop(stopping.GOES_ON)
    raise typer.Exit(run_demo(root, set or [], take_over=take_over))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A .nemo file, run folder, checkpoint or Hugging Face folder.")],
    target: Annotated[Path, typer.Argument(help="What to write: a .nemo file, or a new folder.")],
    to: Annotated[
        str | None, typer.Option(help="nemo, raytrain or huggingface; by default told from TARGET's ending.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a .nemo file that is there already.")] = False,
) -> None:
    """Convert a model between NeMo, raytrain and Hugging Face."""
    from raytrain.training.conversion import Format, check_target, describe, format_of, load_model, save_model

    if to is not None and to not in list(Format):
        raise typer.BadParameter(f"{to!r} is not one of {', '.join(Format)}", param_hint="--to")
    format = Format(to) if to else format_of(target)
    check_target(source, target, format, overwrite)
    parts = load_model(source)
    save_model(parts, target, format)
    typer.echo(f"{target} written: {describe(parts)}")


app.command("config")(explain_config)
for _command in (
    transcribe,
    doctor,
    clean,
    jobs_commands.submit,
    jobs_commands.status,
    jobs_commands.logs,
    jobs_commands.stop,
):
    app.command()(_command)


@app.command()
def ui(
    config: ConfigOption,
    set: SetOption = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open the run's MLflow pages (Ctrl-C ends the server)."""
    from raytrain.config import load_config
    from raytrain.tracking.runs import tracking_uri

    settings = load_config(config, set)
    uri = tracking_uri(settings, settings.run_dir)
    if uri.startswith("http"):
        typer.echo(f"MLflow runs at {uri}")
        return
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", with_credentials(uri)]
    typer.echo(f"MLflow at http://127.0.0.1:{port} (Ctrl-C ends it)")
    # In a session of its own Ctrl-C reaches it through this process, which ends all that MLflow has started.
    done = subprocess.run([*command, "--host", "127.0.0.1", "--port", str(port)], start_new_session=True, check=False)
    raise typer.Exit(done.returncode)


def main() -> None:
    """Entry point: an expected error is one readable message and exit code 1; Ctrl-C is 130, SIGTERM 143."""
    guard_output()
    stopping.install()
    with stopping.exit_codes():
        try:
            app()
        except RaytrainError as error:
            if not stopping.is_asked():
                print(f"error: {redacted(str(error))}", file=sys.stderr)
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()
