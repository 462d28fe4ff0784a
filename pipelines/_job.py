"""What every job script does: read the configuration, run its stages, turn an expected error into exit code 1."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from raytrain.cluster.pipeline import run_pipeline
from raytrain.config import load_config
from raytrain.console import Console
from raytrain.errors import RaytrainError


def main(*stages: str, description: str) -> None:
    """Parse `--config FILE --set a.b=c`, run `stages` with the settings, exit 1 after a readable error."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", "-c", type=Path, required=True, help="YAML configuration of the run")
    parser.add_argument("--set", "-s", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override")
    arguments = parser.parse_args()
    try:
        run_pipeline(load_config(arguments.config, arguments.set), Console(), stages)
    except RaytrainError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
