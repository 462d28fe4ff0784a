"""The program `raytrain`: all commands, and how errors and signals determine the exit code."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from raytrain.cli import clean, config, doctor, experiments, jobs, models, stages, stopping, transcribe, ui
from raytrain.errors import RaytrainError
from raytrain.redaction import guard_output, redacted


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises `Stopped` for Ctrl-C, which Typer would turn into a silent exit."""
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

app.command()(stages.run)
for _name in ("statistics", "assign", "train", "evaluate", "report"):
    app.command(_name, help=stages.STAGE_HELP[_name])(stages.stage_command(_name))
app.command(help=stages.STAGE_HELP["buckets"])(stages.buckets)
app.command(help=stages.STAGE_HELP["oomptimize"])(stages.oomptimize)
for _command in (
    experiments.tune,
    experiments.ablate,
    stages.schedule,
    stages.demo,
    models.convert,
    transcribe.transcribe,
    doctor.doctor,
    clean.clean,
    jobs.submit,
    jobs.status,
    jobs.logs,
    jobs.stop,
    ui.ui,
    config.config,
):
    app.command()(_command)


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
