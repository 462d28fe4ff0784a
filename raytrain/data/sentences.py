"""A sample of sentences to train tokenizers on: by language, over all corpora, independent of how they are split into
chunks.

Each utterance has its own hash, and a language's sample is its utterances with the lowest hashes, so samples of parts
merge into the sample of the whole, in any order. Languages share the sample: a small language keeps all of its
sentences, and the large ones get equal numbers.

    sample = SentenceSample(1_000_000)
    sample.add_block(block)        # on each worker, chunk by chunk
    sample.add(partial)            # on the driver
    sample.texts()                 # {"de": [...], "en": [...]}
"""

from __future__ import annotations

import heapq
from collections import Counter
from hashlib import blake2b

import numpy as np

from raytrain.data.corpora.blocks import Block

_SEED = b"raytrain.sentences/1"  # not the run's seed: runs that differ only in their seed share a tokenizer
_TRIM_AT = 1 << 16  # sentences that are buffered before the sample is trimmed

_Sentence = tuple[int, str]  # hash, text


class SentenceSample:
    """At most `most` sentences of all languages together, but at least one of each; `num_rows` counts all rows seen."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.num_rows: Counter[str] = Counter()
        self._kept: dict[str, list[_Sentence]] = {}
        self._highest: dict[str, int] = {}  # hashes above which a language needs no more sentences
        self._waiting = 0

    def add_block(self, block: Block) -> None:
        """Add the rows of a block by the language of their texts."""
        languages = np.array([key.target_lang for key in block.prompts], object)[block.prompt_of]
        offsets = block.offset_ms.tolist()
        for language, path, offset, text in zip(languages, block.paths, offsets, block.texts, strict=True):
            self.num_rows[language] += 1
            # Hash the utterance, not its text: otherwise all or none that say "yes" would be drawn.
            name = f"{language}\0{path}\0{offset}\0{text}".encode(errors="surrogatepass")
            number = int.from_bytes(blake2b(name, digest_size=8, key=_SEED).digest(), "big")
            if number <= self._highest.get(language, number):
                self._keep(language, [(number, " ".join(text.split()))])

    def add(self, partial: SentenceSample) -> None:
        """Merge another worker's sample; in any order, with the same result."""
        self.num_rows.update(partial.num_rows)
        for language, sentences in partial._kept.items():
            self._keep(language, sentences)

    def texts(self) -> dict[str, list[str]]:
        """The sampled sentences by language."""
        self._trim()
        return {language: [text for _, text in sorted(kept)] for language, kept in sorted(self._kept.items())}

    def _keep(self, language: str, sentences: list[_Sentence]) -> None:
        self._kept.setdefault(language, []).extend(sentences)
        self._waiting += len(sentences)
        if self._waiting > max(_TRIM_AT, self.most):
            self._trim()

    def _trim(self) -> None:
        # More rows only lower a language's quota, so a sentence dropped here is in no later sample either.
        quota = quota_of_each(self.num_rows, self.most)
        for language, kept in self._kept.items():
            if len(kept) > quota:
                self._kept[language] = heapq.nsmallest(quota, kept)
                self._highest[language] = self._kept[language][-1][0]
        self._waiting = 0


def quota_of_each(num_rows: Counter[str], most: int) -> int:
    """The maximum number of rows per language such that the total is at most `most`; at least 1."""
    left = most
    for number, rows in enumerate(sorted(num_rows.values())):
        share = left // (len(num_rows) - number)
        if rows > share:
            return max(1, share)
        left -= rows
    return max(1, most)
