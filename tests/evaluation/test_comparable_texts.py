"""References and hypotheses are compared in one form: a memorized text has no error, in any Unicode spelling."""

import io
import unicodedata
from functools import cache

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data.assignment import Row
from raytrain.data.text.tokenizer import SPECIALS, CanaryTokenizer, train_specials
from raytrain.errors import TokenizerError
from raytrain.evaluation.error_counts import count_errors
from raytrain.evaluation.scoring import score, texts_of
from raytrain.evaluation.worst import worst
from raytrain.stages.evaluate import result_of

RULES = ("nmt_nfkc", "nfkc_cf", "identity")
_ACCENTED = st.text(st.characters(max_codepoint=0x24F) | st.characters(min_codepoint=0x300, max_codepoint=0x36F))
_TYPOGRAPHY = st.text(st.sampled_from("ab …´ﬁ½N°’“”–\u00a0\u200b\u1e9b\u0344\u212b▁ﬂ①"))
_TEXTS = st.text(max_size=30) | _ACCENTED | _TYPOGRAPHY


@cache
def tokenizer(rule: str) -> CanaryTokenizer:
    """A tokenizer that writes any text, by bytes where it has no piece, with one of SentencePiece's normalizers."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["déjà vu été", "hello world"] * 5),
        model_writer=writer,
        model_type="bpe",
        vocab_size=300,
        character_coverage=1.0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_id=0,
        hard_vocab_limit=False,
        minloglevel=2,
        byte_fallback=True,
        normalization_rule_name=rule,
    )
    return CanaryTokenizer({SPECIALS: train_specials(["en"]), "en": writer.getvalue()})


def row(text: str) -> Row:
    return Row("/audio/1.wav", 0, 1200, " ".join(text.split()), "en", 5, (1, 2, 3))


def results(made_by: CanaryTokenizer, text: str, hypothesis: str) -> list[dict]:
    return [result_of(0, row(text), False, {"text": hypothesis}, made_by.normalize)]


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=150, deadline=None)
@given(text=_TEXTS)
def test_a_memorized_text_has_no_error(rule, text):
    made_by = tokenizer(rule)
    lines = results(made_by, text, made_by.decode(made_by.encode_text(row(text).text, "en")))
    assert lines[0]["hypothesis"] == lines[0]["reference"]
    body = score(texts_of(lines)).to_dict()
    assert body["errors"] == 0 and body["wer"] in (0.0, None)
    assert worst(texts_of(lines)).without_error == 1


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=150, deadline=None)
@given(text=_TEXTS, hypothesis=_TEXTS)
def test_the_error_rate_does_not_depend_on_how_a_text_is_composed(rule, text, hypothesis):
    made_by = tokenizer(rule)
    forms = {
        (count.errors, count.reference_length)
        for form in ("NFC", "NFD")
        for second_form in ("NFC", "NFD")
        for count in [
            count_errors(
                [made_by.normalize(unicodedata.normalize(form, text), "en")],
                [made_by.normalize(unicodedata.normalize(second_form, hypothesis), "en")],
            )
        ]
    }
    assert len(forms) == 1


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=150, deadline=None)
@given(text=_TEXTS)
def test_normalizing_twice_changes_nothing(rule, text):
    normal = tokenizer(rule).normalize(text, "en")
    assert tokenizer(rule).normalize(normal, "en") == normal == " ".join(normal.split())


def test_case_and_words_are_not_touched_and_changed_references_are_counted():
    made_by = tokenizer("nmt_nfkc")
    plain = results(made_by, "Ab  C.", "Ab C.")
    assert plain[0]["reference"] == plain[0]["text"] == "Ab C."
    text = unicodedata.normalize("NFD", "déjà")
    changed = results(made_by, text, "déjà")
    assert changed[0]["text"] == text and changed[0]["reference"] == "déjà" and changed[0]["wer"] == 0
    assert score(texts_of([*plain, *changed])).to_dict()["references_changed"] == 1
    assert score(texts_of([*plain, *changed])).to_dict()["wer"] == 0


def test_an_unknown_language_has_no_normalizer():
    with pytest.raises(TokenizerError, match="unknown language; got fr; allowed: en; to do"):
        tokenizer("identity").normalize("a", "fr")
