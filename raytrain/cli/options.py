"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="YAML configuration of the run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Override a setting; may be repeated."),
]
TakeOverOption = Annotated[
    bool,
    typer.Option("--take-over", help="Take over the run folder from the process that owns it, which then stops."),
]
StagesArgument = Annotated[list[str] | None, typer.Argument(metavar="STAGE", help="Stages to run; by default all.")]
MODEL_HELP = "A .nemo file, run folder, checkpoint or Hugging Face folder."


def json_option(help: str) -> Any:
    """The option `--json`, for machine-readable output."""
    return typer.Option("--json", help=help)


JsonOption = Annotated[bool, json_option("One JSON object.")]


def print_json(value: object) -> None:
    """Print a line of JSON on standard output."""
    import orjson

    typer.echo(orjson.dumps(value).decode())


def check_needs(is_missing: bool, option: str, needed: str) -> None:
    """Raises `typer.BadParameter` for an option that is given without another it requires."""
    if is_missing:
        raise typer.BadParameter(f"requires {needed}", param_hint=option)


def bytes_of(size: str, option: str) -> int:
    """`80GiB` in bytes. Raises `typer.BadParameter`."""
    from raytrain.config import parse_bytes

    try:
        return int(parse_bytes(size))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
