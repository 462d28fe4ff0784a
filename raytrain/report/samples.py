"""Sample transcripts of the test set, with the words that differ from the reference marked."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from raytrain.report.run_files import Body

NUM_SAMPLES = 12


@dataclass(frozen=True)
class Sample:
    """A transcript: `words` of the hypothesis, each with whether it differs."""

    lang: str
    text: str
    words: list[tuple[str, bool]]


def samples_of(hypotheses: Sequence[Body]) -> list[Sample]:
    """The first transcripts of each language in turn."""
    by_language: dict[str, list[Body]] = {}
    for row in hypotheses:
        if isinstance(row.get("hypothesis"), str) and isinstance(row.get("text"), str):
            by_language.setdefault(str(row.get("lang", "")), []).append(row)
    chosen: list[tuple[str, Body]] = []
    for number in range(NUM_SAMPLES):
        chosen += [(language, rows[number]) for language, rows in by_language.items() if number < len(rows)]
    return [
        Sample(language, row["text"], marked(row.get("reference", row["text"]), row["hypothesis"]))
        for language, row in chosen[:NUM_SAMPLES]
    ]


def marked(reference: str, hypothesis: str) -> list[tuple[str, bool]]:
    """Words of the hypothesis, each with whether it differs; a deleted word appears as a gap."""
    old, new = reference.split(), hypothesis.split()
    words: list[tuple[str, bool]] = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words += [(word, kind != "equal") for word in new[start:end]]
        if kind == "delete":
            words.append(("␣", True))
    return words
