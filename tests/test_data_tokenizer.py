"""Tokenizers: NeMo's reference archive, small corpora, prompts in both formats."""

import json

import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data.manifest import BadRow, Utterance, split_manifests
from raytrain.data.prompt import encode_utterance, prompt_ids, read_utterances
from raytrain.data.tokenizer import CanaryTokenizer, train_specials, train_tokenizer
from raytrain.errors import TokenizerError
from raytrain.model.nemo import read_nemo
from raytrain.model.transfer import pieces_of

DIGITS = "zero one two three four five six seven eight nine"


def recorded(name: str) -> tuple[CanaryTokenizer, dict]:
    """Tokenizer of a reference model and its recorded decoding."""
    root = SHARED / "reference" / name
    if not root.exists():
        pytest.skip("needs the reference models")
    decoded = json.loads((root / "decode_single.json").read_text())
    return CanaryTokenizer(read_nemo(root / "model.nemo").tokenizers), decoded


@pytest.fixture(scope="module")
def reference() -> CanaryTokenizer:
    return recorded("tiny-canary2")[0]


@pytest.mark.parametrize(("name", "prompt_format"), [("tiny-canary", "canary"), ("tiny-canary2", "canary2")])
def test_prompts_have_the_ids_that_nemo_gave_them(name, prompt_format):
    tokenizer, decoded = recorded(name)
    assert prompt_ids(tokenizer, "en", "en", prompt_format=prompt_format) == decoded["prompt"]


@pytest.mark.parametrize(("name", "prompt_format"), [("tiny-canary", "canary"), ("tiny-canary2", "canary2")])
def test_special_tokens_stand_in_nemos_order(name, prompt_format):
    wanted = list(pieces_of(recorded(name)[0].models))
    wanted = [piece for model, piece in wanted if model == "spl_tokens"]
    languages = [piece[2:-2] for piece in wanted if len(piece) == 6]
    found = [piece for _, piece in pieces_of({"spl_tokens": train_specials(languages, prompt_format)})]
    # What a newer format adds comes after the languages; the bare ▁ is always last.
    assert found[: len(wanted) - 1] == wanted[:-1]


def test_prompts_of_the_reference_in_both_directions(reference):
    assert prompt_ids(reference, "en", "de", pnc=False) == [7, 4, 8, 16, 17, 6, 11, 13, 15]
    slots = {"itn": "yes", "timestamp": True, "diarize": "<|diarize|>", "emotion": "neutral"}
    assert prompt_ids(reference, "de", "en", slots=slots) == [7, 4, 9, 17, 16, 5, 10, 12, 14]
    context = prompt_ids(reference, "en", "de", slots={"decodercontext": "die See"})
    text = reference.encode_text("die See", "de")
    assert context == [7, *text, 4, 8, 16, 17, 5, 11, 13, 15]


def test_offsets_of_the_reference_follow_its_order(reference):
    assert reference.languages == ("en", "de") and reference.vocab_size == 21 + 256 + 256
    english, german = reference.encode_text("the sea", "en"), reference.encode_text("die See", "de")
    assert min(english) >= 21 and max(english) < 277 <= min(german)
    assert reference.decode([*english, *german]) == "the sea die See"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("vocab_size", [8, 48, 1024])
def test_ten_words_are_enough_for_any_vocabulary_size(model_type, vocab_size):
    tokenizer = train_tokenizer({"en": DIGITS.split()}, vocab_size, model_type=model_type)
    assert tokenizer.decode(tokenizer.encode_text(DIGITS, "en")) == DIGITS


def test_words_are_whole_pieces_where_there_is_room():
    tokenizer = train_tokenizer({"en": DIGITS.split()}, 256)
    assert [len(tokenizer.encode_text(word, "en")) for word in DIGITS.split()] == [1] * 10


def test_a_translation_takes_the_text_model_of_its_target():
    tokenizer = train_tokenizer({"de": ["eins zwei"], "en": ["one two"]}, 32, prompt_format="canary")
    encoded = encode_utterance(tokenizer, Utterance("a", 0, 1000, "eins", "en", "de", True), "canary")
    names = ("<|startoftranscript|>", "<|en|>", "<|translate|>", "<|de|>", "<|pnc|>")
    assert encoded.ids[: encoded.prompt_length] == [tokenizer.special(name) for name in names]
    assert encoded.ids[encoded.prompt_length :] == [*tokenizer.encode_text("eins", "de"), tokenizer.eos_id]


def test_an_unknown_special_lists_what_there_is():
    tokenizer = train_tokenizer({"en": ["one two"]}, 32)
    with pytest.raises(TokenizerError, match=r"got <\|mood\|>; allowed: .*<\|endoftext\|>"):
        tokenizer.special("<|mood|>")


@pytest.mark.parametrize("language", ["../../evil", "spl_tokens", "a b", ""])
def test_a_language_can_not_lead_out_of_the_folder(tmp_path, language):
    with pytest.raises(TokenizerError, match="not a language's name"):
        train_tokenizer({language: ["one two"], "en": ["one two"]}, 32, tmp_path / "deep" / "tokenizer")
    assert not list(tmp_path.rglob("*.model"))


def test_texts_may_be_a_generator():
    assert train_tokenizer({"en": (word for word in DIGITS.split())}, 48).languages == ("en",)


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet=DIGITS.replace(" ", "") + "  ▁", max_size=60))
def test_decoding_what_was_encoded_keeps_the_text(trained, text):
    # Not kept: how many spaces there are, and ▁, which is SentencePiece's name for a space.
    kept = " ".join(text.replace("▁", " ").split())
    assert trained.decode(trained.encode_text(text, "en")) == kept
    for language in trained.languages:
        assert trained.decode(trained.encode_text(kept, language)) == kept


@pytest.fixture(scope="module")
def trained() -> CanaryTokenizer:
    return train_tokenizer({"en": DIGITS.split(), "xx": [DIGITS]}, 64)


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
def test_bad_slots_list_what_is_allowed(trained, slots, prompt_format, message):
    with pytest.raises(TokenizerError, match=message):
        prompt_ids(trained, "en", "en", prompt_format=prompt_format, slots=slots)


def test_rows_name_slots_and_bad_ones_are_rejected_with_a_reason(trained, tmp_path):
    base = {"audio_filepath": "a.wav", "duration": 1, "text": "one", "lang": "en"}
    rows = [{"itn": "yes", "taskname": "asr"}, {"itn": "perhaps"}, {"pnc": "maybe"}, {"emotion": "happy"}, {}]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({**base, **row}) + "\n" for row in rows))
    (chunk,) = split_manifests([path])
    found = list(read_utterances(chunk, trained, "canary2", None))
    assert [row.reason if isinstance(row, BadRow) else "" for row in found] == ["", "bad_slot", "bad_slot", "", ""]
    assert [row.line for row in found if isinstance(row, BadRow)] == [2, 3]
    ids = encode_utterance(trained, found[0]).ids
    assert (
        trained.special("<|itn|>") in ids and trained.special("<|itn|>") not in encode_utterance(trained, found[4]).ids
    )
    # The published special tokens know no happiness.
    old = CanaryTokenizer({**trained.models, "spl_tokens": train_specials(["en", "xx"], "canary")})
    reasons = [row.reason for row in read_utterances(chunk, old, "canary2", None) if isinstance(row, BadRow)]
    assert reasons == ["bad_slot"] * 4
