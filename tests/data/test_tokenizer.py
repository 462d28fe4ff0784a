"""Tokenizers: NeMo's reference archives, small corpora, files and processes, which parts of a text survive."""

import io
import pickle

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import recorded

from raytrain.data.text.prompt import prompt_ids
from raytrain.data.text.tokenizer import CanaryTokenizer, train_specials, train_tokenizer
from raytrain.errors import ArtifactError, TokenizerError
from raytrain.model.formats.transfer import pieces_of

DIGITS = "zero one two three four five six seven eight nine"
CORPORA = {
    "en": [*DIGITS.split(), "Isn't it 3.5, or 12; no? Yes!"],
    "de": ["eins zwei drei", "Größe, Maß & Übermut: äöü ÄÖÜ – (oder)"],
}
REFERENCES = [("tiny-canary", "canary"), ("tiny-canary2", "canary2")]
# The output of NeMo 3.0's CanaryTokenizer for the reference models, before the offset of the language is added.
NEMO_TEXT_IDS = [
    ("en", "  It was  a\tdark night.  ", [113, 35, 3, 33, 37, 223, 43, 134, 212]),
    (
        "en",
        "I'll go — ﬁnally, café № 5 ½",
        [27, 227, 38, 47, 203, 199, 0, 16, 5, 173, 218, 221, 19, 202, 217, 0, 137, 203, 199, 0, 199, 0],
    ),
    (
        "de",
        "Größe und Maß, übermäßig!",
        [55, 181, 209, 219, 178, 29, 52, 184, 219, 202, 177, 204, 92, 192, 203, 219, 80, 241],
    ),
]


def pieces(tokenizer: CanaryTokenizer, model: str) -> list[str]:
    """Pieces of one of its models, in id order."""
    return [piece for name, piece in pieces_of(tokenizer.models) if name == model]


@pytest.fixture(scope="module")
def trained() -> CanaryTokenizer:
    return train_tokenizer(CORPORA, 96)


@pytest.fixture(scope="module", params=["bpe", "unigram", "reference"])
def any_tokenizer(request, trained) -> CanaryTokenizer:
    if request.param == "reference":
        return recorded("tiny-canary2")[0]
    return trained if request.param == "bpe" else train_tokenizer(CORPORA, 96, model_type=request.param)


@pytest.mark.parametrize(("name", "prompt_format"), REFERENCES)
def test_prompts_have_the_ids_that_nemo_gave_them(name, prompt_format):
    tokenizer, decoded = recorded(name)
    assert prompt_ids(tokenizer, "en", "en", prompt_format=prompt_format) == decoded["prompt"]


@pytest.mark.parametrize(("name", "prompt_format"), REFERENCES)
def test_special_tokens_are_in_nemos_order(name, prompt_format):
    wanted = pieces(recorded(name)[0], "spl_tokens")
    languages = [piece[2:-2] for piece in wanted if len(piece) == 6]
    special_pieces = [piece for _, piece in pieces_of({"spl_tokens": train_specials(languages, prompt_format)})]
    # What a newer format adds comes after the languages; the bare ▁ is always last.
    assert special_pieces[: len(wanted) - 1] == wanted[:-1]
    assert {"<|transcribe|>", "<|itn|>"} & set(special_pieces) == {
        "<|transcribe|>" if name == "tiny-canary" else "<|itn|>"
    }


@pytest.mark.parametrize(("name", "num_specials"), [("tiny-canary", 14), ("tiny-canary2", 21)])
def test_texts_have_the_ids_that_nemo_gave_them(name, num_specials):
    tokenizer = recorded(name)[0]
    offsets = {"en": num_specials, "de": num_specials + 256}
    assert tokenizer.languages == ("en", "de") and tokenizer.vocab_size == num_specials + 512
    for language, text, ids in NEMO_TEXT_IDS:
        assert tokenizer.encode_text(text, language) == [offsets[language] + number for number in ids]


def test_ids_of_several_languages_are_decoded_as_nemo_does():
    tokenizer = recorded("tiny-canary2")[0]
    ids = [number for language, text, _ in NEMO_TEXT_IDS for number in tokenizer.encode_text(text, language)]
    unknown = "I'll go <unk> finally, caf<unk> No <unk> <unk>"
    assert tokenizer.decode(ids) == f"It was a dark night. {unknown} Größe und Maß, übermäßig!"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_decoding_what_was_encoded_keeps_the_text(any_tokenizer, data):
    """Preserved: texts over the model's characters. Not preserved: the amount and kind of whitespace, and ▁,
    SentencePiece's symbol for a space."""
    language = data.draw(st.sampled_from(any_tokenizer.languages))
    characters = [piece for piece in pieces(any_tokenizer, language) if len(piece) == 1 and piece != "▁"]
    text = data.draw(st.text(st.sampled_from([*characters, " ", "\t", "\n", "▁"]), max_size=60))
    ids = any_tokenizer.encode_text(text, language)
    kept = " ".join(text.replace("▁", " ").split())
    assert any_tokenizer.decode(ids) == kept
    assert any_tokenizer.encode_text(kept, language) == ids


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.sampled_from(["<|endoftext|>", "<pad>", "<|de|>", ""]), st.sampled_from(["de", "en"]))
def test_no_text_at_all_becomes_a_special_token_or_another_language(trained, text, special, language):
    sizes = [len(pieces(trained, name)) for name in ("spl_tokens", "de", "en")]
    start = sizes[0] + (sizes[1] if language == "en" else 0)
    end = start + sizes[1 if language == "de" else 2]
    assert all(start <= number < end for number in trained.encode_text(special + text, language))


def test_what_was_not_trained_on_is_unknown_and_variants_become_plain(trained):
    assert trained.decode(trained.encode_text("ｏｎｅ 漢 two", "en")) == "one <unk> two"


def test_ids_are_concatenated_in_order_and_specials_are_dropped(trained):
    assert trained.languages == ("de", "en")
    english, german = trained.encode_text("one", "en"), trained.encode_text("eins", "de")
    assert min(english) > max(german) > trained.special("<|en|>")
    assert (trained.pad_id, trained.eos_id, trained.bos_id) == (2, 3, 4)
    assert trained.decode([trained.bos_id, *english, trained.eos_id, trained.vocab_size + 3]) == "one"


def test_tokenizer_on_disk_and_across_processes(trained, tmp_path):
    trained.save(tmp_path)
    for copy in (CanaryTokenizer.load(tmp_path), pickle.loads(pickle.dumps(trained))):
        assert copy.id == trained.id and copy.encode_text("two", "en") == trained.encode_text("two", "en")
    (tmp_path / "en.model").write_bytes((tmp_path / "de.model").read_bytes())
    with pytest.raises(ArtifactError, match="changed after"):
        CanaryTokenizer.load(tmp_path)


def test_training_twice_gives_equal_bytes_also_from_generators(trained):
    assert train_tokenizer({name: iter(texts) for name, texts in CORPORA.items()}, 96).id == trained.id


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("vocab_size", [8, 48, 1024])
def test_ten_words_are_enough_for_any_vocabulary_size(model_type, vocab_size):
    tokenizer = train_tokenizer({"en": DIGITS.split()}, vocab_size, model_type=model_type)
    assert tokenizer.decode(tokenizer.encode_text(DIGITS, "en")) == DIGITS


def test_words_are_whole_pieces_where_there_is_room():
    tokenizer = train_tokenizer({"en": DIGITS.split()}, 256)
    assert [len(tokenizer.encode_text(word, "en")) for word in DIGITS.split()] == [1] * 10


def test_an_unknown_language_or_special_token_lists_the_known(trained):
    for language in ("fr", "spl_tokens"):
        with pytest.raises(TokenizerError, match=f"got {language}; allowed: de, en;"):
            trained.encode_text("un", language)
    with pytest.raises(TokenizerError, match=r"got <\|mood\|>; allowed: .*<\|endoftext\|>"):
        trained.special("<|mood|>")


@pytest.mark.parametrize("language", ["../../evil", "spl_tokens", "a b", "", "pnc", "endoftext", "emo:neutral"])
def test_a_language_can_not_lead_out_of_the_folder_nor_be_another_special(tmp_path, language):
    with pytest.raises(TokenizerError, match="not a language's name"):
        train_tokenizer({language: ["one two"], "en": ["one two"]}, 32, tmp_path / "deep" / "tokenizer")
    assert not list(tmp_path.rglob("*.model"))


def test_byte_pieces_are_read_as_characters():
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three"] * 5),
        model_writer=writer,
        model_type="bpe",
        vocab_size=280,
        byte_fallback=True,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_id=0,
        minloglevel=2,
    )
    tokenizer = CanaryTokenizer({"spl_tokens": train_specials(["en"]), "en": writer.getvalue()})
    ids = tokenizer.encode_text("one wörld 你", "en")
    assert tokenizer.decode(ids) == "one wörld 你"
    assert tokenizer.decode(ids[:-1]).startswith("one wörld")  # half a character is not an error
