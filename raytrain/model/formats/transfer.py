"""Start a model from another model's weights: fine-tuning, possibly with another tokenizer or other languages.

Everything but the vocabulary must have the same shape. Rows of the embedding (and of the head, which is tied to it,
with its bias) are kept for the pieces that stay: the same piece of the same language, the same special token.
Rows of new pieces keep their fresh initialization.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple

import torch

from raytrain.errors import CheckpointError
from raytrain.model.canary import Canary
from raytrain.model.formats.portable import EMBEDDING, HEAD, ModelParts
from raytrain.model.formats.sentencepieces import read_pieces

_BIAS = "log_softmax.mlp.layer0.bias"
_ROWS = (EMBEDDING, HEAD, _BIAS)
# The model computes these itself; the position table may have another length.
_CONSTANTS = ("preprocessor.", "transf_decoder._embedding.position_embedding.", "ctc_head.")
_FREE = {
    "vocab_size",
    "max_positions",
    "dropout",
    "prompt_format",
    "label_smoothing",
    "spec_augment",
    "ctc_head",
}


class Transfer(NamedTuple):
    """How many vocabulary rows were kept, and how many are new."""

    kept: int
    new: int


@torch.no_grad()
def initialize_from(model: Canary, tokenizers: dict[str, bytes], parts: ModelParts) -> Transfer:
    """Copy the weights of `parts` into `model`, whose tokenizer is `tokenizers` (see `ModelParts`).

    Raises `CheckpointError` that lists every setting that differs.
    """
    mine, theirs = asdict(model.config), asdict(parts.config)
    different = [name for name in mine if name not in _FREE and mine[name] != theirs[name]]
    if different:
        raise CheckpointError(
            "the model to start from has another shape",
            got=", ".join(f"{name} {theirs[name]}" for name in different),
            allowed=", ".join(f"{name} {mine[name]}" for name in different),
            remedy="set the section model to the shape of train.init_from",
        )
    state = model.state_dict()
    for name, value in parts.state.items():
        if name not in _ROWS and not name.startswith(_CONSTANTS):
            state[name].copy_(value)
    targets, sources = _shared_rows(pieces_of(tokenizers), pieces_of(parts.tokenizers))
    for name in _ROWS:
        state[name][targets] = parts.state[name][sources].to(state[name])
    number, old = model.config.vocab_size, parts.config.vocab_size
    rest = model.config.padded_vocab_size - number
    if rest == parts.config.padded_vocab_size - old:  # padding rows have been trained too
        for name in _ROWS:
            state[name][number:] = parts.state[name][old:].to(state[name])
    return Transfer(len(targets), number - len(targets))


def pieces_of(tokenizers: dict[str, bytes]) -> dict[tuple[str, str], int]:
    """(language, piece) → id."""
    ids: dict[tuple[str, str], int] = {}
    offset = 0
    for name, proto in tokenizers.items():
        pieces = read_pieces(proto)
        ids.update({(name, piece.text): offset + number for number, piece in enumerate(pieces)})
        offset += len(pieces)
    return ids


def _shared_rows(new: dict[tuple[str, str], int], old: dict[tuple[str, str], int]) -> tuple[list[int], list[int]]:
    shared = [piece for piece in new if piece in old]
    return [new[piece] for piece in shared], [old[piece] for piece in shared]
