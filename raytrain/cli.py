"""The command line: one command per stage, `run` for all of them, `demo`, `ui`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from raytrain.errors import RaytrainError

app = typer.Typer(
    name="raytrain",
    help="Train and tune encoder-decoder speech models on Ray: from manifests to word error rate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="YAML configuration of the run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Override a setting; may be repeated."),
]

_STAGE_HELP = {
    "statistics": "Train the tokenizer where none is given and count durations and tokens.",
    "buckets": "Cut durations and tokens into a 2D grid of buckets.",
    "assign": "Write every manifest row into its bucket, or into rejected/ with a reason.",
    "oomptimize": "Find every bucket's largest batch size within the memory budget.",
    "train": "Train on all workers; goes on from the newest checkpoint.",
    "evaluate": "Transcribe the test manifests and compute the word error rate.",
    "report": "Write report.html from the run folder.",
}


def _run(config: Path, overrides: list[str] | None, names: tuple[str, ...] | None = None) -> None:
    from raytrain.cluster.pipeline import STAGE_NAMES, run_pipeline
    from raytrain.config import load_config
    from raytrain.console import Console

    run_pipeline(load_config(config, overrides), Console(), names or STAGE_NAMES)


@app.command()
def run(config: ConfigOption, set: SetOption = None) -> None:
    """Run all stages; those whose settings and inputs did not change are left as they are."""
    _run(config, set)


def _add_stage(name: str) -> None:
    def command(config: ConfigOption, set: SetOption = None) -> None:
        _run(config, set, (name,))

    app.command(name, help=_STAGE_HELP[name])(command)


for _name in _STAGE_HELP:
    _add_stage(_name)


@app.command()
def demo(
    root: Annotated[Path, typer.Option(help="Folder for the corpus and the run.")] = Path("runs"),
    set: SetOption = None,
) -> None:
    """Make a small spoken corpus in four languages, train a Canary on it, and show what came out."""
    from raytrain.demo.run import run_demo

    raise typer.Exit(run_demo(root, set or []))


@app.command()
def ui(
    config: ConfigOption,
    set: SetOption = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open the run's MLflow pages (Ctrl-C ends the server)."""
    from raytrain.cluster.tracking import tracking_uri
    from raytrain.config import load_config

    settings = load_config(config, set)
    uri = tracking_uri(settings, settings.run_dir)
    if uri.startswith("http"):
        typer.echo(f"MLflow runs at {uri}")
        return
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    typer.echo(f"MLflow at http://127.0.0.1:{port} (Ctrl-C ends it)")
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", str(port)])


def main() -> None:
    """Entry point: an expected error is one readable message and exit code 1; Ctrl-C is 130."""
    try:
        app()
    except RaytrainError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
