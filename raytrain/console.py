"""Console output, with secrets redacted: one line per finished stage, a progress bar while a stage runs, and
warnings."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from raytrain.redaction import redacted


class Console:
    """Prints to standard error, leaving standard output free for results."""

    def __init__(self, quiet: bool = False) -> None:
        self.rich = RichConsole(stderr=True, quiet=quiet)

    def say(self, text: str) -> None:
        """One line."""
        self.rich.print(redacted(text), highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.rich.print(f"warning: {redacted(text)}", style="yellow", highlight=False, markup=False)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table on standard output, as a command's result."""
        RichConsole().print(_table(columns, rows))

    def note(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table among the messages."""
        self.rich.print(_table(columns, rows))

    def skipped(self, stage: str) -> None:
        """Report that a stage is up to date."""
        self.rich.print(f"[dim]·[/dim] {stage:<11} [dim]up to date[/dim]", highlight=False)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Context around a stage; call the yielded function with a summary of what it did."""
        start = time.perf_counter()
        summary = ""

        def finish(text: str) -> None:
            nonlocal summary
            summary = text

        yield finish
        elapsed = time.perf_counter() - start
        summary = redacted(summary)
        self.rich.print(f"[green]✓[/green] {name:<11} {summary} [dim]({elapsed:.1f} s)[/dim]", highlight=False)

    @contextlib.contextmanager
    def progress(self, text: str, total: int | None) -> Iterator[Callable[..., None]]:
        """A progress bar; call the yielded function with `completed=`, `advance=`, `text=` or `total=`."""
        columns: tuple[Any, ...] = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.rich, transient=True) as bar:
            task = bar.add_task(text, total=total)

            def update(
                *,
                advance: int | None = None,
                completed: int | None = None,
                text: str | None = None,
                total: int | None = None,
            ) -> None:
                bar.update(task, advance=advance, completed=completed, description=text, total=total)

            yield update


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Numbers are right-aligned and never truncated; long text is folded."""
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(columns):
        values = [row[index] for row in rows]
        is_number = all(value[:1].isdigit() for value in values)
        longest = max(map(len, [*name.split(), *values]), default=0)
        table.add_column(
            name,
            justify="right" if is_number else "left",
            overflow="fold",
            min_width=longest if is_number or longest <= 32 else None,
        )
    for row in rows:
        table.add_row(*map(escape, map(redacted, row)))
    return table
