"""The decoder's training sequences, for utterances and whole blocks: prompt, text, end of text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from raytrain.data.corpora.blocks import Block
from raytrain.data.corpora.types import BadRow, Problem
from raytrain.data.text.prompt import key_prompt
from raytrain.data.text.slots import PromptKey
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.data.text.words import TextEncoder
from raytrain.errors import TokenizerError

_MAX_PROMPTS = 10_000


@dataclass(frozen=True)
class EncodedBlock:
    """`ids`: (Σ lengths,) int32, row after row; `lengths`, `prompt_lengths`: (N,) int64."""

    ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray


class BlockEncoder:
    """Counts and encodes blocks; `by_words` as in `TextEncoder`."""

    def __init__(self, tokenizer: CanaryTokenizer, prompt_format: str, *, by_words: bool = True) -> None:
        self._tokenizer, self._format = tokenizer, prompt_format
        self._texts = {name: tokenizer.text_encoder(name, by_words=by_words) for name in tokenizer.languages}
        self._prompts: dict[PromptKey, np.ndarray | Problem] = {}

    def check(self, block: Block) -> Block:
        """The block without the rows whose prompt this tokenizer can't encode; those are added to its bad rows."""
        prompts = [self._prompt(key) for key in block.prompts]
        problems = {index: prompt for index, prompt in enumerate(prompts) if isinstance(prompt, tuple)}
        if not problems:
            return block
        rows = np.isin(block.prompt_of, list(problems))
        bad = [
            BadRow(block.chunk.path, int(number), *problems[prompt])
            for number, prompt in zip(block.numbers[rows], block.prompt_of[rows].tolist(), strict=True)
        ]
        return block.without(rows, bad)

    def count(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the sequences and of their prompts, (N,) int64 each, of a checked block."""
        return self.count_unknown(block)[:2]

    def count_unknown(self, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Like `count`, and the number of unknown ids in each text, (N,) int64."""
        prompts = self._prompt_lengths(block)
        lengths, unknown = prompts + 1, np.zeros(len(block), np.int64)
        for rows, encoder in self._by_language(block):
            texts = [block.texts[i] for i in rows] if len(rows) < len(block) else block.texts
            counts, unknown[rows] = encoder.count_unknown(texts)
            lengths[rows] += counts
        return lengths, prompts, unknown

    def unwritable(self, text: str, language: str) -> Counter[str]:
        """Characters of a text that a language's model can't encode, with their counts."""
        return self._texts[language].unwritable(text)

    def encode(self, block: Block) -> EncodedBlock:
        """The sequences of a checked block."""
        prompts = self._prompt_lengths(block)
        heads = [self._prompt(key) for key in block.prompts]
        head_bytes = [head.tobytes() if isinstance(head, np.ndarray) else b"" for head in heads]
        texts: list[bytes] = [b""] * len(block)
        for rows, encoder in self._by_language(block):
            encoded = encoder.encode([block.texts[i] for i in rows])
            for row, ids in zip(rows, encoded, strict=True):
                texts[row] = ids
        end = np.array([self._tokenizer.eos_id], np.int32).tobytes()
        pieces = [
            part for head, text in zip(block.prompt_of, texts, strict=True) for part in (head_bytes[head], text, end)
        ]
        lengths = prompts + 1 + np.array([len(text) // 4 for text in texts], np.int64)
        return EncodedBlock(np.frombuffer(b"".join(pieces), np.int32), lengths, prompts)

    def _by_language(self, block: Block) -> list[tuple[np.ndarray, TextEncoder]]:
        by_language = block.by_prompt([key.target_lang for key in block.prompts])
        return [(np.flatnonzero(rows), self._texts[language]) for language, rows in by_language if rows.any()]

    def _prompt_lengths(self, block: Block) -> np.ndarray:
        heads = [self._prompt(key) for key in block.prompts]
        lengths = np.array([len(head) if isinstance(head, np.ndarray) else 0 for head in heads], np.int64)
        return lengths[block.prompt_of] if len(heads) else np.zeros(0, np.int64)

    def _prompt(self, key: PromptKey) -> np.ndarray | Problem:
        try:
            prompt = self._prompts.get(key)
        except TypeError:  # a slot that holds a list
            return self._make_prompt(key)
        if prompt is None:
            if len(self._prompts) >= _MAX_PROMPTS:
                self._prompts.clear()
            prompt = self._prompts[key] = self._make_prompt(key)
        return prompt

    def _make_prompt(self, key: PromptKey) -> np.ndarray | Problem:
        languages = self._tokenizer.languages
        if not {key.source_lang, key.target_lang} <= set(languages):
            shown = f"{key.source_lang} → {key.target_lang}; the tokenizer has {', '.join(sorted(languages))}"
            return "unknown_language", shown
        try:
            return np.array(key_prompt(self._tokenizer, key, self._format), np.int32)
        except TokenizerError as error:
            return "bad_slot", str(error)
