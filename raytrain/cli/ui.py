"""The command `ui`: the run's MLflow pages."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from raytrain.cli.options import ConfigOption, SetOption


def ui(
    config: ConfigOption,
    set: SetOption = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open the run's MLflow pages (Ctrl-C stops the server)."""
    from raytrain.config import load_config
    from raytrain.redaction import with_credentials
    from raytrain.tracking.runs import tracking_uri

    settings = load_config(config, set)
    uri = tracking_uri(settings, settings.run_dir)
    if uri.startswith("http"):
        typer.echo(f"MLflow runs at {uri}")
        return
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", with_credentials(uri)]
    typer.echo(f"MLflow is at http://127.0.0.1:{port} (Ctrl-C stops it)")
    # In its own session, Ctrl-C reaches it only through this process, which ends everything MLflow started.
    done = subprocess.run([*command, "--host", "127.0.0.1", "--port", str(port)], start_new_session=True, check=False)
    raise typer.Exit(done.returncode)
