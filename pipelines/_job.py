"""What every job script does: read the configuration, run its stages, and turn an expected error into exit code 1."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from raytrain.cli import stopping
from raytrain.config import load_config
from raytrain.console import Console
from raytrain.errors import RaytrainError
from raytrain.redaction import guard_output, redacted
from raytrain.stages.pipeline import run_pipeline


def main(*stages: str, description: str, choose: bool = False) -> None:
    """Parse `--config FILE --set a.b=c`, run `stages` with the settings, exit 1 after a readable error.

    With `choose`, the command line may name stages; then only those run.
    """
    guard_output()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", "-c", type=Path, required=True, help="YAML configuration of the run")
    parser.add_argument("--set", "-s", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override")
    parser.add_argument("--take-over", action="store_true", help="take the run folder from the process that owns it")
    if choose:
        parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"run only these: {', '.join(stages)}")
    arguments = parser.parse_args()
    named = tuple(arguments.stages) if choose else ()
    unknown = [name for name in named if name not in stages]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(stages)}")
    stopping.install()
    stopping.say_at_stop(stopping.RESUMABLE)
    with stopping.exit_codes():
        try:
            config = load_config(arguments.config, arguments.set)
            run_pipeline(config, Console(), named or stages, take_over=arguments.take_over)
        except RaytrainError as error:
            if not stopping.is_asked():
                print(f"error: {redacted(str(error))}", file=sys.stderr)
            raise SystemExit(1) from None
