"""Prompts in both formats: NeMo's ids, slots as people write them, rows of manifests."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_sequences import encode_utterance
from recorded import recorded

from raytrain.data.corpora.reading import plan_chunks, read_blocks
from raytrain.data.corpora.types import BadRow, Corpus, Utterance
from raytrain.data.sequences import BlockEncoder
from raytrain.data.text.prompt import prompt_ids
from raytrain.data.text.tokenizer import CanaryTokenizer, train_specials, train_tokenizer
from raytrain.errors import TokenizerError

BASE = {"audio_filepath": "a.wav", "duration": 1, "text": "one", "lang": "en"}
TEXTS = {"en": ["one two three"], "de": ["eins zwei drei"]}
OTHER_SLOTS = {"itn": "yes", "timestamp": True, "diarize": "<|diarize|>", "emotion": "neutral"}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, CanaryTokenizer]:
    """One tokenizer for each format."""
    return {name: train_tokenizer(TEXTS, 32, prompt_format=name) for name in ("canary", "canary2")}


def tokens(tokenizer: CanaryTokenizer, *names: str) -> list[int]:
    return [tokenizer.special(f"<|{name}|>") for name in names]


# The ids are from NeMo 3.0's prompt formatters for the reference models.
@pytest.mark.parametrize(
    ("name", "languages", "options", "ids"),
    [
        ("canary", ("en", "de"), {"pnc": "no"}, [4, 9, 7, 11, 6]),
        ("canary", ("de", "de"), {}, [4, 11, 8, 11, 5]),
        ("canary", ("<|en|>", "<|en|>"), {"pnc": "<|nopnc|>"}, [4, 9, 8, 9, 6]),
        ("canary2", ("en", "de"), {"pnc": False}, [7, 4, 8, 16, 17, 6, 11, 13, 15]),
        ("canary2", ("de", "de"), {"slots": OTHER_SLOTS}, [7, 4, 9, 17, 17, 5, 10, 12, 14]),
        (  # the context is in the target language
            "canary2",
            ("en", "de"),
            {"pnc": "no", "slots": {"decodercontext": "Größe the sea"}},
            [7, 332, 458, 486, 496, 455, 454, 459, 462, 455, 292, 455, 461, 4, 8, 16, 17, 6, 11, 13, 15],
        ),
        (
            "canary2",
            ("<|en|>", "<|en|>"),
            {"pnc": "<|nopnc|>", "slots": {"decodercontext": "Größe the sea"}},
            [7, 208, 229, 21, 221, 29, 28, 221, 223, 4, 8, 16, 16, 6, 11, 13, 15],
        ),
    ],
)
def test_prompts_have_nemos_ids(name, languages, options, ids):
    assert prompt_ids(recorded(f"tiny-{name}")[0], *languages, prompt_format=name, **options) == ids


def test_an_utterance_is_prompt_text_and_end(tokenizers):
    utterance = Utterance("a", 0, 1000, "one two", "en", "en", False)
    for name, tokenizer in tokenizers.items():
        encoded = encode_utterance(tokenizer, utterance, name)
        assert encoded.ids[: encoded.prompt_length] == prompt_ids(tokenizer, "en", "en", pnc=False, prompt_format=name)
        text = tokenizer.encode_text("one two", "en")
        assert encoded.ids[encoded.prompt_length :] == [*text, tokenizer.eos_id]


def test_a_translation_has_its_task_and_the_text_model_of_its_target(tokenizers):
    tokenizer = tokenizers["canary"]
    encoded = encode_utterance(tokenizer, Utterance("a", 0, 1000, "eins", "en", "de", True), "canary")
    prompt = tokens(tokenizer, "startoftranscript", "en", "translate", "de", "pnc")
    assert encoded.ids == [*prompt, *tokenizer.encode_text("eins", "de"), tokenizer.eos_id]
    named = Utterance("a", 0, 1000, "eins", "en", "de", True, (("task", "asr"),))
    assert encode_utterance(tokenizer, named, "canary").ids[2] == tokenizer.special("<|transcribe|>")


SWITCH = st.sampled_from(["yes", "No", True, False, "token", "notoken", None])


@given(st.fixed_dictionaries({name: SWITCH for name in ("pnc", "itn", "timestamp", "diarize")}))
def test_a_switch_may_be_a_word_a_boolean_or_a_token(tokenizers, values):
    values = {key: value.replace("token", key) if isinstance(value, str) else value for key, value in values.items()}
    ids = prompt_ids(tokenizers["canary2"], "en", "en", prompt_format="canary2", slots=values)
    default = {"pnc": True, "itn": False, "timestamp": False, "diarize": False}
    wanted = {key: default[key] if value is None else value for key, value in values.items()}
    on = {key: value is True or value in ("yes", key) for key, value in wanted.items()}
    assert ids[-4:] == tokens(tokenizers["canary2"], *(key if on[key] else f"no{key}" for key in default))


@pytest.mark.parametrize("language", ["fr", "pnc", "nospeech", "", "spl_tokens", None])
@pytest.mark.parametrize("name", ["canary", "canary2"])
def test_an_unknown_language_lists_what_is_allowed(tokenizers, language, name):
    for pair in ((language, "en"), ("en", language)):
        with pytest.raises(TokenizerError, match=f"unknown language; got {language}; allowed: de, en; to do"):
            prompt_ids(tokenizers[name], *pair, prompt_format=name)


@pytest.mark.parametrize(
    ("slots", "prompt_format", "message"),
    [
        ({"mood": "x"}, "canary2", "unknown prompt slot; got mood; allowed: decodercontext, emotion, source_lang"),
        ({"itn": "yes"}, "canary", "unknown prompt slot; got itn; allowed: source_lang, task, target_lang, pnc"),
        ({"itn": "perhaps"}, "canary2", "slot itn; got 'perhaps'; allowed: yes, no"),
        ({"emotion": "bored"}, "canary2", "allowed: undefined, neutral, happy, sad, angry"),
        ({"task": "sing"}, "canary", "allowed: asr, transcribe"),
        ({}, "canary9", "got canary9; allowed: canary, canary2"),
    ],
)
def test_bad_slots_list_what_is_allowed(tokenizers, slots, prompt_format, message):
    with pytest.raises(TokenizerError, match=message):
        prompt_ids(tokenizers["canary2"], "en", "en", prompt_format=prompt_format, slots=slots)


def read(tmp_path, tokenizer: CanaryTokenizer, prompt_format: str, *rows: dict) -> list[Utterance | BadRow]:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({**BASE, **row}) + "\n" for row in rows))
    (chunk,) = plan_chunks([Corpus("m", str(path))])
    encoder, encoded_by_format = BlockEncoder(tokenizer, prompt_format), {}
    for block in map(encoder.check, read_blocks(chunk)):
        encoded_by_format.update(zip(block.numbers.tolist(), block.utterances(), strict=True))
        encoded_by_format.update({row.line: row for row in block.bad})
    return [encoded_by_format[line] for line in sorted(encoded_by_format)]


def test_rows_name_slots_and_bad_ones_are_rejected_with_a_reason(tokenizers, tmp_path):
    tokenizer = tokenizers["canary2"]
    rows = [{"itn": "yes", "taskname": "asr"}, {"itn": "perhaps"}, {"pnc": "maybe"}, {"emotion": "happy"}, {}]
    checked = read(tmp_path, tokenizer, "canary2", *rows)
    assert [row.reason if isinstance(row, BadRow) else "" for row in checked] == ["", "bad_slot", "bad_slot", "", ""]
    assert [row.line for row in checked if isinstance(row, BadRow)] == [2, 3]
    assert "got 'perhaps'; allowed: yes, no" in checked[1].detail
    itn = tokenizer.special("<|itn|>")
    assert itn in encode_utterance(tokenizer, checked[0], "canary2").ids
    assert itn not in encode_utterance(tokenizer, checked[4], "canary2").ids


def test_a_slot_of_the_other_format_is_left_out_whatever_its_value(tokenizers, tmp_path):
    (bad,) = read(tmp_path, tokenizers["canary2"], "canary2", {"timestamp": 1700000000.5})
    assert bad.reason == "bad_slot"
    row, plain = read(tmp_path, tokenizers["canary"], "canary", {"timestamp": 1700000000.5, "emotion": "tired"}, {})
    assert encode_utterance(tokenizers["canary"], row, "canary") == encode_utterance(
        tokenizers["canary"], plain, "canary"
    )


def test_rows_whose_prompt_the_tokenizer_lacks_are_rejected(tokenizers, tmp_path):
    # Without <|de|>, German can't be requested, although it has a text model.
    lacking = CanaryTokenizer({**tokenizers["canary2"].models, "spl_tokens": train_specials(["en"])})
    good, bad = read(tmp_path, lacking, "canary2", {}, {"lang": "de", "text": "eins"})
    assert isinstance(good, Utterance) and (bad.reason, bad.line) == ("bad_slot", 2)
    assert "got <|de|>" in bad.detail
