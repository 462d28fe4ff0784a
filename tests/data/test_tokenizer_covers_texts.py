"""A tokenizer covers the texts that it is used for: it is trained on a sample of every language, and characters that it
can't encode are counted, named and limited."""

import io
import json
import random
from collections import Counter

import numpy as np
import pytest
import sentencepiece
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.config import TokenizerSection
from raytrain.console import Console
from raytrain.data import sentences
from raytrain.data.corpora.rows import RowParser
from raytrain.data.corpora.types import Chunk
from raytrain.data.counts import Counts, count_chunk
from raytrain.data.sentences import SentenceSample, quota_of_each
from raytrain.data.sequences import BlockEncoder
from raytrain.data.text.tokenizer import CanaryTokenizer, train_tokenizer
from raytrain.data.text.words import TextEncoder
from raytrain.errors import ManifestError
from raytrain.run_folder.documents import STATISTICS_FORMAT
from raytrain.stages.pipeline import run_pipeline
from raytrain.stages.unknown_pieces import check_unknown, unknown_pieces
from raytrain.storage.artifacts import read_json

LANGUAGES = ("de", "en", "fr")


def block_of(rows: list[dict], corpus: str = "c"):
    return RowParser(Chunk("/m.jsonl", 0, 1, corpus=corpus)).block(range(1, len(rows) + 1), rows)


def rows_of(sizes: dict[str, int]) -> list[dict]:
    """Rows by language, a few with equal texts."""
    return [
        {"audio_filepath": f"/{language}/{number}.wav", "duration": 1.0, "text": f"text {number % 7}", "lang": language}
        for language, size in sizes.items()
        for number in range(size)
    ]


def sample_of(parts: list[list[dict]], most: int) -> SentenceSample:
    total = SentenceSample(most)
    for part in parts:
        sample = SentenceSample(most)
        sample.add_block(block_of(part))
        total.add(sample)
    return total


_SIZES = st.dictionaries(st.sampled_from(LANGUAGES), st.integers(1, 25), min_size=1)


@settings(max_examples=150, deadline=None)
@given(sizes=_SIZES, most=st.integers(1, 40), seed=st.integers(0, 99), number=st.integers(1, 6))
def test_a_sample_has_every_language_however_corpora_are_ordered_and_cut(sizes, most, seed, number):
    rows = rows_of(sizes)
    whole = sample_of([rows], most).texts()
    assert whole.keys() == sizes.keys()
    for language, texts in whole.items():
        assert min(sizes[language], max(1, most // len(sizes))) <= len(texts) <= sizes[language]
    assert sum(map(len, whole.values())) <= max(most, len(sizes))
    rng, before = random.Random(seed), sentences._TRIM_AT
    rng.shuffle(rows)
    ends = sorted(rng.choices(range(len(rows) + 1), k=number - 1))
    parts = [rows[start:end] for start, end in zip([0, *ends], [*ends, len(rows)], strict=True) if start < end]
    sentences._TRIM_AT = 3  # trimmed repeatedly
    try:
        assert sample_of(parts, most).texts() == whole
    finally:
        sentences._TRIM_AT = before


@settings(max_examples=150, deadline=None)
@given(_SIZES, _SIZES, st.integers(1, 40))
def test_more_rows_take_places_and_give_none(sizes, further, most):
    """The property that allows dropping sentences before all rows are seen."""
    fewer, more = Counter(sizes), Counter(sizes) + Counter(further)
    assert quota_of_each(more, most) <= quota_of_each(fewer, most)


def test_a_sample_is_spread_over_its_corpora():
    rows = [{"audio_filepath": f"/{n}.wav", "duration": 1.0, "text": str(n), "lang": "en"} for n in range(4000)]
    (texts,) = sample_of([rows], 400).texts().values()
    quarters = np.bincount([int(text) // 1000 for text in texts], minlength=4)
    assert len(texts) == 400 and quarters.min() > 60


# --- unknown pieces


def processor(model_type: str = "bpe") -> sentencepiece.SentencePieceProcessor:
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on a mat", "für die Straße"] * 9),
        model_writer=writer,
        vocab_size=60,
        model_type=model_type,
        character_coverage=1.0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_id=0,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())


BPE = processor()
_WORDS = st.sampled_from(["the", "CAT", "maT", "Straße", "½", "東京", "für", "x"]) | st.text(max_size=5)
_TEXTS = st.lists(st.lists(_WORDS, min_size=1, max_size=8).map(" ".join), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(texts=_TEXTS, by_words=st.booleans())
def test_unknown_pieces_are_counted_and_their_characters_named(texts, by_words):
    encoder = TextEncoder(BPE, 100, by_words=by_words)
    counts, unknown = encoder.count_unknown(texts)
    for text, number, missing in zip(texts, counts.tolist(), unknown.tolist(), strict=True):
        whole = BPE.encode(" ".join(text.split()))
        assert (number, missing) == (len(whole), whole.count(0))
        characters = encoder.unwritable(text)
        assert bool(characters) == bool(missing) and characters.total() >= missing
        for character in characters:
            assert BPE.piece_to_id(character) == 0


@pytest.fixture(scope="module")
def encoder() -> BlockEncoder:
    texts = {"en": ["the cat sat on a mat"] * 9, "de": ["für die Straße"] * 9}
    return BlockEncoder(train_tokenizer(texts, 60), "canary2")


def counted(tmp_path, encoder: BlockEncoder, texts: list[tuple[str, str, str]]) -> list[Counts]:
    """Counts of a chunk for each corpus; rows are (corpus, language, text)."""
    parts = []
    for index, corpus in enumerate(dict.fromkeys(corpus for corpus, _, _ in texts)):
        path = tmp_path / f"{corpus}.jsonl"
        rows = [
            {"audio_filepath": "/a.wav", "duration": 1.0, "text": text, "lang": language}
            for one, language, text in texts
            if one == corpus
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        parts.append(count_chunk(Chunk(str(path), 0, path.stat().st_size, index, corpus), encoder))
    return parts


def test_unknown_pieces_are_reported_by_corpus_and_language(tmp_path, encoder):
    texts = [("good", "en", "the cat"), ("good", "de", "die Straße"), ("mixed", "en", "the cat " * 50)]
    texts += [("mixed", "de", "XYX ZXZ"), ("mixed", "de", "für")]
    parts = counted(tmp_path, encoder, texts)
    bodies = []
    for order in (parts, parts[::-1]):
        total = Counts()
        for part in order:
            total.add(part)
        bodies.append(unknown_pieces(total))
    assert bodies[0] == bodies[1]
    (bad,) = bodies[0]
    assert (bad.corpus, bad.language, bad.unknown) == ("mixed", "de", 2)
    assert bad.fraction == 2 / bad.tokens and bad.tokens >= 5
    assert bad.characters[:2] == (("X", 3), ("Z", 2)) and len(bad.characters) == 3
    check_unknown(bodies[0], TokenizerSection(path="/t", max_unknown_fraction=bad.fraction))
    with pytest.raises(
        ManifestError, match=r"corpus mixed in de; got \d+\.\d+% unknown.*(?s:.)*'X' \(3\) 'Z' \(2\)"
    ) as error:
        check_unknown(bodies[0], TokenizerSection(path="/t"))
    assert "tokenizer.max_unknown_fraction = 1.00%" in str(error.value) and "byte_fallback" in error.value.remedy
    with pytest.raises(ManifestError, match="raise tokenizer.max_sentences"):
        check_unknown(bodies[0], TokenizerSection())
    check_unknown([], TokenizerSection(max_unknown_fraction=0.0))


# --- the stage


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def statistics(config):
    run_pipeline(config, Console(quiet=True), ("statistics",))
    body = read_json(config.run_dir / "statistics.json", STATISTICS_FORMAT)["body"]
    return body, CanaryTokenizer.load(config.run_dir / "tokenizer")


@pytest.mark.usefixtures("local_ray")
def test_statistics_train_on_all_languages_and_refuse_texts_that_are_not_covered(corpus, tmp_path):
    rows = [{**row, "text": f"text {'ab'[number % 2]}"} for number, row in enumerate(rows_of({"en": 20, "de": 20}))]
    files = [write_rows(tmp_path / "en.jsonl", rows[:20]), write_rows(tmp_path / "de.jsonl", rows[20:])]
    tokenizers = [
        statistics(
            tiny_config(
                corpus,
                tmp_path / f"{most}{len(order)}",
                data={"train": order, "audio_sample": 0},
                tokenizer={"max_sentences": most},
            )
        )
        for most, order in ((20, files), (20, files[::-1]), (21, files))
    ]
    for body, tokenizer in tokenizers:
        assert set(tokenizer.languages) == {"de", "en"} and body["rejected"] == {} and body["unknown"] == []
    assert tokenizers[0][1].id == tokenizers[1][1].id
    upper = write_rows(tmp_path / "upper.jsonl", [{**row, "text": row["text"].upper()} for row in rows])
    section = {"path": str(next((tmp_path / "202").glob("*/tokenizer")))}
    given = {"data": {"train": [upper], "audio_sample": 0}, "tokenizer": section}
    with pytest.raises(ManifestError, match="can't encode the texts of corpus upper in de(?s:.)*'T'"):
        statistics(tiny_config(corpus, tmp_path / "upper", **given))
    given["tokenizer"] = {**section, "max_unknown_fraction": 1.0}
    body, _ = statistics(tiny_config(corpus, tmp_path / "allowed", **given))
    assert [one["language"] for one in body["unknown"]] == ["de", "en"]


@pytest.mark.usefixtures("local_ray")
def test_where_all_rows_are_bad_the_first_are_named(corpus, tmp_path):
    good = rows_of({"en": 20})
    tokenizer = train_tokenizer({"en": ["text 0123456789"] * 9}, 40, tmp_path / "tokenizer")
    assert tokenizer.languages == ("en",)
    bad = [{**row, "text": " "} for row in good[:10]] + ["{oops"] * 10
    cases = {"bad": bad, "none": [], "french": [{**row, "lang": "fr"} for row in good]}
    for name, rows in cases.items():
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        expected = {
            "bad": f"no usable row.*10 empty_text(?s:.)*corpus bad: {path}:1: empty_text: text ' '",
            "none": f"data.train have no rows; got {path}",
            "french": f"no usable row.*20 unknown_language(?s:.)*corpus french: {path}:1: unknown_language: fr",
        }[name]
        for section in ({}, {"path": str(tmp_path / "tokenizer")}):
            if name == "french" and not section:
                continue
            data = {"train": [path], "audio_sample": 0}
            config = tiny_config(corpus, tmp_path / f"{name}{len(section)}", data=data, tokenizer=section)
            with pytest.raises(ManifestError, match=expected) as error:
                statistics(config)
            assert error.value.remedy


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_texts_longer_than_sentencepiece_takes_by_itself_count(model_type):
    texts = ["สวัสดี" * 800, "ครับ"]
    tokenizer = train_tokenizer({"th": texts}, 64, model_type=model_type)
    for text in texts:
        assert tokenizer.decode(tokenizer.encode_text(text, "th")) == tokenizer.normalize(text, "th")
