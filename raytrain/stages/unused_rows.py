"""Messages about rows and corpora that training can't use, as counted by `statistics` and `assign`."""

from __future__ import annotations

from collections.abc import Iterable

from raytrain.data.corpora.rejected import RejectedExamples
from raytrain.stages.context import Context

_NUM_FILES = 3


def show_rejected(context: Context, rejected: Iterable[RejectedExamples]) -> None:
    """Print a table of rejected rows by corpus and reason, with the first example of each."""
    rows = []
    for entry in rejected:
        first = entry.first[0]
        rows.append((entry.corpus, entry.reason, str(entry.rows), f"{first.file}:{first.line}: {first.detail}"))
    if rows:
        context.console.note(("corpus", "rejected because", "rows", "first"), rows)


def warn_of_unused_corpora(context: Context, names: set[str]) -> None:
    """Warn about corpora without a usable row, which neither their weights nor the report would reveal."""
    for corpus in context.config.data.corpora("train"):
        if corpus.name in names:
            files = ", ".join(corpus.paths[:_NUM_FILES])
            context.console.warn(f"corpus {corpus.name} has no row that training can use: {files}")
