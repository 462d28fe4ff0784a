"""Canary prompts: the special tokens before the text, in both of NeMo's formats.

    canary    <|startoftranscript|> source task target pnc
    canary2   <|startofcontext|> [context] <|startoftranscript|> emotion source target pnc itn timestamp diarize

`encode_utterance` gives the whole sequence that the decoder is trained on: prompt, text, end of text. The context
is text that came before, in the target language and encoded by that language's model, as NeMo does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raytrain.data.corpora.rows import PromptKey
from raytrain.data.corpora.types import Utterance
from raytrain.data.text.slots import DEFAULTS, check_format, slot_token
from raytrain.data.text.tokenizer import BOS, CanaryTokenizer
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
    `raytrain.data.text.slots`. A language is one that the tokenizer has a text model of.

    Raises `TokenizerError` for an unknown format, slot, value or language, listing what is allowed.
    """
    names = check_format(prompt_format)
    unknown = set(slots or {}) - set(names)
    if unknown:
        raise TokenizerError(
            "unknown prompt slot",
            got=", ".join(sorted(unknown)),
            allowed=", ".join(names),
            remedy="leave the slot out, or use a model whose prompt_format has it",
        )
    further = {name: value for name, value in (slots or {}).items() if value is not None}
    given = {"source_lang": source_lang, "target_lang": target_lang, "pnc": pnc, **further}
    values = {**DEFAULTS, **{name: slot_token(name, value) for name, value in given.items()}}
    for name in ("source_lang", "target_lang"):
        # Not any special token will do: <|pnc|> is one too.
        if values[name][2:-2] not in tokenizer.languages:
            raise TokenizerError(
                "unknown language",
                got=str(given[name]),
                allowed=", ".join(tokenizer.languages),
                remedy="name a language of the tokenizer, or train a tokenizer with rows of this language",
            )
    if prompt_format == "canary":
        same = values["source_lang"] == values["target_lang"]
        values.setdefault("task", "<|transcribe|>" if same else "<|translate|>")
        return [tokenizer.special(token) for token in (BOS, *(values[name] for name in names))]
    context = values["decodercontext"]
    ids = tokenizer.encode_text(context, values["target_lang"][2:-2]) if context else []
    rest = [tokenizer.special(token) for token in (BOS, *(values[name] for name in names[1:]))]
    return [tokenizer.special("<|startofcontext|>"), *ids, *rest]


def prompt_languages(tokenizer: CanaryTokenizer, ids: Sequence[int], prompt_format: str) -> tuple[int, int]:
    """The ids of a prompt's source and target language."""
    slots = [name for name in check_format(prompt_format) if name != "decodercontext"]
    first = list(ids).index(tokenizer.bos_id) + 1
    return ids[first + slots.index("source_lang")], ids[first + slots.index("target_lang")]


def key_prompt(tokenizer: CanaryTokenizer, row: PromptKey | Utterance, prompt_format: str) -> list[int]:
    """The prompt of a row; slots that the format does not have are left out. Raises `TokenizerError`."""
    names = check_format(prompt_format)
    slots = {name: value for name, value in row.slots if name in names}
    return prompt_ids(
        tokenizer, row.source_lang, row.target_lang, pnc=row.pnc, prompt_format=prompt_format, slots=slots
    )


def encode_utterance(tokenizer: CanaryTokenizer, utterance: Utterance, prompt_format: str) -> EncodedUtterance:
    """The training sequence of one utterance."""
    prompt = key_prompt(tokenizer, utterance, prompt_format)
    text = tokenizer.encode_text(utterance.text, utterance.target_lang)
    return EncodedUtterance([*prompt, *text, tokenizer.eos_id], len(prompt))
