"""Rows of a corpus that can't be used: counted by corpus and reason, with the first of each as examples, and
reported as one error with file, line and detail where there are too many.

    rejected = RejectedRows()
    rejected.add("digits", BadRow("/data/train.jsonl", 7, "empty_text", "text ''"))
    rejected.merge(RejectedRows())       # what another worker rejected
    rejected.by_reason()                 # Counter({'empty_text': 1})
    rejected.summary()                   # what artifacts record
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from raytrain.data.corpora.types import BadRow, Corpus
from raytrain.errors import ManifestError

NUM_EXAMPLES = 5
_NOT_BAD = {"skipme"}  # rows that the manifest's author left out on purpose
_SHOWN_EACH, _SHOWN = 3, 20
_SHOWN_FILES = 5

Group = tuple[str, str]  # corpus, reason


@dataclass(frozen=True)
class ExampleRow:
    """A rejected row as an artifact records it, below its reason."""

    file: str
    line: int
    detail: str


@dataclass(frozen=True)
class RejectedExamples:
    """How many rows of a corpus were rejected for a reason, and the first of them; an entry of an artifact."""

    corpus: str
    reason: str
    rows: int
    first: list[ExampleRow]

    def __post_init__(self) -> None:
        if not self.first:
            raise ValueError("a reason has no example")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


class Example(NamedTuple):
    """A rejected row and the index of its chunk, by which examples of several workers are ordered."""

    row: BadRow
    chunk: int = 0


@dataclass
class RejectedRows:
    """`counts` and `examples` are by (corpus, reason); `num_rows` counts the usable rows too. `judged_by` describes the
    sample if not every row was checked."""

    counts: Counter[Group] = field(default_factory=Counter)
    examples: dict[Group, list[Example]] = field(default_factory=dict)
    num_rows: int = 0
    judged_by: str = ""

    def add(self, corpus: str, row: BadRow, chunk: int = 0) -> None:
        """Count one row; the first rows of a reason become its examples."""
        self.counts[corpus, row.reason] += 1
        examples = self.examples.setdefault((corpus, row.reason), [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(Example(row, chunk))

    def extend(self, corpus: str, reason: str, rows: int, first: Iterable[ExampleRow]) -> None:
        """Count `rows` rows that come after those counted so far; `first` are their examples."""
        self.counts[corpus, reason] += rows
        added = [Example(BadRow(row.file, row.line, reason, row.detail)) for row in first]
        self.examples[corpus, reason] = [*self.examples.get((corpus, reason), []), *added][:NUM_EXAMPLES]

    def merge(self, partial: RejectedRows) -> None:
        """Add the rows of further chunks; in any order, with the same result."""
        self.counts.update(partial.counts)
        self.num_rows += partial.num_rows
        for group, examples in partial.examples.items():
            both = [*self.examples.get(group, []), *examples]
            self.examples[group] = sorted(both, key=lambda example: (example.chunk, example.row.line))[:NUM_EXAMPLES]

    def number_lines(self, first_lines: Sequence[int]) -> None:
        """Convert the examples' line numbers from 1-based in each chunk to lines of their files; chunk i begins with
        line `first_lines[i]`."""
        for examples in self.examples.values():
            examples[:] = [
                Example(row._replace(line=row.line + first_lines[chunk] - 1), chunk) for row, chunk in examples
            ]

    def selected(self, groups: Iterable[Group]) -> RejectedRows:
        """The rejected rows of these groups alone."""
        chosen = {group for group in groups if group in self.counts}
        counts = Counter({group: number for group, number in self.counts.items() if group in chosen})
        examples = {group: list(examples) for group, examples in self.examples.items() if group in chosen}
        return RejectedRows(counts, examples, self.num_rows, self.judged_by)

    def by_reason(self) -> Counter[str]:
        """Rows of all corpora by reason."""
        reasons: Counter[str] = Counter()
        for (_, reason), number in self.counts.items():
            reasons[reason] += number
        return reasons

    def of_corpus(self, corpus: str) -> dict[str, int]:
        """Rows of one corpus by reason, in the order of the reasons' names."""
        return {reason: number for (name, reason), number in sorted(self.counts.items()) if name == corpus}

    def first(self, corpus: str, reason: str) -> list[ExampleRow]:
        """The examples of a corpus and reason as artifacts record them."""
        rows = [row for row, _ in self.examples.get((corpus, reason), [])]
        return [ExampleRow(row.file, row.line, row.detail) for row in rows]

    def first_of_corpus(self, corpus: str) -> dict[str, list[ExampleRow]]:
        """The examples of one corpus by reason."""
        return {reason: self.first(name, reason) for name, reason in sorted(self.examples) if name == corpus}

    def summary(self) -> list[RejectedExamples]:
        """The counts and examples by corpus and reason, in the order of their names."""
        return [
            RejectedExamples(corpus, reason, self.counts[corpus, reason], self.first(corpus, reason))
            for corpus, reason in sorted(self.examples)
        ]

    def lines(self) -> list[str]:
        """The first rows of each corpus and reason as text, the most frequent reasons first."""
        order = sorted(self.counts, key=lambda group: (group[1] in _NOT_BAD, -self.counts[group], group))
        lines = [
            f"corpus {corpus}: {row.file}:{row.line}: {reason}: {row.detail}"
            for corpus, reason in order
            for row in self.first(corpus, reason)[:_SHOWN_EACH]
        ]
        return lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])

    @property
    def bad(self) -> int:
        """Number of rows that are left out unintentionally."""
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
        examples = "".join(f"\n  {line}" for line in self.lines())
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
                remedy=f"fix these rows, or name other files in {setting}:{examples}",
            )
        if self.too_many(limit):
            raise ManifestError(
                f"{bad} of {self.num_rows} manifest rows are bad in {setting} ({reasons})",
                got=f"{bad / self.num_rows:.2%}",
                allowed=f"data.max_bad_fraction = {limit:.2%}",
                why=f"{self.judged_by} say so" if self.judged_by else None,
                remedy=f"fix these rows or raise the limit:{examples}",
            )
