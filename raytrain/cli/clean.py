"""The command `clean`: lists leftovers of killed commands with their sizes; `--yes` removes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raytrain.cli.options import SetOption, json_option, print_json

if TYPE_CHECKING:
    from raytrain.config import Config
    from raytrain.console import Console
    from raytrain.storage.leftovers import Leftover

OptionalConfig = Annotated[
    Path | None, typer.Option("--config", "-c", help="Also clean this run's folder; by default only Ray's sessions.")
]


def clean(
    config: OptionalConfig = None,
    set: SetOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Remove the leftovers; by default they are only listed.")
    ] = False,
    previous: Annotated[
        bool, typer.Option("--previous", help="Include the run's previous/ folder: checkpoints of earlier settings.")
    ] = False,
    json: Annotated[bool, json_option("One JSON object per file or folder.")] = False,
) -> None:
    """List what killed commands left behind; remove it with --yes.

    Leftovers are unfinished files, Ray Train's state of training runs that have ended, and folders of killed Ray
    sessions that raytrain started on this machine. A run that a process still owns is left alone.
    """
    import contextlib

    from raytrain.cluster.supervision import dead_sessions
    from raytrain.config import load_config
    from raytrain.console import Console
    from raytrain.storage.leftovers import previous as set_aside
    from raytrain.storage.ownership import owned

    if config is None and (set or previous):
        raise typer.BadParameter("requires --config", param_hint="--previous" if previous else "--set")
    console, loaded = Console(quiet=json), load_config(config, set) if config else None
    owning = owned(loaded.run_location, console.say) if loaded and yes else contextlib.nullcontext()
    with owning:
        leftovers = list(dead_sessions())
        kept: list[Leftover] = []
        if loaded is not None:
            leftovers += _of_run(loaded, console.say, is_ours=yes)
            (leftovers if previous else kept).extend(set_aside(loaded.run_dir))
        if yes:
            for leftover in leftovers:
                leftover.remove()
    _show(leftovers, kept, yes, json, console)


def _of_run(config: Config, say: Callable[[str], None], is_ours: bool) -> Iterator[Leftover]:
    import time

    from raytrain.storage.leftovers import probes, temporaries, trainings
    from raytrain.storage.ownership import describe_owner

    owner = None if is_ours else describe_owner(config.run_location)
    if owner is not None and owner[1]:
        say(f"{owner[0]}: its files are left alone")
        return
    yield from temporaries(config.run_dir, before=time.time())
    yield from trainings(config.run_location)
    yield from probes(config.run_location.rpartition("/")[0])


def _show(leftovers: list[Leftover], kept: list[Leftover], is_removed: bool, json: bool, console: Console) -> None:
    if json:
        from dataclasses import asdict

        for leftover in leftovers:
            print_json({**asdict(leftover), "removed": is_removed})
        return
    total = sum(leftover.bytes for leftover in leftovers)
    if leftovers:
        rows = [(leftover.path, leftover.what, _size(leftover.bytes)) for leftover in leftovers]
        console.table(("path", "what", "size"), [*rows, ("total", "", _size(total))])
    for leftover in kept:
        console.say(f"{leftover.path}: {leftover.what}, {_size(leftover.bytes)}; removed only with --previous --yes")
    if not leftovers:
        console.say("nothing to clean")
    else:
        console.say(f"{_size(total)} removed" if is_removed else "remove with --yes")


def _size(number: int) -> str:
    size, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
