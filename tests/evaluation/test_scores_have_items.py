"""A score has items: without comparisons there is no rate, no best checkpoint and no end of training, and too many
unreadable recordings are an error."""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from training_parts import SETTINGS, make_loop, micro_batch

from raytrain.cluster.tuning import score_of
from raytrain.console import Console
from raytrain.data.assignment import Row
from raytrain.data.audio import AudioError
from raytrain.data.batch import SpeechBatch
from raytrain.data.corpora.rejected import RejectedRows
from raytrain.data.corpora.types import BadRow, Corpus
from raytrain.decoding.settings import DecodeSettings
from raytrain.errors import DataError, ManifestError, PlanError, TrainingError
from raytrain.evaluation.bootstrap import rate_interval
from raytrain.evaluation.error_counts import ErrorCounts, count_errors
from raytrain.evaluation.scoring import score, texts_of
from raytrain.evaluation.validation_scores import Decoded, score_decoded
from raytrain.evaluation.worst import worst
from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.mixture import Mixture
from raytrain.lengths.plan import BucketSettings, make_plan
from raytrain.lengths.schedule import BatchSchedule
from raytrain.lengths.simulate import simulate
from raytrain.report.errors import write_errors
from raytrain.stages.evaluate import check_unreadable
from raytrain.stages.pipeline import run_pipeline
from raytrain.training import validation
from raytrain.training.limits import GaveUp
from raytrain.training.validation import Measured, Validator

CPU = torch.device("cpu")
_TEXT = st.lists(st.sampled_from(["a", "b", "c"]), max_size=3).map(" ".join)
_ITEMS = st.lists(
    st.builds(Decoded, st.sampled_from(["en", "de"]), st.sampled_from("xy"), st.booleans(), _TEXT, _TEXT), max_size=8
)


@settings(max_examples=150, deadline=None)
@given(_ITEMS)
def test_a_score_is_there_just_where_something_was_compared(items):
    scores = score_decoded(items)
    transcribed = [item for item in items if not item.translated]
    assert ("wer" in scores) == any(item.reference for item in transcribed)
    assert ("bleu" in scores) == any(item.translated and item.reference for item in items)
    assert ("error" in scores) == ("wer" in scores or "bleu" in scores)
    assert all(math.isfinite(value) for value in scores.values())
    for name, compared in (("wer", transcribed), ("bleu", [item for item in items if item.translated])):
        for language in ("en", "de"):
            if f"{name}_{language}" in scores:
                assert any(item.reference for item in compared if item.language == language)


def test_nothing_has_no_score():
    assert score_decoded([]) == {}
    assert ErrorCounts().rate is None and count_errors([""], ["a"]).rate is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=9))
def test_a_rate_lies_in_an_interval_of_rates(pairs):
    """Resamples that happen to hold no word would pull the interval to 0."""
    errors, lengths = np.array(pairs).T
    errors = np.minimum(errors, lengths)
    if lengths.sum():
        low, high = rate_interval(errors, lengths)
        rates = errors[lengths > 0] / lengths[lengths > 0]
        assert rates.min() - 1e-12 <= low <= high <= rates.max() + 1e-12


def test_scores_and_pages_of_references_without_words(tmp_path):
    result = {"text": "", "hypothesis": "a", "lang": "en", "translated": False, "duration_ms": 9, "audio_filepath": "a"}
    texts = texts_of([result], "whisper")
    body = score(texts).to_dict()
    for group in (body, body["by_language"]["en"], body["by_duration"][0]):
        assert group["utterances"] == 1 and group["wer"] is group["wer_ci"] is group["wer_normalized"] is None
    assert "none" in write_errors(tmp_path / "errors.html", title="t", scores=body, worst=worst(texts)).read_text()


def test_translations_without_references_have_no_score(tmp_path):
    result = {"text": "", "hypothesis": "a", "lang": "en", "translated": True, "duration_ms": 9, "audio_filepath": "a"}
    texts = texts_of([result, {**result, "lang": "de", "text": "a"}])
    body = score(texts).to_dict()
    assert body["translations"] == {"en": 1, "de": 1}
    assert body["bleu"].keys() == body["chrf_ci"].keys() == {"de"}
    assert "a" in write_errors(tmp_path / "errors.html", title="t", scores=body, worst=worst(texts)).read_text()


# --- validation


@dataclass(frozen=True)
class _Fixed(Validator):
    """A validator whose model writes `a` for everything."""

    def _measure(self, model, batch):
        return Measured(["a"] * len(batch), 2.0 * len(batch), float(len(batch)))


def validator(readable: int, unreadable: int, limit: float = 0.01) -> Validator:
    rows = [Row(f"/audio/{number}.wav", 0, 1200, "a b", "en", 5, (1, 2, 3), corpus="dev") for number in range(readable)]

    def batches(on_error):
        for number in range(unreadable):
            row = Row(f"/gone/{number}.wav", 0, 1200, "a b", "en", 5, (1, 2, 3), corpus="dev")
            on_error(row, AudioError(f"can't read audio {row.audio_path}"))
        if rows:
            yield rows, SpeechBatch.synthetic(len(rows), 200, 14, vocab=40, device="cpu")

    return _Fixed(
        batches=batches,
        is_translation=lambda row: False,
        decode=str,
        eos_id=3,
        search=DecodeSettings(),
        max_bad_fraction=limit,
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.sampled_from([0.0, 0.01, 0.25, 0.5, 1.0]))
def test_validation_counts_what_can_not_be_read_and_gives_up_above_the_limit(readable, unreadable, limit):
    scores = validator(readable, unreadable, limit)
    if readable and unreadable <= limit * (readable + unreadable):
        metrics = scores(torch.nn.Identity(), CPU)
        assert metrics["val_unreadable"] == unreadable
        assert metrics["wer"] == metrics["error"] == 0.5 and metrics["val_loss"] == 2.0
        return
    with pytest.raises(GaveUp) as error:
        scores(torch.nn.Identity(), CPU)
    assert error.value.remedy
    if unreadable:
        assert f"{unreadable} of {readable + unreadable} dev recordings" in str(error.value)
        assert "corpus dev: can't read audio /gone/0.wav" in str(error.value)


@pytest.mark.parametrize("mine", [(4, 0), (0, 4), (0, 0)])
def test_all_ranks_decide_alike(mine, monkeypatch):
    """A rank that can read its own rows, one that can't, and one without rows."""
    other_share = validation._Share(
        [Decoded("en", "dev", False, "a", "a")], 1.0, 1.0, 3, ["corpus dev: can't read audio /x"]
    )

    def gather(shares, share):
        shares[:] = [share, other_share]

    monkeypatch.setattr(validation.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(validation.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(validation.dist, "all_gather_object", gather)
    with pytest.raises(GaveUp, match=f"{mine[1] + 3} of {sum(mine) + 4} dev recordings"):
        validator(*mine)(torch.nn.Identity(), CPU)


def test_the_loop_acts_on_scores_alone(tmp_path):
    """Validations without a score are never the best, and don't end training by patience or at a WER."""
    looks = iter([{"val_unreadable": 0}, {"wer": 0.9, "error": 0.9}, {"bleu": 10.0, "error": 0.95}, {}])
    settings = replace(SETTINGS, max_steps=8, stop_at_wer=0.5)
    loop, logged = make_loop(
        tmp_path, [micro_batch(number) for number in range(9)], settings, validate=lambda model, device: next(looks)
    )
    assert loop.run() == 8
    assert loop.checkpoints.best_note()["kept"] == [{"step": 4, "error": 0.9}]
    assert logged


@pytest.mark.parametrize("setting", [{"patience": 1}, {"stop_at_wer": 2.0}])
def test_no_score_ends_nothing(tmp_path, setting):
    settings = replace(SETTINGS, max_steps=6, **setting)
    loop, _ = make_loop(
        tmp_path, [micro_batch(number) for number in range(9)], settings, validate=lambda model, device: {}
    )
    assert loop.run() == 6 and loop.checkpoints.best_note() is None


# --- evaluation, trials, manifests


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_a_test_is_scored_where_few_enough_recordings_are_unreadable(readable, unreadable, limit):
    results = [{"hypothesis": "a"}] * readable + [{"hypothesis": None, "error": "can't read audio /x"}] * unreadable
    if readable and unreadable <= limit * len(results):
        check_unreadable(results, limit)
        return
    with pytest.raises(DataError, match=f"{unreadable} of {len(results)} test recordings can't be read") as error:
        check_unreadable(results, limit)
    assert error.value.remedy and ("can't read audio /x" in error.value.remedy) == (unreadable > 0)


def test_a_trial_without_a_score_has_none():
    assert score_of({"best_error": 0.25}) == 0.25
    assert score_of({"best_error": math.inf}) is score_of({"best_error": math.nan}) is score_of({}) is None


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["c1", "c2"]), st.sampled_from(["bad_json", "empty_text", "skipme"])),
        st.integers(1, 30),
    ),
    st.integers(0, 60),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_any_number_of_bad_rows_is_reported_with_the_first_of_each_reason(counts, usable, limit):
    rejected = RejectedRows(num_rows=usable + sum(counts.values()))
    for (corpus, reason), number in counts.items():
        for line in range(1, number + 1):
            rejected.add(corpus, BadRow(f"/{corpus}.jsonl", line, reason, "what was found"))
    corpora = [Corpus("c1", "/c1.jsonl"), Corpus("c2", "/c2.jsonl")]
    bad = sum(number for (_, reason), number in counts.items() if reason != "skipme")
    if usable and bad <= limit * rejected.num_rows:
        rejected.check("data.dev", corpora, usable, limit)
        return
    with pytest.raises(ManifestError, match=r"data\.dev") as error:
        rejected.check("data.dev", corpora, usable, limit)
    assert error.value.remedy
    for corpus, reason in counts:
        assert f"corpus {corpus}: /{corpus}.jsonl:1: {reason}: what was found" in str(error.value)
    if not counts:
        assert "/c1.jsonl" in str(error.value)


def test_an_error_about_rows_is_bounded():
    rejected = RejectedRows(num_rows=10**6)
    for number in range(500):
        rejected.add(f"c{number}", BadRow("/m.jsonl", 1, "bad_json", "x"))
    with pytest.raises(ManifestError) as error:
        rejected.check("data.dev", [Corpus(f"c{number}", str(Path("/m") / str(number))) for number in range(500)], 0, 1)
    assert len(str(error.value)) < 4000


def test_an_empty_bucket_has_no_padding():
    lengths = LengthHistogram.from_lengths(np.array([500, 500, 4000]), np.array([5, 5, 5]))
    plan = make_plan(lengths, BucketSettings(2, 2, max_duration_ms=5000, tps_sigma=None), "", None)
    scores = [*zip(plan.counts, plan.duration_padding, strict=True), *zip(plan.counts, plan.token_padding, strict=True)]
    assert all((padding is None) == (count == 0) for count, padding in scores)


def test_a_schedule_without_a_step_has_no_simulation():
    schedule = BatchSchedule(1, Mixture(((1,),), (1.0,)), (4,), 1)
    with pytest.raises(PlanError, match="no step for 2 worker"):
        simulate(schedule, [(np.array([900]), np.array([9]))], 2, 5)


@pytest.mark.usefixtures("local_ray")
def test_training_does_not_validate_on_nothing(corpus, tmp_path):
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    train = {"num_workers": 1, "max_steps": 4, "validate_every_steps": 2, "patience": 1, "max_failures": 3}
    config = tiny_config(copy, tmp_path, train=train, tracking={"enabled": False})
    run_pipeline(config, Console(quiet=True), ("statistics", "buckets", "assign", "oomptimize"))
    dev = copy / "dev.jsonl"
    for row in map(json.loads, dev.read_text().splitlines()):
        (copy / row["audio_filepath"]).unlink()
    with pytest.raises(TrainingError, match=r"(\d+) of \1 dev recordings can't be read.*(?s:.)*no such file"):
        run_pipeline(config, Console(quiet=True), ("train",))
    assert not (config.run_dir / "checkpoints" / "best.json").exists()
    for text, expected in (("", "data.dev have no rows"), ("{oops\n", r"no usable row(?s:.)*dev.jsonl:1: bad_json")):
        dev.write_text(text)
        with pytest.raises(ManifestError, match=expected):
            run_pipeline(config, Console(quiet=True), ("train",))
