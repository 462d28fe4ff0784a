"""Random models of the shipped shapes, with a tokenizer of the published size, for benchmarks that need no data.

Needs only torch, numpy and sentencepiece, which is what a GPU machine without a package registry has.
"""

from __future__ import annotations

import io
import random
from dataclasses import replace
from functools import cache
from typing import Any

import sentencepiece
import torch

from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.model.formats.portable import ModelParts

# The model sections of configs/<name>.yaml, whose reader needs pydantic and PyYAML; a test compares them.
SHAPES: dict[str, dict[str, Any]] = {
    "canary-180m-flash": {
        "encoder_layers": 17,
        "encoder_width": 512,
        "encoder_heads": 8,
        "decoder_layers": 4,
        "decoder_width": 1024,
        "decoder_heads": 8,
        "vocab_size": 5248,
    },
    "canary-1b-flash": {
        "encoder_layers": 32,
        "encoder_width": 1024,
        "encoder_heads": 8,
        "decoder_layers": 4,
        "decoder_width": 1024,
        "decoder_heads": 8,
        "vocab_size": 5248,
    },
    "canary-1b": {
        "encoder_layers": 24,
        "encoder_width": 1024,
        "encoder_heads": 8,
        "decoder_layers": 24,
        "decoder_width": 1024,
        "decoder_heads": 8,
        "vocab_size": 4128,
        "max_positions": 512,
        "prompt_format": "canary",
    },
    "canary-tiny": {
        "encoder_layers": 6,
        "encoder_width": 192,
        "encoder_heads": 4,
        "subsampling_channels": 64,
        "decoder_layers": 3,
        "decoder_width": 192,
        "decoder_heads": 4,
        "max_positions": 512,
        "vocab_size": 512,
    },
}


def config_of(name: str) -> ModelConfig:
    """The model section of `configs/<name>.yaml`."""
    return ModelConfig(**SHAPES[name])


def random_model(config: ModelConfig, device: str | torch.device, *, seed: int = 0) -> Canary:
    """A model with weights initialized directly on the device: a CPU takes 17 s for 0.9 billion of them."""
    torch.manual_seed(seed)
    with torch.device(device):
        return Canary(config)


def _train(lines: list[str], size: int, symbols: list[str]) -> bytes:
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=writer,
        model_type="bpe",
        vocab_size=size,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        user_defined_symbols=symbols,
        num_threads=1,
        minloglevel=2,
    )
    return writer.getvalue()


@cache
def tokenizers(num_specials: int, languages: int, pieces: int) -> dict[str, bytes]:
    """SentencePiece models whose sizes add up to num_specials + languages·pieces, trained on random words."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 9))) for _ in range(3000)]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(2000)]
    names = ("en", "de", "es", "fr")[:languages]
    slots = "nospeech startoftranscript endoftext pnc nopnc startofcontext itn noitn timestamp notimestamp diarize"
    slots += " nodiarize emo:undefined transcribe translate"
    symbols = [f"<|{name}|>" for name in (*slots.split(), *names)] + ["<pad>"]
    symbols += [f"<|spltoken{i}|>" for i in range(num_specials - len(symbols) - 2)]
    specials = _train([" ".join(symbols[:5])], num_specials, symbols)
    per_language = _train(lines, pieces, [])
    return {"spl_tokens": specials, **{name: per_language for name in names}}


def random_parts(
    name: str, *, seed: int = 0, never_ends: bool = True, device: str | torch.device = "cpu"
) -> ModelParts:
    """A model of `configs/<name>.yaml` with random weights on `device`.

    With `never_ends` the end of text has probability zero: every utterance is decoded up to its length cap, so that
    models are compared at equal output length.
    """
    config = config_of(name)
    languages = 4 if config.vocab_size >= 4096 else 1
    pieces = 1024 if languages == 4 else 256
    models = tokenizers(config.vocab_size - languages * pieces, languages, pieces)
    tokenizer = CanaryTokenizer(models)
    model = random_model(replace(config, vocab_size=tokenizer.vocab_size), device, seed=seed)
    if never_ends:
        model.log_softmax.mlp["layer0"].bias.data[tokenizer.eos_id] = -1e4
    return ModelParts.of(model, models)
