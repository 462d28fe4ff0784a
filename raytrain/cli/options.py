"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="YAML configuration of the run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Override a setting; may be repeated."),
]
TakeOverOption = Annotated[
    bool,
    typer.Option("--take-over", help="Take the run folder from the process that owns it, which then stops."),
]
StagesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="STAGE", help="Stages to run; all if none is named.")
]
