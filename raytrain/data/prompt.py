"""Canary prompts: the special tokens before the text, in both of NeMo's formats.

    canary    <|startoftranscript|> source task target pnc
    canary2   <|startofcontext|> [context] <|startoftranscript|> emotion source target pnc itn timestamp diarize

`encode_utterance` gives the whole sequence that the decoder is trained on: prompt, text, end of text. The context
is text that came before, in the target language and encoded by that language's model, as NeMo does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from raytrain.data.manifest import BadRow, ManifestChunk, Utterance, read_chunk
from raytrain.data.slots import DEFAULTS, check_format, slot_token
from raytrain.data.tokenizer import BOS, CanaryTokenizer
from raytrain.errors import TokenizerError


class EncodedUtterance(NamedTuple):
    """`ids` = prompt + text + end of text; the first `prompt_length` are the prompt."""

    ids: list[int]
    prompt_length: int


def prompt_ids(
    tokenizer: CanaryTokenizer,
    source_lang: str,
    target_lang: str,
    *,
    prompt_format: str,
    pnc: bool | str = True,
    slots: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a prompt. `slots` sets further slots of the format by name, None for the default; see
    `raytrain.data.slots`. A language is one that the tokenizer has a text model of.

    Raises `TokenizerError` for an unknown format, slot, value or language, listing what is allowed.
    """
    names = check_format(prompt_format)
    unknown = set(slots or {}) - set(names)
    if unknown:
        raise TokenizerError("unknown prompt slot", got=", ".join(sorted(unknown)), allowed=", ".join(names))
    further = {name: value for name, value in (slots or {}).items() if value is not None}
    given = {"source_lang": source_lang, "target_lang": target_lang, "pnc": pnc, **further}
    values = {**DEFAULTS, **{name: slot_token(name, value) for name, value in given.items()}}
    for name in ("source_lang", "target_lang"):
        # Not any special token will do: <|pnc|> is one too.
        if values[name][2:-2] not in tokenizer.languages:
            raise TokenizerError("unknown language", got=str(given[name]), allowed=", ".join(tokenizer.languages))
    if prompt_format == "canary":
        same = values["source_lang"] == values["target_lang"]
        values.setdefault("task", "<|transcribe|>" if same else "<|translate|>")
        return [tokenizer.special(token) for token in (BOS, *(values[name] for name in names))]
    context = values["decodercontext"]
    ids = tokenizer.encode_text(context, values["target_lang"][2:-2]) if context else []
    rest = [tokenizer.special(token) for token in (BOS, *(values[name] for name in names[1:]))]
    return [tokenizer.special("<|startofcontext|>"), *ids, *rest]


def utterance_prompt(tokenizer: CanaryTokenizer, utterance: Utterance, prompt_format: str) -> list[int]:
    """The prompt of a manifest row; slots that the format does not have are left out."""
    names = check_format(prompt_format)
    slots = {name: value for name, value in utterance.slots if name in names}
    return prompt_ids(
        tokenizer,
        utterance.source_lang,
        utterance.target_lang,
        pnc=utterance.pnc,
        prompt_format=prompt_format,
        slots=slots,
    )


def encode_utterance(tokenizer: CanaryTokenizer, utterance: Utterance, prompt_format: str) -> EncodedUtterance:
    """The training sequence of one utterance."""
    prompt = utterance_prompt(tokenizer, utterance, prompt_format)
    text = tokenizer.encode_text(utterance.text, utterance.target_lang)
    return EncodedUtterance([*prompt, *text, tokenizer.eos_id], len(prompt))


def read_utterances(
    chunk: ManifestChunk, tokenizer: CanaryTokenizer, prompt_format: str, default_language: str | None
) -> Iterator[Utterance | BadRow]:
    """Rows of one byte range that this tokenizer can encode in this format; the others as bad rows."""

    def check(row: Utterance) -> None:
        utterance_prompt(tokenizer, row, prompt_format)

    return read_chunk(chunk, set(tokenizer.languages), default_language, check)
