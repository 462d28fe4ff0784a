"""Text normalization as in Whisper's evaluation (Radford et al., arXiv 2212.04356, appendix C).

English loses case, punctuation and fillers, and gets one spelling of numbers, contractions and British words; other
languages lose case, punctuation and bracketed text. Languages without spaces are split into characters, so that their
word error rate counts characters.

    normalizer("whisper", "en")("Mr. Smith won't pay twenty dollars.")    # "mister smith will not pay $20"
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})


def normalizer(name: str, language: str) -> Callable[[str], str]:
    """The normalizer for texts of a language (`en`, `en-GB`) before comparison; `none` leaves them unchanged."""
    if name == "none":
        return lambda text: text
    base = base_language(language)
    clean = _english() if base == "en" else _basic(base in WITHOUT_SPACES)
    return lambda text: clean(text).strip()


def base_language(language: str) -> str:
    """A language without its region or script: `zh` of `zh-CN`."""
    return language.replace("_", "-").partition("-")[0].lower()


@cache
def _english() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


@cache
def _basic(split_letters: bool) -> Callable[[str], str]:
    from whisper_normalizer.basic import BasicTextNormalizer

    return BasicTextNormalizer(split_letters=split_letters)
