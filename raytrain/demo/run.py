"""`raytrain demo`: generate the corpus, run the pipeline, show the results, and check them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.table import Table

from raytrain.config import Config, load_config
from raytrain.console import Console
from raytrain.demo.speech import make_corpus
from raytrain.lengths.compare import PaddingRow
from raytrain.report.views import Grid, ProfileSizes, Score, Totals
from raytrain.stages.pipeline import run_pipeline
from raytrain.storage.artifacts import view_of
from raytrain.storage.run_files import (
    ASSIGNMENT_INDEX,
    BATCH_PROFILE,
    BUCKET_PLAN,
    ERRORS_PAGE,
    HISTOGRAM,
    HYPOTHESES,
    METRICS,
    REPORT,
    SCORES,
    STATISTICS,
    TRAINED_NOTE,
)
from raytrain.storage.yaml_loading import read_yaml

_Kind = TypeVar("_Kind")
UTTERANCES = {"train": 2400, "dev": 80, "test": 160}
MAX_WER = 0.20
ARTIFACTS = (
    "tokenizer/tokenizer.json",
    HISTOGRAM,
    STATISTICS,
    BUCKET_PLAN,
    ASSIGNMENT_INDEX,
    BATCH_PROFILE,
    TRAINED_NOTE,
    METRICS,
    HYPOTHESES,
    SCORES,
    ERRORS_PAGE,
    REPORT,
    "mlflow.db",
)


def run_demo(root: Path, overrides: list[str], take_over: bool = False) -> int:
    """Run the demo below `root`; returns 0 only if every artifact exists and the WER is low enough."""
    console = Console()
    corpus = (root / "demo-corpus").absolute()
    config = demo_config(root, corpus, overrides)
    with console.stage("corpus") as finish:
        with console.progress("speaking", sum(UTTERANCES.values())) as update:
            make_corpus(corpus, UTTERANCES, seed=config.seed, on_utterance=lambda: update(advance=1))
        finish(f"{sum(UTTERANCES.values())} spoken number strings in English, German, Spanish and French")
    run_pipeline(config, console, take_over=take_over)
    return _show(config, console)


def demo_config(root: Path, corpus: Path, overrides: list[str]) -> Config:
    """The embedded configuration with the demo's folders."""
    values = read_yaml(Path(__file__).with_name("demo.yaml"))
    values["data"]["root"] = str(corpus)
    values["run"] = {"root": str(root.absolute())}
    return load_config(None, overrides, base=values)


def _show(config: Config, console: Console) -> int:
    run_dir = config.run_dir
    missing = [name for name in ARTIFACTS if not (run_dir / name).exists()]
    if missing:
        console.warn(f"the demo did not write {', '.join(missing)}")
        return 1
    scores = _read(run_dir / SCORES, _Scores)
    out = console.rich
    out.print(_summary(run_dir, scores))
    out.print(_transcripts(run_dir))
    program = sys.argv[0] if Path(sys.argv[0]).name != "__main__.py" else "python -m raytrain"
    console.say(f"report:  {run_dir / 'report.html'}")
    console.say(f"MLflow:  {program} ui --config {run_dir / 'config.yaml'}")
    if scores.wer is None:
        console.warn("nothing was scored; something is wrong")
        return 1
    if scores.wer > MAX_WER:
        console.warn(f"WER {scores.wer:.1%} is above {MAX_WER:.0%}; something is wrong")
        return 1
    return 0


@dataclass(frozen=True)
class _Score(Score):
    def __str__(self) -> str:
        if self.wer is None or self.wer_ci is None:
            return "none"
        low, high = self.wer_ci
        return f"{self.wer:.1%} ({low:.1%} to {high:.1%}) on {self.utterances} utterances"


@dataclass(frozen=True)
class _Scores(_Score):
    """From `scores.json`: the score over all languages, and of each."""

    by_language: dict[str, _Score] = field(default_factory=dict)


@dataclass(frozen=True)
class _Plan:
    """From `bucket_plan.json`."""

    plan: Grid
    padding_by_scheme: list[PaddingRow]


@dataclass(frozen=True)
class _Profiles:
    """From `batch_profile.json`."""

    profiles: list[ProfileSizes]


def _summary(run_dir: Path, scores: _Scores) -> Table:
    totals = _read(run_dir / STATISTICS, Totals)
    plan = _read(run_dir / BUCKET_PLAN, _Plan)
    sizes = _read(run_dir / BATCH_PROFILE, _Profiles).profiles[0].batch_sizes
    before, after = plan.padding_by_scheme[0], plan.padding_by_scheme[-1]
    last = json.loads((run_dir / METRICS).read_text().splitlines()[-1])
    table = Table(title="What the demo did", show_header=False, title_justify="left")
    rows = [
        ("training speech", f"{totals.hours:.2f} h, {totals.utterances} utterances"),
        ("buckets", f"{len(plan.plan.buckets)} (duration × tokens)"),
        ("audio padding", f"{before.audio_padding:.1%} in random batches → {after.audio_padding:.1%}"),
        ("token padding", f"{before.token_padding:.1%} in random batches → {after.token_padding:.1%}"),
        ("batch sizes", f"{max(sizes)} … {min(sizes)} per worker"),
        ("training", f"{last['step']} steps, {last['time_s'] / 60:.1f} min"),
        ("WER, held out", str(scores)),
    ]
    rows += [(f"  {language}", str(score)) for language, score in scores.by_language.items()]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _transcripts(run_dir: Path) -> Table:
    table = Table(title="Five transcripts", title_justify="left")
    for heading in ("language", "said", "transcribed"):
        table.add_column(heading)
    for line in (run_dir / HYPOTHESES).read_text().splitlines()[:5]:
        item = json.loads(line)
        table.add_row(item["lang"], item["text"], item["hypothesis"] or f"({item.get('error', '')})")
    return table


def _read(path: Path, kind: type[_Kind]) -> _Kind:
    """The body of an artifact."""
    return view_of(json.loads(path.read_bytes())["body"], kind)
