"""Word-by-word counting and encoding equal the tokenizer's, block-wise encoding equals the row-wise one."""

import io
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_sequences import encode_utterance

from raytrain.data.corpora.rows import RowParser
from raytrain.data.corpora.types import Chunk
from raytrain.data.sequences import BlockEncoder
from raytrain.data.text.tokenizer import CanaryTokenizer, train_specials, train_tokenizer
from raytrain.data.text.words import TextEncoder, words_are_independent
from raytrain.errors import TokenizerError

WORDS = ["the", "cat", "sat", "on", "a", "mat", "für", "Straße", "naïve", "Ꭰ", "東京", "don't", "e.g.", "3.14", "x²"]
WORDS += ["ﬁne", "a\u0301", "\u0301b", "½"]


def train(model_type: str, vocab_size: int = 70, **options) -> sentencepiece.SentencePieceProcessor:
    rng, writer = random.Random(1), io.BytesIO()
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=writer,
        model_type=model_type,
        vocab_size=vocab_size,
        minloglevel=2,
        hard_vocab_limit=False,
        character_coverage=0.99,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())


@pytest.fixture(scope="module")
def bpe():
    return train("bpe")


texts = st.lists(
    st.one_of(st.sampled_from(WORDS), st.text(max_size=8)).map(lambda word: " ".join(word.split())), max_size=12
).map(" ".join)


@settings(max_examples=400, deadline=None)
@given(texts)
def test_words_have_the_tokens_of_the_whole(bpe, text):
    encoder, whole = TextEncoder(bpe, 100), bpe.encode(" ".join(text.split()))
    assert encoder.by_words
    assert encoder.count([text]).tolist() == [len(whole)]
    assert np.frombuffer(encoder.encode([text])[0], np.int32).tolist() == [100 + piece for piece in whole]


# Half a surrogate pair is not text: the readers reject such a row.
spaced = st.text(
    st.one_of(
        st.sampled_from(" \t\n\x00\x1c\x85\xa0\u1680\u2003\u2028\u202f\u3000aétß東"),
        st.characters(exclude_categories=["Cs"]),
    )
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(texts, spaced).filter(lambda text: text.split()), min_size=1, max_size=6))
def test_blocks_of_texts_with_any_white_space(bpe, items):
    encoder = TextEncoder(bpe)
    for _ in range(2):  # with new words, then cached words
        counts = encoder.count(items).tolist()
        assert counts == [len(ids) // 4 for ids in encoder.encode(items)]
        assert counts == [len(bpe.encode(" ".join(text.split()))) for text in items]


def test_more_words_than_slots(bpe):
    words = [f"{number:x}" for number in range(300_000)]
    encoder = TextEncoder(bpe)
    for _ in range(2):
        assert encoder.count([" ".join(words)])[0] == sum(len(bpe.encode(word)) for word in words)


def test_other_models_are_encoded_as_a_whole(bpe):
    assert words_are_independent(bpe)
    for processor in (
        train("unigram"),
        train("bpe", 150, split_by_whitespace=False),
        train("bpe", treat_whitespace_as_suffix=True),
        train("bpe", add_dummy_prefix=False),
        train("bpe", remove_extra_whitespaces=False),
    ):
        assert not words_are_independent(processor)
        encoder, text = TextEncoder(processor), "the cat sat on the mat"
        assert not encoder.by_words
        assert encoder.count([text, "a"]).tolist() == [len(processor.encode(text)), len(processor.encode("a"))]


def test_a_model_that_joins_words_is_noticed(bpe):
    """The check looks at texts too, not only at the model's pieces."""

    class Joining:
        """Like the real encoder, but two words make one token less."""

        def __getattr__(self, name):
            return getattr(bpe, name)

        def encode(self, text):
            return bpe.encode(text)[1:] if " " in text else bpe.encode(text)

    encoder = TextEncoder(Joining())
    with pytest.raises(TokenizerError, match="by_words"):
        encoder.count(["the cat"])
    with pytest.raises(TokenizerError, match="by_words"):
        encoder.encode(["the cat"])


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer({"en": ["one two three"] * 3, "de": ["eins zwei drei"] * 3}, 40)
    return CanaryTokenizer({**made.models, "spl_tokens": train_specials(["en", "de", "fr"])})


rows = st.fixed_dictionaries(
    {
        "audio_filepath": st.just("a.wav"),
        "duration": st.floats(0.01, 40),
        "text": st.lists(st.sampled_from(["one", "zwei", "drei ", "\tx"]), min_size=1, max_size=6).map(" ".join),
        "lang": st.sampled_from(["en", "de", "fr", "xx", None, 5]),
    },
    optional={
        "target_lang": st.sampled_from(["en", "<|de|>", "fr"]),
        "pnc": st.sampled_from(["yes", "no", True, "maybe"]),
        "itn": st.sampled_from(["yes", "perhaps", ["yes"]]),
        "decodercontext": st.sampled_from(["one two", "drei"]),
    },
)


@settings(max_examples=150, deadline=None)
@given(st.lists(rows, max_size=8))
def test_blocks_are_encoded_as_rows_are(tokenizer, items):
    block = RowParser(Chunk("m.jsonl", 0, 1, first_line=1)).block(range(1, 1 + len(items)), items)
    encoder = BlockEncoder(tokenizer, "canary2")
    checked = encoder.check(block)
    assert len(checked) + len(checked.bad) == len(items)
    assert sorted([*checked.numbers.tolist(), *(row.line for row in checked.bad)]) == list(range(1, 1 + len(items)))
    assert {row.reason for row in checked.bad} <= {"unknown_language", "bad_slot", "missing_field"}
    encoded, (lengths, prompts) = encoder.encode(checked), encoder.count(checked)
    expected = [encode_utterance(tokenizer, row, "canary2") for row in checked.utterances()]
    assert encoded.ids.tolist() == [number for sequence in expected for number in sequence.ids]
    assert lengths.tolist() == encoded.lengths.tolist() == [len(sequence.ids) for sequence in expected]
    assert prompts.tolist() == encoded.prompt_lengths.tolist() == [sequence.prompt_length for sequence in expected]
    assert [row.reason for row in encoder.check(block.select(np.zeros(len(block), bool))).bad] == [
        row.reason for row in block.bad
    ]
