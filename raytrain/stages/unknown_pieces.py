"""Which texts the tokenizer can't encode, and whether there are too many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytrain.config import TokenizerSection
from raytrain.data.counts import Counts
from raytrain.errors import ManifestError

_NUM_CHARACTERS, _NUM_SHOWN = 40, 10


@dataclass(frozen=True)
class UnknownPieces:
    """Counts for a corpus' texts in a language: their `tokens`, how many are `unknown` and what `fraction` that is, and
    the most frequent `characters` that the tokenizer can't encode, as (character, count)."""

    corpus: str
    language: str
    tokens: int
    unknown: int
    fraction: float
    characters: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        shown = " ".join(f"{character!r} ({times})" for character, times in self.characters[:_NUM_SHOWN])
        share = f"{self.unknown} of {self.tokens} tokens ({self.fraction:.2%})"
        return f"corpus {self.corpus}, {self.language}: {share}: {shown}"


def unknown_pieces(counts: Counts) -> list[UnknownPieces]:
    """Corpora and languages with texts that the tokenizer can't encode, worst first."""
    groups = []
    for (corpus, language), unknown in counts.unknown.items():
        characters = sorted(counts.characters[corpus, language].items(), key=lambda entry: (-entry[1], entry[0]))
        tokens = counts.text_tokens[corpus, language]
        shown = tuple(characters[:_NUM_CHARACTERS])
        groups.append(UnknownPieces(corpus, language, tokens, unknown, unknown / tokens, shown))
    return sorted(groups, key=lambda group: (-group.fraction, group.corpus, group.language))


def listing_of(groups: Sequence[UnknownPieces]) -> str:
    """One line per group, each after a line break."""
    return "".join(f"\n  {group}" for group in groups)


def check_unknown(unknown: Sequence[UnknownPieces], section: TokenizerSection) -> None:
    """Raise `ManifestError` if more than `max_unknown_fraction` of the tokens in a corpus' texts in a language are
    unknown pieces."""
    limit = section.max_unknown_fraction
    bad = [group for group in unknown if group.fraction > limit]
    if not bad:
        return
    listing = listing_of(bad[:_NUM_SHOWN])
    further = f"\n  and {len(bad) - _NUM_SHOWN} more" if len(bad) > _NUM_SHOWN else ""
    if section.path:
        remedy = (
            "normalize the texts like those that the tokenizer was trained on (lower case, same script), remove rows "
            "in other languages, or use a tokenizer that has these characters: one with byte_fallback, or one that "
            "is trained on these texts (unset tokenizer.path)"
        )
    else:
        remedy = "raise tokenizer.max_sentences, fix the texts"
    raise ManifestError(
        f"the tokenizer can't encode the texts of corpus {bad[0].corpus} in {bad[0].language}",
        got=f"{bad[0].fraction:.2%} unknown pieces",
        allowed=f"tokenizer.max_unknown_fraction = {limit:.2%}",
        why="a model can't learn characters that the tokenizer has no piece for",
        remedy=f"{remedy}, or allow more:{listing}{further}",
    )
