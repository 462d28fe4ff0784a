"""Aggregate tokenizer: one SentencePiece model per language behind one model of special tokens.

Ids are concatenated in order, specials first: id = sub-id + offset of its language. Ids of special tokens are read from
the special model, never assumed. On disk a tokenizer is a folder of `.model` files and `tokenizer.json`.

    tokenizer = CanaryTokenizer.load(Path("runs/demo/tokenizer"))
    tokenizer.decode(tokenizer.encode_text("three seven", "en"))     # 'three seven'
"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import sentencepiece

from raytrain.data.text.slots import check_format
from raytrain.data.text.words import TextEncoder
from raytrain.errors import ArtifactError, TokenizerError
from raytrain.storage.artifacts import atomic_write_bytes, read_json, write_json

FORMAT = "raytrain.tokenizer/1"
SPECIALS = "spl_tokens"
EOS, BOS, PAD, NOSPEECH = "<|endoftext|>", "<|startoftranscript|>", "<pad>", "<|nospeech|>"
# A language becomes a file name and a special token, and manifests may hold anything.
_LANGUAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MOST_ROUNDS = 16
_SENTENCE_BYTES = 4192  # SentencePiece's limit of a sentence
_COMMON = (NOSPEECH, PAD, EOS, BOS, "<|pnc|>", "<|nopnc|>")
# NeMo's order of the special tokens after <unk>; the languages follow.
_SPECIALS_OF = {
    "canary": (*_COMMON, "<|translate|>", "<|transcribe|>"),
    "canary2": (
        *_COMMON,
        "<|startofcontext|>",
        "<|emo:undefined|>",
        "<|emo:neutral|>",
        "<|itn|>",
        "<|noitn|>",
        "<|timestamp|>",
        "<|notimestamp|>",
        "<|diarize|>",
        "<|nodiarize|>",
    ),
}
# Not in NeMo's published models; they come last so that all other ids match NeMo's.
_FURTHER = {"canary": (), "canary2": ("<|emo:happy|>", "<|emo:sad|>", "<|emo:angry|>")}
_train_sentencepiece = partial(
    sentencepiece.SentencePieceTrainer.train,
    unk_id=0,
    bos_id=-1,
    eos_id=-1,
    pad_id=-1,
    character_coverage=1.0,
    hard_vocab_limit=False,
    minloglevel=2,
)
# A language's token is <|name|>, so a language called pnc would be mistaken for a slot's value.
_TAKEN = {SPECIALS, *(token[2:-2] for tokens in _SPECIALS_OF.values() for token in tokens if token.startswith("<|"))}


@dataclass(frozen=True)
class TokenizerBody:
    """The content of `tokenizer.json`."""

    languages: list[str]
    vocab_size: int
    tokenizer_id: str


class CanaryTokenizer:
    """`models` maps `spl_tokens`, then each language, to its serialized SentencePiece model, in id order."""

    def __init__(self, models: dict[str, bytes]) -> None:
        if next(iter(models), None) != SPECIALS or len(models) < 2:
            raise TokenizerError(
                "an aggregate tokenizer needs special tokens first, then languages",
                got=list(models),
                remedy=f"pass {SPECIALS} as the first model and at least one language",
            )
        _check_languages(name for name in models if name != SPECIALS)
        self._models = dict(models)
        self._processors = {}
        self._offsets: dict[str, int] = {}
        size = 0
        for name, proto in models.items():
            processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self._processors[name], self._offsets[name] = processor, size
            size += processor.get_piece_size()
        self.vocab_size = size

    def __reduce__(self) -> tuple[type[CanaryTokenizer], tuple[dict[str, bytes]]]:
        return CanaryTokenizer, (self._models,)

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages in id order."""
        return tuple(name for name in self._models if name != SPECIALS)

    @property
    def models(self) -> dict[str, bytes]:
        """Serialized SentencePiece models in id order."""
        return dict(self._models)

    @cached_property
    def id(self) -> str:
        """Content id of all models."""
        return _models_id(self._models)

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        processor = self._processors[SPECIALS]
        return {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}

    def special(self, token: str) -> int:
        """Id of a special token. Raises `TokenizerError` that lists the special tokens."""
        number = self._special_ids.get(token)
        if number is None:
            raise TokenizerError(
                "the tokenizer lacks a special token",
                got=token,
                allowed=", ".join(sorted(self._special_ids)),
                remedy="set model.prompt_format to the one that the tokenizer was made for, or train another tokenizer",
            )
        return number

    @cached_property
    def pad_id(self) -> int:
        """Id that pads short rows."""
        return self.special(PAD)

    @cached_property
    def bos_id(self) -> int:
        """Id of the start of the transcript."""
        return self.special(BOS)

    @cached_property
    def eos_id(self) -> int:
        """Id of the end of the text."""
        return self.special(EOS)

    def encode_text(self, text: str, language: str) -> list[int]:
        """Ids of a text by its language's model. Raises `TokenizerError` for an unknown language."""
        processor, offset = self._processor(language), self._offsets[language]
        return [offset + piece for piece in processor.encode(text)]

    def _processor(self, language: str) -> sentencepiece.SentencePieceProcessor:
        processor = self._processors.get(language) if language != SPECIALS else None
        if processor is None:
            raise TokenizerError(
                "unknown language",
                got=language,
                allowed=", ".join(self.languages),
                remedy="name one of these, or train or take a tokenizer that has the language",
            )
        return processor

    def normalize(self, text: str, language: str) -> str:
        """A text normalized as this tokenizer would write it: through its language's normalizer and NFC, with single
        spaces. Decoded text is unchanged by it, so references and hypotheses are comparable.

        Raises `TokenizerError` for an unknown language.
        """
        processor = self._processor(language)
        text = " ".join(text.split())
        # One rule's output may be changed by another (ﬁ with an accent): a hypothesis has been normalized, a reference
        # never. A tokenizer's rules may also go around in circles.
        for _ in range(_MOST_ROUNDS):
            before, text = text, " ".join(processor.normalize(text).replace("▁", " ").split())
            if text == before:
                break
        return " ".join(unicodedata.normalize("NFC", text).split())

    def text_encoder(self, language: str, *, by_words: bool = True) -> TextEncoder:
        """Encoder of many texts of one language; see `raytrain.data.text.words`."""
        return TextEncoder(self._processors[language], self._offsets[language], by_words=by_words)

    def starts_word(self, number: int) -> bool:
        """Whether an id's piece begins with whitespace."""
        name = list(self._offsets)[bisect_right(list(self._offsets.values()), number) - 1]
        piece = number - self._offsets[name]
        return number < self.vocab_size and self._processors[name].id_to_piece(piece).startswith("▁")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids: specials dropped, pieces joined, ▁ as space, byte pieces read as UTF-8."""
        names, starts = list(self._offsets), list(self._offsets.values())
        pieces: list[bytes] = []
        for number in ids:
            if number >= self.vocab_size:  # the head's padding rows have no piece
                continue
            name = names[bisect_right(starts, number) - 1]
            if name == SPECIALS:
                continue
            piece = number - self._offsets[name]
            processor = self._processors[name]
            if processor.is_byte(piece):
                pieces.append(bytes([int(processor.id_to_piece(piece)[1:-1], 16)]))
            elif not processor.is_control(piece):
                pieces.append(processor.id_to_piece(piece).encode())
        return b"".join(pieces).decode(errors="replace").replace("▁", " ").strip()

    def save(self, folder: Path) -> str:
        """Write the models and `tokenizer.json`; returns the tokenizer's id."""
        for name, proto in self._models.items():
            atomic_write_bytes(Path(folder) / f"{name}.model", proto)
        body = {"languages": list(self.languages), "vocab_size": self.vocab_size, "tokenizer_id": self.id}
        write_json(Path(folder) / "tokenizer.json", FORMAT, body)
        return self.id

    @classmethod
    def load(cls, folder: Path) -> CanaryTokenizer:
        """Read a folder written by `save`. Raises `ArtifactError` if it is missing or damaged."""
        body = read_json(Path(folder) / "tokenizer.json", FORMAT, TokenizerBody)["body"]
        try:
            names = (SPECIALS, *_check_languages(body["languages"]))
            models = {name: (Path(folder) / f"{name}.model").read_bytes() for name in names}
            if _models_id(models) != body["tokenizer_id"]:  # before SentencePiece parses it
                raise ArtifactError(f"tokenizer {folder} was changed after it was written", remedy="rerun statistics")
            return cls(models)
        except (OSError, RuntimeError) as error:
            raise ArtifactError(
                f"tokenizer {folder} can't be read", why=str(error), remedy="rerun statistics"
            ) from error


def _models_id(models: dict[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, proto in models.items():
        digest.update(name.encode() + b"\0" + len(proto).to_bytes(8, "big") + proto)
    return digest.hexdigest()


def train_tokenizer(
    texts: Mapping[str, Iterable[str]],
    vocab_size: int,
    folder: Path | None = None,
    *,
    model_type: str = "bpe",
    prompt_format: str = "canary2",
) -> CanaryTokenizer:
    """One SentencePiece model of at most `vocab_size` pieces per language, and the format's special tokens.

    A corpus of few words supports fewer pieces; then the model is smaller. Raises `TokenizerError` for a language that
    is not a plain name.
    """
    languages = sorted(_check_languages(texts))
    models = {SPECIALS: train_specials(languages, prompt_format)}
    for language in languages:
        models[language] = _train(list(texts[language]), vocab_size, model_type)
    tokenizer = CanaryTokenizer(models)
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def train_specials(languages: Iterable[str], prompt_format: str = "canary2") -> bytes:
    """SentencePiece model whose pieces are the format's special tokens in NeMo's order, `<|language|>` among them.

    Raises `TokenizerError` for an unknown format and for a language that is not a plain name.
    """
    check_format(prompt_format)
    names = [f"<|{language}|>" for language in _check_languages(languages)]
    symbols = [*_SPECIALS_OF[prompt_format], *names, *_FURTHER[prompt_format]]
    writer = io.BytesIO()
    _train_sentencepiece(
        sentence_iterator=iter([" ".join(symbols)]),
        model_writer=writer,
        model_type="bpe",
        vocab_size=len(symbols) + 2,  # <unk> and the bare ▁
        user_defined_symbols=symbols,
    )
    return writer.getvalue()


def is_language(name: str) -> bool:
    """Whether a text may name a language: a plain name that is not a special token's."""
    return bool(_LANGUAGE.fullmatch(name)) and name not in _TAKEN


def _check_languages(languages: Iterable[str]) -> list[str]:
    """The languages as a list.

    Raises `TokenizerError` if a name could escape the tokenizer's folder or is another special token's.
    """
    names = list(languages)
    bad = [name for name in names if not is_language(name)]
    if bad:
        allowed = "letters, digits, - and _, such as en or pt-BR, but no special token's name"
        raise TokenizerError(
            "not a language's name", got=bad, allowed=allowed, remedy="write a language's code in rows and settings"
        )
    return names


def _train(texts: list[str], vocab_size: int, model_type: str) -> bytes:
    characters = len(set("".join(texts))) + 2
    size = max(vocab_size, characters + 1)
    longest = max((len(text.encode()) for text in texts), default=0)
    while True:
        writer = io.BytesIO()
        try:
            _train_sentencepiece(
                sentence_iterator=iter(texts),
                model_writer=writer,
                model_type=model_type,
                vocab_size=size,
                max_sentence_length=max(_SENTENCE_BYTES, longest + 1),  # longer sentences would be dropped silently
                num_threads=1,  # threads would make the result depend on the machine
            )
        except RuntimeError as error:
            if "ocabulary size" not in str(error) or size <= characters:
                raise TokenizerError(
                    "SentencePiece can't train a tokenizer",
                    why=str(error),
                    remedy="change tokenizer.vocab_size or tokenizer.model_type, or give it more texts",
                ) from error
            size = max(characters, size * 3 // 4)
            continue
        return writer.getvalue()
