"""Token ids of many texts by one SentencePiece model, each word encoded once.

Speech corpora repeat their words, and counting spends its time on encoding. Encoding word by word is exact if no piece
crosses a space and words do not affect each other otherwise: see `words_are_independent`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from sentencepiece import SentencePieceProcessor

from raytrain.errors import TokenizerError

_MAX_WORDS = 500_000
_UNKNOWN = 32  # a count packs the number of ids into its lower bits, and the number of unknown ids above
_LONGEST_WORD = 64  # a text without spaces is not worth caching
_SLOT_BITS = 18
_SLICE = 256  # texts looked up together: their arrays fit into the CPU cache and avoid page faults
_MIX_LOW, _MIX_HIGH = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
# Masks of the first n bytes of eight, n from 0 to 8, in a little-endian word.
_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)


def words_are_independent(processor: SentencePieceProcessor) -> bool:
    """Whether the ids of a text are the concatenated ids of its words.

    This holds if (1) spaces are single and each word begins with ▁; (2) no piece has ▁ after its first character, so no
    merge spans two words; (3) ▁ itself is a piece, as SentencePiece joins neighboring unknown pieces; (4) all scores
    are whole numbers, as BPE's ranks are: a unigram model's sums of log-probabilities are rounded, and may break a tie
    differently elsewhere in the text.
    """
    pieces = range(processor.get_piece_size())
    return (
        processor.normalize(" a  b ") == "▁a▁b"
        and processor.piece_to_id("▁") != processor.unk_id()
        and not any("▁" in processor.id_to_piece(i)[1:] for i in pieces)
        and all(float(processor.get_score(i)).is_integer() for i in pieces)
    )


Value = TypeVar("Value")


class _Memory(dict[str, Value]):
    """Cached values of words, computed on first use."""

    def __init__(self, make: Callable[[str], Value]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, word: str) -> Value:
        value = self._make(word)
        if len(word) <= _LONGEST_WORD:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = value
        return value


class _CountTable:
    """Packed counts (see `_UNKNOWN`) of short words, looked up for a whole block at a time; packed counts can be added
    directly.

    A word of up to 16 bytes is two integers and serves as its own key, so a hit is exact. A slot belongs to the first
    word that hashes to it, most likely a frequent one; colliding words are looked up one by one.
    """

    def __init__(self, count: Callable[[str], int]) -> None:
        self._count = count
        self._low, self._high = np.zeros((2, 1 << _SLOT_BITS), np.uint64)
        self._counts = np.zeros(1 << _SLOT_BITS, np.int64)

    def count(self, texts: Sequence[str]) -> np.ndarray | None:
        """Packed counts of each text, (N,) int64; None for texts with unusual whitespace."""
        data = "\n".join(texts).encode()
        padded = np.frombuffer(data + bytes(16), np.uint8)
        text = padded[: len(data)]
        line_feeds = text == 10
        if np.count_nonzero(line_feeds) != len(texts) - 1 or _has_unusual_space(text):
            return None
        gaps = np.flatnonzero(line_feeds | (text == 32))
        starts, ends = np.append(0, gaps + 1), np.append(gaps, len(data))
        sizes = ends - starts
        eights = np.ndarray((len(data) + 9,), "<u8", padded, strides=(1,))
        low = eights[starts] & _FIRST_BYTES[np.minimum(sizes, 8)]
        high = eights[starts + 8] & _FIRST_BYTES[(sizes - 8).clip(0, 8)]
        slots = ((low * _MIX_LOW) ^ (high * _MIX_HIGH)) >> np.uint64(64 - _SLOT_BITS)
        counts = self._counts[slots]
        for word in np.flatnonzero((self._low[slots] != low) | (self._high[slots] != high) | (sizes > 16)).tolist():
            slot = slots[word]
            counts[word] = self._count(data[starts[word] : ends[word]].decode())
            if sizes[word] <= 16 and not self._low[slot]:
                self._low[slot], self._high[slot], self._counts[slot] = low[word], high[word], counts[word]
        return np.add.reduceat(counts, np.append(0, np.flatnonzero(line_feeds[gaps]) + 1))


def _has_unusual_space(text: np.ndarray) -> bool:
    """Whether UTF-8 contains NUL, or whitespace (by `str.split`) other than space and line feed."""
    if ((text < 32) & (text != 10)).any():
        return True
    for lead, second_and_third in _UNUSUAL_SPACES.items():
        for second, thirds in second_and_third.items():
            positions = np.flatnonzero(text[: -1 - bool(thirds)] == lead) + 1
            positions = positions[text[positions] == second]
            if len(positions) and (not thirds or np.isin(text[positions + 1], thirds).any()):
                return True
    return False


def _unusual_spaces() -> dict[int, dict[int, list[int]]]:
    """UTF-8 of non-ASCII whitespace: first byte → second byte → third bytes, none for two bytes in all."""
    spaces: dict[int, dict[int, list[int]]] = {}
    for number in range(128, 0x10000):
        if chr(number).isspace():
            first, second, *third = chr(number).encode()
            spaces.setdefault(first, {}).setdefault(second, []).extend(third)
    return spaces


_UNUSUAL_SPACES = _unusual_spaces()


class TextEncoder:
    """Counts and ids of texts by one model; `offset` is added to every id. Runs of whitespace count as single spaces.

    With `by_words`, words are cached if that is exact, and one text of every call is encoded as a whole as a check: a
    difference raises `TokenizerError`.
    """

    def __init__(self, processor: SentencePieceProcessor, offset: int = 0, *, by_words: bool = True) -> None:
        self._processor, self._offset = processor, offset
        self.by_words = by_words and words_are_independent(processor)
        self._unknown_id = processor.unk_id()
        self._counts = _Memory(lambda word: self._packed(processor.encode(word)))
        self._unwritable = _Memory(self._unknown_in)
        self._table = _CountTable(self._counts.__getitem__)
        self._ids = _Memory(lambda word: self._bytes(processor.encode(word)))

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """Number of ids of each text, (N,) int64."""
        return self.count_unknown(texts)[0]

    def count_unknown(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Number of ids of each text, and how many of them are unknown, (N,) int64 each."""
        if not self.by_words:
            packed = np.array([self._packed(ids) for ids in self._whole(texts)], np.int64)
        elif not texts:
            packed = np.zeros(0, np.int64)
        else:
            packed = np.concatenate([self._count_slice(texts[at : at + _SLICE]) for at in range(0, len(texts), _SLICE)])
        unknown = packed >> _UNKNOWN
        counts = packed - (unknown << _UNKNOWN)
        if self.by_words and texts:
            self._check(texts[0], int(counts[0]))
        return counts, unknown

    def unwritable(self, text: str) -> Counter[str]:
        """Characters of a normalized text that the model can't encode, with their counts."""
        characters: Counter[str] = Counter()
        for part in text.split() if self.by_words else (" ".join(text.split()),):
            characters.update(self._unwritable[part])
        return characters

    def _unknown_in(self, text: str) -> str:
        ids, pieces = self._processor.encode(text), self._processor.encode_as_pieces(text)
        unknown = [piece for number, piece in zip(ids, pieces, strict=True) if number == self._unknown_id]
        return "".join(unknown).replace("▁", "")

    def _packed(self, ids: list[int]) -> int:
        return len(ids) + (ids.count(self._unknown_id) << _UNKNOWN)

    def _count_slice(self, texts: Sequence[str]) -> np.ndarray:
        counts = self._table.count(texts)
        if counts is None:
            count_of = self._counts.__getitem__
            counts = np.array([sum(map(count_of, text.split())) for text in texts], np.int64)
        return counts

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of each text as int32 bytes."""
        if not self.by_words:
            return [self._bytes(ids) for ids in self._whole(texts)]
        ids_of = self._ids.__getitem__
        encoded = [b"".join(map(ids_of, text.split())) for text in texts]
        if texts:
            self._check(texts[0], len(encoded[0]) // 4)
        return encoded

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode([" ".join(text.split()) for text in texts])

    def _bytes(self, ids: list[int]) -> bytes:
        return (np.array(ids, np.int32) + np.int32(self._offset)).tobytes()

    def _check(self, text: str, count: int) -> None:
        whole = len(self._processor.encode(" ".join(text.split())))
        if whole != count:
            raise TokenizerError(
                "a text has different tokens as a whole than word by word",
                got=f"{whole} and {count} tokens: {text[:80]!r}",
                why="the tokenizer's normalizer joins or splits words",
                remedy="set tokenizer.by_words to false",
            )
