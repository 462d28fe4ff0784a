"""The commands `run`, `schedule`, `demo` and one per stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raytrain.cli import stopping
from raytrain.cli.options import (
    ConfigOption,
    JsonOption,
    SetOption,
    StagesArgument,
    TakeOverOption,
    check_needs,
    json_option,
    print_json,
)

if TYPE_CHECKING:
    from raytrain.config import Config
    from raytrain.console import Console

STAGE_HELP = {
    "statistics": "Train the tokenizer if none is given, and count durations and tokens.",
    "buckets": "Divide durations and tokens into a 2D grid of buckets.",
    "assign": "Write every manifest row into its bucket, or into rejected/ with a reason.",
    "oomptimize": "Find every bucket's largest batch size within the memory budget.",
    "train": "Train on all workers; resumes from the newest checkpoint.",
    "evaluate": "Transcribe and score the test manifests, with confidence intervals; errors.html shows the worst.",
    "report": "Write report.html from the run folder.",
}


def _run(config: Path, overrides: list[str] | None, names: Sequence[str], take_over: bool) -> None:
    from raytrain.stages.pipeline import run_pipeline

    stopping.say_at_stop(stopping.RESUMABLE)
    run_pipeline(*_loaded(config, overrides), tuple(names), take_over=take_over)


def _loaded(config: Path, overrides: list[str] | None) -> tuple[Config, Console]:
    """The configuration, and where to show what comes of it."""
    from raytrain.config import load_config
    from raytrain.console import Console

    return load_config(config, overrides), Console()


def checked_stages(names: list[str] | None) -> list[str]:
    """The named stages; may be empty. Raises `typer.BadParameter` for an unknown stage."""
    names = names or []
    unknown = [name for name in names if name not in STAGE_HELP]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(STAGE_HELP)}", param_hint="STAGE")
    return names


def run(
    config: ConfigOption, stages: StagesArgument = None, set: SetOption = None, take_over: TakeOverOption = False
) -> None:
    """Run all stages, or the named ones; stages whose settings and inputs did not change are skipped."""
    _run(config, set, checked_stages(stages) or tuple(STAGE_HELP), take_over)


def stage_command(name: str) -> Callable[..., None]:
    """The command that runs one stage."""

    def command(config: ConfigOption, set: SetOption = None, take_over: TakeOverOption = False) -> None:
        _run(config, set, (name,), take_over)

    return command


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
    from raytrain.cli import tables
    from raytrain.stages.previews import compare_plans

    loaded, console = _loaded(config, set)
    console.table(*tables.policies(compare_plans(loaded)))


def oomptimize(
    config: ConfigOption,
    set: SetOption = None,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry", help="Trace for a GPU that need not be present, print the batch sizes and write nothing."
        ),
    ] = False,
    device_memory: Annotated[
        str | None, typer.Option(help="Memory of the GPU to plan for, such as 80GiB; sets oomptimize.device_memory.")
    ] = None,
    json: Annotated[bool, json_option("With --dry: one JSON object per bucket.")] = False,
    take_over: TakeOverOption = False,
) -> None:
    memory = [] if device_memory is None else [f"oomptimize.device_memory={device_memory}"]
    overrides = [*(set or []), *memory]
    if dry:
        _plan_dry(config, overrides, json)
    else:
        check_needs(json, "--json", "--dry")
        _run(config, overrides, ("oomptimize",), take_over)


def _plan_dry(config: Path, overrides: list[str], json: bool) -> None:
    from raytrain.cli import tables
    from raytrain.stages.previews import plan_dry

    loaded, console = _loaded(config, overrides)
    if loaded.oomptimize.device_memory is None:
        raise typer.BadParameter("--dry requires it, for example 80GiB", param_hint="--device-memory")
    rows = plan_dry(loaded, console, loaded.oomptimize.device_memory)
    if json:
        for row in rows:
            print_json(row)
        return
    console.table(*tables.planned_sizes(rows))
    last = rows[-1]
    console.say(f"\nLive at the peak of bucket {last.bucket}'s step with {last.traced_batch_size} utterances:")
    for table in tables.live_memory(last):
        console.table(*table)


def schedule(
    config: ConfigOption,
    set: SetOption = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Simulate training steps without audio and measure them.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks; by default from the configuration.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to simulate.")] = 1000,
    json: JsonOption = False,
) -> None:
    """Show how often an epoch repeats each corpus, and simulate training steps without audio."""
    from dataclasses import asdict

    from raytrain.cli import tables
    from raytrain.stages.previews import describe_schedule

    loaded, console = _loaded(config, set)
    ranks = workers or loaded.train.most_workers
    corpora, simulation = describe_schedule(loaded, console, ranks, steps if simulate else 0)
    if json:
        print_json({"corpora": corpora, **(asdict(simulation) if simulation else {})})
        return
    console.table(*tables.corpora(corpora, simulation))
    if simulation is not None:
        console.table(*tables.simulated(simulation))


def demo(
    root: Annotated[Path, typer.Option(help="Folder for the corpus and the run.")] = Path("runs"),
    set: SetOption = None,
    take_over: TakeOverOption = False,
) -> None:
    """Generate a small spoken corpus in four languages, train a Canary model on it, and show the results."""
    from raytrain.demo.run import run_demo

    stopping.say_at_stop(stopping.RESUMABLE)
    raise typer.Exit(run_demo(root, set or [], take_over=take_over))
