"""Canary prompts: the special tokens before the text, in both of NeMo's formats.

    canary    <|startoftranscript|> source task target pnc
    canary2   <|startofcontext|> [context] <|startoftranscript|> emotion source target pnc itn timestamp diarize

The context is text that came before, in the target language and encoded by that language's model, as NeMo does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raytrain.data.text.slots import DEFAULTS, PromptKey, check_format, slot_token
from raytrain.data.text.tokenizer import BOS, CanaryTokenizer
from raytrain.errors import TokenizerError


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
    `raytrain.data.text.slots`. The tokenizer must have a text model for each language.

    Raises `TokenizerError` for an unknown format, slot, value or language, listing what is allowed.
    """
    given = {"source_lang": source_lang, "target_lang": target_lang, "pnc": pnc}
    given |= {name: value for name, value in (slots or {}).items() if value is not None}
    names = _check_slots(slots or {}, prompt_format)
    tokens = {**DEFAULTS, **{name: slot_token(name, value) for name, value in given.items()}}
    for name in ("source_lang", "target_lang"):
        _check_language(tokenizer, str(given[name]), tokens[name])
    if prompt_format == "canary":
        same = tokens["source_lang"] == tokens["target_lang"]
        tokens.setdefault("task", "<|transcribe|>" if same else "<|translate|>")
        return [tokenizer.special(token) for token in (BOS, *(tokens[name] for name in names))]
    context = tokens["decodercontext"]
    ids = tokenizer.encode_text(context, tokens["target_lang"][2:-2]) if context else []
    rest = [tokenizer.special(token) for token in (BOS, *(tokens[name] for name in names[1:]))]
    return [tokenizer.special("<|startofcontext|>"), *ids, *rest]


def _check_slots(slots: Mapping[str, Any], prompt_format: str) -> tuple[str, ...]:
    """The slots of a format. Raises `TokenizerError` if `slots` has others."""
    names = check_format(prompt_format)
    unknown = set(slots) - set(names)
    if unknown:
        raise TokenizerError(
            "unknown prompt slot",
            got=", ".join(sorted(unknown)),
            allowed=", ".join(names),
            remedy="leave the slot out, or use a model whose prompt_format has it",
        )
    return names


def _check_language(tokenizer: CanaryTokenizer, language: str, token: str) -> None:
    # Not every special token is a language: <|pnc|> is a special token too.
    if token[2:-2] not in tokenizer.languages:
        raise TokenizerError(
            "unknown language",
            got=language,
            allowed=", ".join(tokenizer.languages),
            remedy="name a language of the tokenizer, or train a tokenizer with rows of this language",
        )


def prompt_languages(tokenizer: CanaryTokenizer, ids: Sequence[int], prompt_format: str) -> tuple[int, int]:
    """The ids of a prompt's source and target language."""
    slots = [name for name in check_format(prompt_format) if name != "decodercontext"]
    first = list(ids).index(tokenizer.bos_id) + 1
    return ids[first + slots.index("source_lang")], ids[first + slots.index("target_lang")]


def key_prompt(tokenizer: CanaryTokenizer, key: PromptKey, prompt_format: str) -> list[int]:
    """The prompt of a row; slots that the format lacks are left out. Raises `TokenizerError`."""
    names = check_format(prompt_format)
    slots = {name: value for name, value in key.slots if name in names}
    return prompt_ids(
        tokenizer, key.source_lang, key.target_lang, pnc=key.pnc, prompt_format=prompt_format, slots=slots
    )
