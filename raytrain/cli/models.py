"""The command `convert`: a model's files in the format of NeMo, raytrain or Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raytrain.cli.options import MODEL_HELP


def convert(
    source: Annotated[Path, typer.Argument(help=MODEL_HELP)],
    target: Annotated[Path, typer.Argument(help="Where to write: a .nemo file, or a new folder.")],
    to: Annotated[
        str | None, typer.Option(help="nemo, raytrain or huggingface; by default taken from TARGET's extension.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a .nemo file that exists.")] = False,
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
