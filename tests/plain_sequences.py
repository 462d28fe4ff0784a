"""The training sequence of one utterance in a few plain lines, with which `BlockEncoder` is compared."""

from typing import NamedTuple

from raytrain.data.corpora.types import Utterance
from raytrain.data.text.prompt import key_prompt
from raytrain.data.text.tokenizer import CanaryTokenizer


class EncodedUtterance(NamedTuple):
    """`ids` = prompt + text + end of text; the first `prompt_length` are the prompt."""

    ids: list[int]
    prompt_length: int


def encode_utterance(tokenizer: CanaryTokenizer, utterance: Utterance, prompt_format: str) -> EncodedUtterance:
    prompt = key_prompt(tokenizer, utterance.prompt_key, prompt_format)
    text = tokenizer.encode_text(utterance.text, utterance.target_lang)
    return EncodedUtterance([*prompt, *text, tokenizer.eos_id], len(prompt))
