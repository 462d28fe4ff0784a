"""Rows that a corpus holds and nobody can use: counted by corpus and reason, the first of each kept, and too many of
them told as one error with file, line and what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from raytrain.data.corpora.types import BadRow, Corpus
from raytrain.errors import ManifestError

NUM_EXAMPLES = 5
_NOT_BAD = {"skipme"}  # rows that the manifest's author left out on purpose
_SHOWN_EACH, _SHOWN = 3, 20
_SHOWN_FILES = 5


@dataclass
class RejectedRows:
    """`counts` and `examples` are by (corpus, reason); `num_rows` counts the usable ones too. `judged_by` says what
    stands for all rows where not each was looked at."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], list[BadRow]] = field(default_factory=dict)
    num_rows: int = 0
    judged_by: str = ""

    def add(self, corpus: str, row: BadRow) -> None:
        """Count one row that is left out."""
        self.counts[corpus, row.reason] += 1
        examples = self.examples.setdefault((corpus, row.reason), [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(row)

    def by_reason(self) -> Counter[str]:
        """Rows of all corpora by reason."""
        reasons: Counter[str] = Counter()
        for (_, reason), number in self.counts.items():
            reasons[reason] += number
        return reasons

    def lines(self) -> list[str]:
        """The first rows of each corpus and reason for a person, the most frequent reasons first."""
        order = sorted(self.counts, key=lambda group: (group[1] in _NOT_BAD, -self.counts[group], group))
        lines = [
            f"corpus {corpus}: {row.file}:{row.line}: {reason}: {row.detail}"
            for corpus, reason in order
            for row in self.examples.get((corpus, reason), [])[:_SHOWN_EACH]
        ]
        return lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])

    @property
    def bad(self) -> int:
        """Rows that are left out, but not on purpose."""
        return sum(number for (_, reason), number in self.counts.items() if reason not in _NOT_BAD)

    def too_many(self, limit: float) -> bool:
        """Whether more than `limit` of the rows are bad."""
        return self.bad > limit * self.num_rows

    def check(self, setting: str, corpora: Sequence[Corpus], usable: int, limit: float) -> None:
        """Raise `ManifestError` where more than `limit` of the rows are bad or none is usable.

        `setting` is where the corpora are configured, such as `data.dev`.
        """
        bad = self.bad
        reasons = ", ".join(f"{number} {reason}" for reason, number in self.by_reason().most_common())
        listing = "".join(f"\n  {line}" for line in self.lines())
        if not self.counts and not usable:
            files = [path for corpus in corpora for path in corpus.paths]
            further = f" and {len(files) - _SHOWN_FILES} more" if len(files) > _SHOWN_FILES else ""
            raise ManifestError(
                f"the manifests of {setting} have no rows",
                got=f"{', '.join(files[:_SHOWN_FILES])}{further}",
                remedy=f"check that {setting} names the right files and that they are not empty",
            )
        if not usable:
            raise ManifestError(
                f"the manifests of {setting} have no usable row",
                got=f"{self.num_rows} rows, none usable ({reasons})",
                remedy=f"mend these rows, or name other files in {setting}:{listing}",
            )
        if self.too_many(limit):
            raise ManifestError(
                f"{bad} of {self.num_rows} manifest rows are bad in {setting} ({reasons})",
                got=f"{bad / self.num_rows:.2%}",
                allowed=f"data.max_bad_fraction = {limit:.2%}",
                why=f"{self.judged_by} say so" if self.judged_by else None,
                remedy=f"mend these rows or raise the limit:{listing}",
            )
