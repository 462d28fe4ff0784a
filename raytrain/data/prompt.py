"""Canary prompts: the special tokens before the text, in both of NeMo's formats.

    canary    <|startoftranscript|> source task target pnc
    canary2   <|startofcontext|> <|startoftranscript|> emotion source target pnc itn timestamp diarize

`encode_utterance` gives the whole sequence that the decoder is trained on: prompt, text, end of text.
"""

from __future__ import annotations

from typing import NamedTuple

from raytrain.data.manifest import Utterance
from raytrain.data.tokenizer import BOS, CanaryTokenizer
from raytrain.errors import TokenizerError

CANARY2_DEFAULTS = {
    "emotion": "<|emo:undefined|>",
    "itn": "<|noitn|>",
    "timestamp": "<|notimestamp|>",
    "diarize": "<|nodiarize|>",
}


class EncodedUtterance(NamedTuple):
    """`ids` = prompt + text + end of text; the first `prompt_length` are the prompt."""

    ids: list[int]
    prompt_length: int


def prompt_ids(
    tokenizer: CanaryTokenizer,
    source_lang: str,
    target_lang: str,
    *,
    pnc: bool = True,
    prompt_format: str = "canary2",
    slots: dict[str, str] | None = None,
) -> list[int]:
    """Ids of a prompt. `slots` overrides canary2's emotion, itn, timestamp or diarize token.

    Raises `TokenizerError` for an unknown format, slot or language, listing what is allowed.
    """
    for language in (source_lang, target_lang):
        if not tokenizer.has_special(f"<|{language}|>"):
            raise TokenizerError("unknown language", got=language, allowed=", ".join(tokenizer.languages))
    unknown = set(slots or {}) - set(CANARY2_DEFAULTS)
    if unknown:
        raise TokenizerError("unknown prompt slot", got=sorted(unknown), allowed=", ".join(CANARY2_DEFAULTS))
    case = "<|pnc|>" if pnc else "<|nopnc|>"
    source, target = f"<|{source_lang}|>", f"<|{target_lang}|>"
    if prompt_format == "canary":
        task = "<|transcribe|>" if source == target else "<|translate|>"
        tokens = [BOS, source, task, target, case]
    elif prompt_format == "canary2":
        values = {**CANARY2_DEFAULTS, **(slots or {})}
        tokens = [
            "<|startofcontext|>", BOS, values["emotion"], source, target, case,
            values["itn"], values["timestamp"], values["diarize"],
        ]  # fmt: skip
    else:
        raise TokenizerError("unknown prompt format", got=prompt_format, allowed="canary, canary2")
    return [tokenizer.special(token) for token in tokens]


def encode_utterance(
    tokenizer: CanaryTokenizer, utterance: Utterance, prompt_format: str = "canary2"
) -> EncodedUtterance:
    """The training sequence of one utterance."""
    prompt = prompt_ids(
        tokenizer,
        utterance.source_lang,
        utterance.target_lang,
        pnc=utterance.pnc,
        prompt_format=prompt_format,
    )
    text = tokenizer.encode_text(utterance.text, utterance.target_lang)
    return EncodedUtterance([*prompt, *text, tokenizer.eos_id], len(prompt))
