"""`raytrain config`: the settings, and their values in a configuration."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raytrain.cli.options import SetOption

if TYPE_CHECKING:
    from raytrain.config import Config
    from raytrain.config.reference import Entry

_CELL = 16  # characters of a value in a table
_LEGEND = "lineage: training can't be resumed from a checkpoint of another value"


def config(
    key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="A section or a key, such as train or train.max_steps; by default all."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A configuration whose values to show next to the defaults.")
    ] = None,
    set: SetOption = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per key.")] = False,
) -> None:
    """Explain the settings: default, unit, allowed values and meaning."""
    if set and config is None:
        raise typer.BadParameter("requires --config", param_hint="--set")
    from raytrain.config import load_config
    from raytrain.config.reference import entries, entries_below, nearest

    chosen = entries_below(key) if key else list(entries())
    if key and not chosen:
        close = nearest(key)
        hint = f"did you mean {close}?" if close else "omit the key to show all"
        raise typer.BadParameter(f"there is no setting {key!r}; {hint}", param_hint="KEY")
    loaded = load_config(config, set) if config else None
    if json:
        _print_json(chosen, loaded)
    else:
        _print_tables(chosen, loaded)


def _print_json(chosen: list[Entry], config: Config | None) -> None:
    from dataclasses import asdict

    import orjson

    from raytrain.config.reference import Values
    from raytrain.redaction import redacted

    values = Values(config) if config else None
    for entry in chosen:
        if not entry.is_section:
            facts = {name: fact for name, fact in asdict(entry).items() if name != "is_section"}
            value = {"value": values[entry.key]} if values and entry.key in values else {}
            typer.echo(orjson.dumps(redacted(facts | value)).decode())


def _print_tables(chosen: list[Entry], config: Config | None) -> None:
    from raytrain.config.reference import Values, by_section, heading
    from raytrain.console import Console

    console, values = Console(), Values(config) if config else None
    for section, members in by_section(chosen).items():
        if section:
            typer.echo("\n" + textwrap.fill(heading(section), shutil.get_terminal_size().columns))
        columns: tuple[str, ...] = ("setting", "default", "meaning")
        rows = [_row(entry) for entry in members]
        if values and any(entry.key in values for entry in members):
            columns = ("setting", "default", "value", "meaning")
            shown = [_cut(entry.shown(values[entry.key])) if entry.key in values else "" for entry in members]
            rows = [(*row[:2], value, *row[2:]) for row, value in zip(rows, shown, strict=True)]
        console.table(columns, rows)
    if any(entry.lineage and not entry.is_section for entry in chosen):
        typer.echo(f"\n{_LEGEND}")


def _row(entry: Entry) -> tuple[str, ...]:
    return entry.name, _cut(entry.shown_default), _meaning(entry)


def _cut(text: str) -> str:
    return text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"


def _meaning(entry: Entry) -> str:
    """The help text, then on a separate line the allowed values and whether the key belongs to the lineage."""
    facts = "; ".join(filter(None, (entry.limits, "lineage" if entry.lineage else "")))
    return f"{entry.help}\n{facts}" if facts else entry.help
