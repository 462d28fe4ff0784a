"""The content of a serialized SentencePiece model, and the names that tokenizers may have in a model file."""

from __future__ import annotations

import re
from typing import NamedTuple

SPECIAL_TOKENS = "spl_tokens"  # the tokenizer of prompts' tokens, first of an aggregate
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Piece(NamedTuple):
    """A piece of text with its score (a log-probability, or minus the rank of a merge)."""

    text: str
    score: float


def read_pieces(proto: bytes) -> list[Piece]:
    """The pieces of a serialized model by id. Raises `RuntimeError` or `UnicodeDecodeError` for a damaged one."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    numbers = range(processor.get_piece_size())
    return [Piece(processor.id_to_piece(number), processor.get_score(number)) for number in numbers]
