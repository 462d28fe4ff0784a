"""Scores of test rows: counts add up, intervals equal those of the plain bootstrap, pages of errors stay small and
informative."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.evaluation.bleu import bleu_metric, corpus_score
from raytrain.evaluation.bootstrap import interval, rate_interval, resampled_sums
from raytrain.evaluation.error_counts import count_errors, edit_counts
from raytrain.evaluation.normalize import normalizer
from raytrain.evaluation.scoring import DURATION_EDGES_MS, score, texts_of
from raytrain.evaluation.validation_scores import Decoded, bleu
from raytrain.evaluation.worst import FEW_WORDS, worst
from raytrain.report.errors import write_errors

_EVIL = "<script>alert(1)</script>"
_WORDS = (
    "the",
    "train",
    "leaves",
    "at",
    "seven",
    "from",
    "platform",
    "nine",
    "nobody",
    "knows",
    "why",
    "it's",
    "late",
    "Mr.",
    "Smith",
)


def result(text: str, hypothesis: str | None, lang: str = "en", **more: Any) -> dict[str, Any]:
    """A line of `hypotheses.jsonl`."""
    row = {"audio_filepath": "a.wav", "duration_ms": 3000, "lang": lang, "translated": False}
    return {**row, "text": text, "hypothesis": hypothesis, **more}


def spoken(number: int, seed: int = 0, error_rate: float = 0.2, **more: Any) -> list[dict[str, Any]]:
    """Transcriptions with errors of all kinds, their durations and languages mixed."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(number):
        spoken = [_WORDS[index] for index in rng.integers(len(_WORDS), size=int(rng.integers(1, 25)))]
        transcribed: list[str] = []
        for word in spoken:
            kind = rng.random() / error_rate
            transcribed += [] if kind < 0.3 else [word, "uh"] if kind < 0.5 else ["other"] if kind < 1 else [word]
        lang = ("en", "en", "de", "es")[int(rng.integers(4))]
        milliseconds = int(rng.integers(500, 45_000))
        name = f"/speech/{index}.wav"
        rows.append(
            result(" ".join(spoken), " ".join(transcribed), lang, duration_ms=milliseconds, audio_filepath=name, **more)
        )
    return rows


_TEXT = st.lists(st.sampled_from(["a", "b", "c", "dd", "é"]), max_size=7).map(" ".join)
_ROWS = st.lists(
    st.builds(
        result,
        _TEXT.filter(bool),
        st.none() | _TEXT,
        st.sampled_from(["en", "de", "fr"]),
        duration_ms=st.integers(1, 60_000),
        translated=st.booleans(),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(_ROWS, st.sampled_from(["none", "whisper"]))
def test_counts_add_up_over_languages_and_durations(rows, name):
    body = score(texts_of(rows, name)).to_dict()
    readable = [row for row in rows if row["hypothesis"] is not None]
    transcriptions = [row for row in readable if not row["translated"]]
    assert body["unreadable"] == len(rows) - len(readable)
    assert body["utterances"] == len(transcriptions)
    assert sum(body["translations"].values()) == len(readable) - len(transcriptions)
    assert body["errors"] == body["substitutions"] + body["deletions"] + body["insertions"]
    for groups in (list(body["by_language"].values()), body["by_duration"]):
        for key in ("utterances", "words", "errors"):
            assert sum(group[key] for group in groups) == body[key]
        assert sum(group["hours"] for group in groups) == pytest.approx(body["hours"], abs=1e-5)
    rates = {"wer", "cer", *(["wer_normalized"] if name == "whisper" else [])}
    for group in (body, *body["by_language"].values(), *body["by_duration"]):
        assert rates == {key for key in group if f"{key}_ci" in group} - {"bleu", "chrf"}
        if group["utterances"]:
            assert all(group[f"{key}_ci"][0] <= group[key] + 1e-12 for key in rates)
            assert all(group[key] - 1e-12 <= group[f"{key}_ci"][1] for key in rates)


def test_scores_are_what_jiwer_and_sacrebleu_make_of_the_texts():
    import jiwer
    from sacrebleu.metrics import CHRF

    rows, translated = spoken(300), spoken(80, seed=1, translated=True)
    body = score(texts_of([*rows, *translated, result("lost", None)])).to_dict()
    references, hypotheses = [row["text"] for row in rows], [row["hypothesis"] for row in rows]
    assert body["wer"] == pytest.approx(jiwer.wer(references, hypotheses))
    assert body["cer"] == pytest.approx(jiwer.cer(references, hypotheses))
    assert body["unreadable"] == 1 and "wer_normalized" not in body
    for language in ("en", "de", "es"):
        in_language = [row for row in rows if row["lang"] == language]
        pair = [row["text"] for row in in_language], [row["hypothesis"] for row in in_language]
        counts = count_errors(*pair)
        scores_of_language = body["by_language"][language]
        assert (scores_of_language["errors"], scores_of_language["words"]) == (counts.errors, counts.reference_length)
        assert scores_of_language["cer"] == pytest.approx(jiwer.cer(*pair))
        into = [row for row in translated if row["lang"] == language]
        decoded = [Decoded(language, "", True, row["text"], row["hypothesis"]) for row in into]
        assert body["bleu"][language] == pytest.approx(bleu(decoded))
        chrf = CHRF().corpus_score([row["hypothesis"] for row in into], [[row["text"] for row in into]]).score
        assert body["chrf"][language] == pytest.approx(chrf)


def test_durations_belong_to_the_span_that_they_end():
    edges = [*DURATION_EDGES_MS, 1, 5001, 40_001]
    body = score(texts_of([result("a", "a", duration_ms=edge) for edge in edges])).to_dict()
    spans = [(group["from_ms"], group["to_ms"], group["utterances"]) for group in body["by_duration"]]
    assert spans == [
        (0, 5000, 2),
        (5000, 10_000, 2),
        (10_000, 20_000, 1),
        (20_000, 30_000, 1),
        (30_000, 40_000, 1),
        (40_000, None, 1),
    ]
    assert json.loads(json.dumps(body)) == body


def test_nothing_to_score_is_no_interval():
    for rows in ([], [result("a", None)], [result("a b", "a b", translated=True)]):
        body = score(texts_of(rows, "whisper")).to_dict()
        assert (body["wer"], body["wer_ci"], body["by_language"], body["by_duration"]) == (None, None, {}, [])
    assert body["bleu"]["en"] == pytest.approx(bleu([Decoded("en", "", True, "a b", "a b")]))


# --- the normalizer


@pytest.mark.parametrize(
    ("language", "reference", "hypothesis"),
    [
        ("en", "Mr. O'Brien's 20 dollars", "mister o brien's $20"),
        ("en-GB", "The colour, uh, won't fade.", "the color will not fade"),
        ("en", "I've got two hundred and five pounds (laughs)", "I have got £205"),
        ("de", "„Straße“, sagte er – so!", "straße sagte er so"),
        ("es", "¿Qué pasó?", "qué pasó"),
        ("zh", "今天天气很好。", "今天天气 很好"),
    ],
)
def test_what_whispers_evaluation_takes_for_the_same(language, reference, hypothesis):
    clean = normalizer("whisper", language)
    assert clean(reference) == clean(hypothesis) != ""
    assert normalizer("none", language)(reference) == reference
    body = score(texts_of([result(reference, hypothesis, language)], "whisper")).to_dict()
    assert body["wer"] > 0 and body["wer_normalized"] == 0.0


def test_real_errors_stay_errors():
    english, spanish, chinese = (normalizer("whisper", language) for language in ("en", "es", "zh"))
    assert english("nine dollars") != english("five dollars")
    assert spanish("año") != spanish("ano")  # another word
    assert spanish("uh no") == "uh no"  # English fillers are words elsewhere
    body = score(texts_of([result("今天天气很好", "今天天汽很好", "zh")], "whisper")).to_dict()
    assert chinese("今天") == "今 天" and body["wer_normalized"] == pytest.approx(1 / 6) and body["wer"] == 1.0


def test_a_reference_that_was_only_a_filler_counts_what_was_added():
    body = score(texts_of([result("uh", "yes"), result("two words", "two words")], "whisper")).to_dict()
    assert body["wer_normalized"] == 0.5


def test_the_english_rules_are_those_of_transformers():
    english = pytest.importorskip("transformers.models.whisper.english_normalizer")
    spelling = json.loads(files("whisper_normalizer").joinpath("normalizers/english.json").read_text())
    theirs, ours = english.EnglishTextNormalizer(spelling), normalizer("whisper", "en")
    rng = np.random.default_rng(0)
    pieces = [*_WORDS, "twenty", "one", "oh", "$5", "3.5%", "colour", "don't", "1,000", "Dr.", "um", "naïve", "[noise]"]
    for _ in range(200):
        text = " ".join(pieces[index] for index in rng.integers(len(pieces), size=8))
        assert ours(text) == theirs(text).strip()
    theirs, ours = english.BasicTextNormalizer(), normalizer("whisper", "de")
    assert ours("Größe, (leise) „Ähm“ 5 €") == theirs("Größe, (leise) „Ähm“ 5 €").strip()


# --- intervals


def plain_bootstrap(counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The definition, one draw after another."""
    rng = np.random.default_rng(seed)
    return np.stack([counts[rng.integers(len(counts), size=len(counts))].sum(axis=0) for _ in range(resamples)])


def test_resampling_is_that_of_the_plain_bootstrap():
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 30, size=900)
    few_distinct = np.stack([rng.binomial(lengths, 0.1), lengths], 1) // 5
    all_distinct = np.stack([np.arange(900), rng.permutation(900)], 1)
    mixed = np.concatenate([few_distinct, all_distinct])
    for counts in (few_distinct, all_distinct, mixed, single := mixed[:1]):
        ours, plain = resampled_sums(counts, resamples=4000), plain_bootstrap(counts, 4000, seed=9)
        assert ours.shape == plain.shape
        spread = plain.std(axis=0)
        assert np.all(np.abs(ours.mean(axis=0) - counts.sum(axis=0)) <= 5 * spread / np.sqrt(4000))
        np.testing.assert_allclose(np.cov(ours.T), np.cov(plain.T), rtol=0.12, atol=0.12 * spread.prod())
    assert np.all(resampled_sums(single) == single)
    # Each resample has as many utterances as there are.
    assert np.all(resampled_sums(np.c_[mixed, np.ones(len(mixed), int)])[:, 2] == len(mixed))


def test_the_interval_of_a_rate_is_that_of_the_plain_bootstrap():
    rows = spoken(600, seed=3)
    counts = edit_counts([row["text"] for row in rows], [row["hypothesis"] for row in rows])
    errors, lengths = counts[:, :3].sum(axis=1), counts[:, 3]
    sums = plain_bootstrap(np.stack([errors, lengths], 1), 6000, seed=2)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    np.testing.assert_allclose(rate_interval(errors, lengths), [low, high], atol=0.08 * (high - low))


def test_intervals_repeat_contain_the_rate_and_shrink_with_the_square_root_of_utterances():
    widths = []
    for number in (250, 1000, 4000):
        body = score(texts_of(spoken(number, seed=number), "whisper")).to_dict()
        assert body == score(texts_of(spoken(number, seed=number), "whisper")).to_dict()
        for key in ("wer", "cer", "wer_normalized"):
            low, high = body[f"{key}_ci"]
            assert 0 < low < body[key] < high < 1
        widths.append(body["wer_ci"][1] - body["wer_ci"][0])
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.25) and widths[1] / widths[2] == pytest.approx(2, rel=0.25)


def test_intervals_cover_the_true_rate_as_often_as_they_say():
    rng = np.random.default_rng(11)
    inside = 0
    for _ in range(200):
        lengths = rng.integers(5, 20, size=150)
        low, high = rate_interval(rng.binomial(lengths, 0.15), lengths)
        inside += low <= 0.15 <= high
    assert 0.89 <= inside / 200 <= 0.99


def test_the_interval_of_bleu_is_that_of_sacrebleus_own_bootstrap():
    rows = spoken(150, seed=4)
    hypotheses, references = [row["hypothesis"] for row in rows], [row["text"] for row in rows]
    value, (low, high) = corpus_score(bleu_metric("en"), hypotheses, references)
    theirs = bleu_metric("en").corpus_score(hypotheses, [references], n_bootstrap=1000)
    assert value == pytest.approx(theirs.score)
    assert low < value < high
    assert (high - low) / 2 == pytest.approx(theirs._ci, rel=0.15)
    assert (high + low) / 2 == pytest.approx(theirs._mean, abs=0.15 * theirs._ci)


def test_an_interval_holds_95_percent():
    low, high = interval(np.arange(1001) / 1000)
    assert (low, high) == (pytest.approx(0.025), pytest.approx(0.975))


# --- the page of errors


def page_of(rows: list[dict[str, Any]], folder: Path, name: str = "none") -> str:
    texts = texts_of(rows, name)
    return write_errors(
        folder / "errors.html", title="a run", scores=score(texts).to_dict(), worst=worst(texts)
    ).read_text()


def shown_columns(page: str) -> list[list[tuple[str, str, str]]]:
    """(kind, said, transcribed) of each utterance on the page."""
    blocks = re.findall(r'<p class="words"[^>]*>(.*?)</p>', page, re.DOTALL)
    return [re.findall(r'<span class="c(?: (\w))?"><b>([^<]*)</b><i>([^<]*)</i></span>', block) for block in blocks]


def test_the_worst_have_their_alignment_in_columns(tmp_path):
    rows = [
        result("one two three four", "one too three four five", duration_ms=4200, audio_filepath="/speech/x.wav"),
        result("a b c d e f", "a d e f"),
        result("all is well here", "all is well here"),
    ]
    page = page_of(rows, tmp_path)
    assert shown_columns(page) == [
        [("", "one", "one"), ("s", "two", "too"), ("", "three", "three"), ("", "four", "four"), ("i", "", "five")],
        [("", "a", "a"), ("d", "b", ""), ("d", "c", ""), *(("", letter, letter) for letter in "def")],
    ]
    assert "/speech/x.wav" in page and "4.2 s" in page and "(WER 50.0 %)" in page
    assert "1 S" in page and "2 D" in page and "1 I" in page


def test_alignments_account_for_every_word_and_error():
    rows = spoken(200, seed=8)
    by_path = {row["audio_filepath"]: row for row in rows}
    found = worst(texts_of(rows))
    assert found.utterances == 200
    for item in [*found.most_errors, *found.highest_rates]:
        row = by_path[item.audio]
        assert " ".join(word for _, word, _ in item.columns if word) == row["text"]
        assert " ".join(got for _, _, got in item.columns if got) == row["hypothesis"]
        kinds = Counter(kind for kind, _, _ in item.columns)
        assert (kinds["substitute"], kinds["delete"], kinds["insert"]) == (
            item.substitutions,
            item.deletions,
            item.insertions,
        )
        counts = count_errors([row["text"]], [row["hypothesis"]])
        assert (item.errors, item.words) == (counts.errors, counts.reference_length)


def test_the_worst_are_those_with_most_errors_then_those_with_the_highest_rates():
    rows = spoken(800, seed=6)
    found = worst(texts_of(rows))
    for language in ("en", "de", "es"):
        mine = [row for row in rows if row["lang"] == language]
        counts = {row["audio_filepath"]: count_errors([row["text"]], [row["hypothesis"]]) for row in mine}
        most = [item for item in found.most_errors if item.lang == language]
        assert [item.errors for item in most] == sorted((count.errors for count in counts.values()), reverse=True)[:20]
        rest = {path: count for path, count in counts.items() if path not in {item.audio for item in most}}
        rates = sorted((count.rate for count in rest.values() if count.reference_length >= FEW_WORDS), reverse=True)
        assert [item.wer for item in found.highest_rates if item.lang == language] == rates[:20]


def test_confusions_are_counted_over_all_utterances_not_only_the_worst():
    rows = [result("I said so", "I sad so")] * 300 + [result("a b c d e f g h", "x y z 1 2 3 4 5")] * 200
    rows += [result("so it was then", "so it then", "de")] * 7 + [result("ja", "ja ja", "de")] * 5
    found = worst(texts_of(rows)).confusions
    assert found["substitute"][0] == ("en", "said", "sad", 300)
    assert found["delete"] == [("de", "was", "", 7)]
    assert found["insert"] == [("de", "", "ja", 5)]


def test_a_normalizer_leaves_only_real_errors_on_the_page(tmp_path):
    rows = [result("Mr. Smith won't pay $20.", "mister smith will not pay thirty dollars")]
    (columns,) = shown_columns(page_of(rows, tmp_path, "whisper"))
    assert [column for column in columns if column[0]] == [("s", "$20", "$30")]


def test_translations_are_shown_with_scores_and_without_alignment(tmp_path):
    rows = [
        result("der Zug fährt um sieben", text, "de", translated=True)
        for text in ("der Zug fährt um sieben", "der Bus fährt um acht", "nichts")
    ]
    page = page_of(rows, tmp_path)
    assert shown_columns(page) == [] and "Most errors" not in page
    assert re.findall(r"<dd>([^<]*)</dd>", page)[1::2] == ["nichts", "der Bus fährt um acht"]
    assert page.count("<strong>chrF") == 2 and "BLEU into de" in page


def test_texts_from_outside_are_escaped_and_nothing_is_fetched(tmp_path):
    bad = f'{_EVIL} "quoted" said here'
    rows = [result(bad, _EVIL, _EVIL, audio_filepath=f"{_EVIL}.wav"), result("one two", "one", '"]}</style>')]
    rows.append(result(bad, f"{_EVIL} x", _EVIL, translated=True))
    texts = texts_of(rows)
    page = write_errors(tmp_path / "e.html", title=_EVIL, scores=score(texts).to_dict(), worst=worst(texts)).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") > 10
    assert page.count("</style>") == 1
    assert not re.findall(r"(?:src|href)=|url\(|@import", page)


def test_languages_can_be_filtered_without_a_script(tmp_path):
    page = page_of(spoken(60), tmp_path)
    labels = dict(re.findall(r'<label for="l(\d+)">(\w+)</label>', page))
    assert sorted(labels.values()) == ["de", "en", "es"]
    for number, language in labels.items():
        assert f'body:has(#l{number}:checked) [data-l]:not([data-l="{number}"])' in page
        articles = re.findall(rf'<article data-l="{number}">.*?</p>', page, re.DOTALL)
        assert articles and all(f"<span>{language}</span>" in article for article in articles)
    assert "<fieldset" not in page_of([row for row in spoken(60) if row["lang"] == "en"], tmp_path)


def test_the_page_stays_small_for_many_rows_long_texts_and_many_languages(tmp_path):
    rows = spoken(2000) * 10
    scores = score(texts_of(rows[:2000])).to_dict()
    out = tmp_path / "errors.html"
    write_errors(out, title="many rows", scores=scores, worst=worst(texts_of(rows)))
    assert len(rows) == 20_000 and out.stat().st_size < 400_000
    loop = result("so it began", " ".join(["again"] * 2000), audio_filepath="/x" * 4000)
    endless = result("x" * 5000, "y" * 5000, translated=True)
    many = [{**row, "lang": f"l{number % 150}"} for number, row in enumerate([loop, endless] * 450)]
    write_errors(out, title="long texts", scores=scores, worst=worst(texts_of(many)))
    page = out.read_text()
    assert page.count("1,880 more columns are not shown".replace(",", "\u202f")) == 120
    assert page.count("<article") == 240 and len(page) < 2_500_000


def test_equal_results_give_equal_pages(tmp_path):
    assert page_of(spoken(100), tmp_path) == page_of(spoken(100), tmp_path)


@pytest.mark.parametrize("language", ["zh", "zh-CN", "zh_Hant", "yue", "ja-JP", "th-TH", "lo", "my"])
def test_texts_without_spaces_are_not_one_long_word(language):
    reference = "今日は天気がいいので公園に行きます"
    assert bleu([Decoded(language, "c", True, reference, reference[:-1])]) > 50
