"""The result of `benchmarks.gpu` as tables: which parts ran, and a line per measurement."""

from __future__ import annotations

import importlib.util
from typing import Any

Rows = list[tuple[str, ...]]


def part_rows(document: dict[str, Any]) -> Rows:
    """Part, status, seconds, and the reason if it did not simply finish."""
    return [
        (name, part["status"], f"{part['seconds']:.0f} s", part.get("why", ""))
        for name, part in document["parts"].items()
    ]


def figure_rows(document: dict[str, Any]) -> Rows:
    """Part, measurement, and its figures; rows of a list (kernels, tests) follow one per line."""
    rows: Rows = []
    for name, part in document["parts"].items():
        for title, figures in part["results"].items():
            rows.append((name, title, _joined(figures)))
            for key, values in figures.items():
                if isinstance(values, list) and values and isinstance(values[0], (dict, str)):
                    rows += [(name, f"  {key}", _kernel(value)) for value in values]
    return rows


def _kernel(row: Any) -> str:
    if isinstance(row, dict) and row.keys() == {"name", "calls", "ms", "share"}:
        return f"{row['ms']:8.2f} ms {row['share']:6.1%} {row['calls']:5} × {row['name']}"
    return _joined(row)


def _joined(figures: Any) -> str:
    if not isinstance(figures, dict):
        return str(figures)
    parts = []
    for key, value in figures.items():
        if isinstance(value, dict):
            parts.append(f"{key.replace('_', ' ')} ({_joined(value)})")
        elif not isinstance(value, list):
            parts.append(f"{key.replace('_', ' ')} {value}")
        elif all(isinstance(number, (int, float, type(None))) for number in value):
            parts.append(f"{key.replace('_', ' ')} {' '.join(map(str, value))}")
    return ", ".join(parts)


def print_tables(document: dict[str, Any]) -> None:
    """Print to standard output, with rich if it is installed."""
    machine = document["machine"]
    print(f"\n{machine.get('gpu', machine['processor'])}, torch {machine.get('torch')}, commit {document['commit']}")
    _print(("part", "measured", "figures"), figure_rows(document))
    _print(("part", "ended", "took", "why"), part_rows(document))


def _print(columns: tuple[str, ...], rows: Rows) -> None:
    if importlib.util.find_spec("rich") is None:
        widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns) - 1)]
        for row in [columns, *rows]:
            print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
        print()
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    console.print()
