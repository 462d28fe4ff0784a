"""The report: one file, no external resources, everything escaped, and a page even if artifacts are missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytrain.report.page import write_report
from raytrain.storage.artifacts import write_json

_EVIL = "<script>alert(1)</script>"
_FILES = (
    "histogram.parquet",
    "statistics.json",
    "bucket_plan.json",
    "batch_profile.json",
    "metrics.jsonl",
    "hypotheses.jsonl",
    "scores.json",
)
_BUCKETS = [[2000, 20], [2000, 40], [6000, 40], [6000, 90]]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A whole run folder, small, with markup in every untrusted text."""
    folder = tmp_path / "run"
    folder.mkdir()
    _write_histogram(folder, 600)
    for name, body in _bodies().items():
        write_json(folder / f"{name}.json", f"raytrain.{Path(name).name}/1", body)
    _write_lines(folder / "metrics.jsonl", _metrics())
    hypotheses = [("three one two", "three five two"), (_EVIL, f"{_EVIL} more"), ("lost word", "lost")]
    rows = [
        {"id": str(number), "lang": "en", "text": expected, "hypothesis": got, "duration_ms": 900, "wer": 0.3}
        for number, (expected, got) in enumerate(hypotheses)
    ]
    _write_lines(folder / "hypotheses.jsonl", rows)
    return folder


def _bodies() -> dict[str, Any]:
    rates = [
        {"from_ms": 2000 * i, "to_ms": 2000 * i + 2000, "mean": 9.0 - i, "std": 1.0, "utterances": 9} for i in range(3)
    ]
    schemes = (("random", 0.5, 0.4), ("1D buckets", 0.1, 0.2), ("2D buckets", 0.1, 0.05))
    language = {"wer": 0.125, "utterances": 2, "words": 8, "errors": 1}
    return {
        "statistics": {
            "utterances": 300,
            "hours": 0.25,
            "tokens": 9000,
            "tokens_per_second": rates,
        },
        "bucket_plan": {
            "plan": {"buckets": _BUCKETS},
            "padding_by_scheme": [
                {"scheme": name, "audio_padding": audio, "token_padding": tokens, "mean_batch": 8.0}
                for name, audio, tokens in schemes
            ],
        },
        "batch_profile": {"profiles": [_PROFILE]},
        "scores": {"cer": 0.05, **language, "by_language": {"de": language, _EVIL: language}},
        "assignment/index": {
            "rows": 297,
            "rejected_examples": [
                {
                    "corpus": _EVIL,
                    "reason": "bad_json",
                    "rows": 3,
                    "first": [{"file": f"{_EVIL}.jsonl", "line": 7, "detail": _EVIL}],
                }
            ],
        },
    }


_PROFILE = {
    "plan_id": "p",
    "setting": {"device_name": _EVIL, "device_gib": 16.0, "memory_fraction": 0.9},
    "batch_sizes": [64, 48, 20, 12],
    "peak_gib": [13.0, 14.0, 13.5, 14.2],
    "confirmed": False,
}


def _metrics() -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(10, 210, 10):
        row = {"step": step, "time_s": step * 0.6, "loss": 6.0 - step / 50, "lr": 1e-4, "batch_size": 20.0}
        rows.append({**row, "memory_gib": 3.0, "audio_padding": 0.1, "token_padding": 0.1, "bucket": 1})
        if step % 50 == 0:
            rows.append({"step": step, "time_s": step * 0.6, "wer": 1.0 - step / 400, "val_loss": 3.0})
    return rows


def _write_histogram(folder: Path, num_cells: int) -> None:
    cells = np.arange(1, num_cells + 1) * 10
    table = {"duration_ms": cells, "tokens": cells // 90 + 8, "count": np.ones_like(cells)}
    pq.write_table(pa.table(table), folder / "histogram.parquet")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _page(folder: Path, title: str = "a run") -> str:
    return write_report(folder, folder / "report.html", title=title).read_text()


def test_the_whole_story_is_there(run_dir: Path) -> None:
    page = _page(run_dir)
    for title in (
        "Lengths and buckets",
        "Padding by scheme",
        "Tokens per second",
        "Batch profile",
        "Loss",
        "WER by step",
        "WER by wall time",
        "Learning rate",
        "Batch size",
        "Memory",
    ):
        assert f"<h3>{title}</h3>" in page
    assert page.count("<figure>") == page.count('class="sentence"') == 10
    for expected in (
        "12.5 %",
        "in 4 buckets",
        "Random batches spend 50% of the audio",
        "at step 200",
        "WER is 50.0%",
        "after 2.0 minutes",
        "from 5.80 to 2.00",
    ):
        assert expected in page


def test_nothing_is_fetched_from_outside(run_dir: Path) -> None:
    page = _page(run_dir)
    assert "<link" not in page and "<script" not in page and "@import" not in page
    targets = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', page)
    assert all(target.startswith(("#", "data:")) for pair in targets for target in pair if target)
    assert "errors.html" not in page
    (run_dir / "errors.html").write_text("there")
    assert re.findall(r'<a href="([^"]*)"', _page(run_dir)) == ["errors.html"]  # fetched only on a click


def test_texts_from_outside_are_escaped(run_dir: Path) -> None:
    page = _page(run_dir, title=_EVIL)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5  # title, heading, transcript, language, rejected row


def test_words_that_differ_are_marked(run_dir: Path) -> None:
    assert re.findall(r'<span class="wrong">([^<]*)</span>', _page(run_dir)) == ["five", "more", "␣"]


def test_scores_have_their_intervals_and_durations(run_dir: Path) -> None:
    rates = {"wer": 0.125, "wer_ci": [0.1, 0.151], "cer": 0.05, "cer_ci": [0.04, 0.0612]}
    rates |= {"wer_normalized": 0.0625, "wer_normalized_ci": [0.05, 0.0789]}
    group = {**rates, "utterances": 1234, "hours": 1.5, "words": 8000, "errors": 1000}
    translations = {"bleu": {"fr": 31.26}, "bleu_ci": {"fr": [30.0, 32.5]}, "chrf": {"fr": 55.5}}
    translations |= {"chrf_ci": {"fr": [54.0, 57.0]}, "translations": {"fr": 321}}
    spans = [{"from_ms": 0, "to_ms": 5000, **group}, {"from_ms": 40_000, "to_ms": None, **group}]
    scores = {**group, "by_language": {"de": group, _EVIL: group}, "by_duration": spans, **translations}
    write_json(run_dir / "scores.json", "raytrain.scores/2", scores)
    page = _page(run_dir)
    assert "<script" not in page
    rows = [re.sub(r"<[^>]*>", " ", row) for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]
    rows = [" ".join(row.split()) for row in rows]
    for first in ("de", "all", "0 – 5", "above 40"):
        assert f"{first} 12.5 % 10.0 – 15.1 6.2 % 5.0 – 7.9 5.0 % 4.0 – 6.1 1000 8000 1234 1.50" in rows
    assert "fr 31.3 30.0 – 32.5 55.5 54.0 – 57.0 321" in rows
    assert "test WER (95 %: 10.0 – 15.1)" in page and "test BLEU, fr (95 %: 30.0 – 32.5)" in page


def test_an_empty_folder_says_which_stages_to_run(tmp_path: Path) -> None:
    page = _page(tmp_path)
    assert "<figure>" not in page
    for stage in ("statistics", "buckets", "oomptimize", "train", "evaluate"):
        assert stage in page


@pytest.mark.parametrize("name", [*_FILES, "assignment"])
def test_any_one_artifact_may_be_missing(run_dir: Path, name: str) -> None:
    path = run_dir / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert "</html>" in _page(run_dir)


def test_equal_runs_give_equal_pages(run_dir: Path) -> None:
    assert _page(run_dir) == _page(run_dir)
