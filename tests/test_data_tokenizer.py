"""Tokenizers: NeMo's reference archive, small corpora, prompts in both formats."""

import io
import tarfile

import pytest
import yaml
from conftest import SHARED

from raytrain.data.manifest import Utterance
from raytrain.data.prompt import encode_utterance, prompt_ids
from raytrain.data.tokenizer import CanaryTokenizer, train_tokenizer
from raytrain.errors import TokenizerError

DIGITS = "zero one two three four five six seven eight nine"
REFERENCE = SHARED / "reference" / "tiny-canary2" / "model.nemo"


@pytest.fixture(scope="module")
def reference() -> CanaryTokenizer:
    if not REFERENCE.exists():
        pytest.skip("needs the reference models")
    with tarfile.open(REFERENCE) as archive:
        files = {
            member.name.removeprefix("./"): archive.extractfile(member).read()
            for member in archive.getmembers()
            if member.isfile() and not member.name.endswith(".ckpt")
        }
    languages = yaml.safe_load(io.BytesIO(files["model_config.yaml"]))["tokenizer"]["langs"]
    return CanaryTokenizer({name: files[entry["model_path"][5:]] for name, entry in languages.items()})


def test_prompt_of_the_reference_has_its_ids(reference):
    assert prompt_ids(reference, "en", "en") == [7, 4, 8, 16, 16, 5, 11, 13, 15]
    assert prompt_ids(reference, "en", "de", pnc=False) == [7, 4, 8, 16, 17, 6, 11, 13, 15]


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


def test_the_first_specials_stand_in_nemos_order():
    tokenizer = train_tokenizer({"fr": ["un deux"], "en": ["one two"]}, 32)
    order = ("<unk>", "<|nospeech|>", "<pad>", "<|endoftext|>", "<|startoftranscript|>", "<|pnc|>", "<|nopnc|>")
    assert [tokenizer.special(token) for token in order] == list(range(7))
    for token in ("<|startofcontext|>", "<|itn|>", "<|noitn|>", "<|emo:undefined|>", "<|en|>", "<|fr|>"):
        assert tokenizer.has_special(token)


def test_a_translation_takes_the_text_model_of_its_target():
    tokenizer = train_tokenizer({"de": ["eins zwei"], "en": ["one two"]}, 32)
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
