"""`errors.html`: the worst utterances of a test set word by word, and the most frequent confusions, on one
self-contained page without scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrain.evaluation.worst import Worst, WorstTranscription, WorstTranslation
from raytrain.report.rendering import write_page


def write_errors(out: Path, *, title: str, scores: Mapping[str, Any], worst: Worst) -> Path:
    """Write the page from the body of `scores.json` and the worst utterances; returns its path.

    Its size is bounded because `worst` is. Languages are numbered because their names are untrusted and can't be used
    in a style sheet.
    """
    shown: list[WorstTranscription | WorstTranslation] = [*worst.most_errors, *worst.highest_rates, *worst.translations]
    confused = [row[0] for rows in worst.confusions.values() for row in rows]
    languages = sorted({*(item.lang for item in shown), *confused})
    return write_page(
        out,
        "errors.html",
        title=title,
        scores=scores,
        worst=worst,
        number_of={language: number for number, language in enumerate(languages)},
    )
