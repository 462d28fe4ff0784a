"""`report.html`: a self-contained page about the run, made from the files in its folder.

Anything that a stage did not write, or that can't be read or drawn, is stated on the page: reports matter most for runs
that went wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet as pq
from jinja2 import TemplateError

from raytrain.lengths.compare import PaddingRow
from raytrain.report import figures
from raytrain.report.ablation import ablation_figures
from raytrain.report.ablation_results import AblationBody, PredictedBody
from raytrain.report.ablation_tables import ablation_tables
from raytrain.report.rendering import write_page
from raytrain.report.run_files import RunFiles
from raytrain.report.samples import samples_of
from raytrain.report.training_figures import training_figures
from raytrain.report.views import Grid, Interval, ProbedCorpus, Profile, ProfileSizes, RateBin, ScoreTotals, Totals
from raytrain.storage.artifacts import view_of

_Shown = TypeVar("_Shown")
# What reading artifacts with unexpected contents raises.
_NONSENSE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_NOTHING: dict[str, object] = {"scores": None, "rejected": [], "audio": [], "probed": {}, "replaced": []}


def write_report(run_dir: Path, out: Path, *, title: str) -> Path:
    """Write the page for the artifacts in `run_dir` and return its path."""
    notes: list[str] = []
    files = RunFiles.read(run_dir, notes)
    drawn, missing = _figures(files)
    values: dict[str, object] = {
        "title": title,
        "facts": _made("The summary", lambda: _facts(files), notes),
        "figures": drawn,
        "samples": _made("Transcripts", lambda: samples_of(files.hypotheses), notes),
        "tables": _made("The ablation", lambda: ablation_tables(*_ablation(files)), notes),
        "has_errors": out.with_name("errors.html").exists(),
        "scores": files.scores,
        "rejected": (files.assignment or {}).get("rejected_examples", []),
        "replaced": files.unreadable,
        "audio": (files.statistics or {}).get("audio_examples", []),
        "probed": dict(_made("The audio that was probed", lambda: _probed(files), notes)),
    }
    try:
        return write_page(out, "report.html", **values, missing=notes + missing)
    except (*_NONSENSE, TemplateError) as error:
        notes.append(f"Scores and rejected rows can't be shown ({error}): rerun evaluate and assign.")
    return write_page(out, "report.html", **values | _NOTHING, missing=notes + missing)


def _made(name: str, make: Callable[[], list[_Shown]], notes: list[str]) -> list[_Shown]:
    """The result of `make`; if its artifacts are damaged, nothing, and a note is added."""
    try:
        return make()
    except _NONSENSE as error:
        notes.append(f"{name} can't be shown ({type(error).__name__}: {error}): rerun the stages.")
        return []


def _probed(files: RunFiles) -> list[tuple[str, int]]:
    """The recordings of each corpus whose headers were read."""
    corpora = view_of((files.statistics or {}).get("audio", {}), dict[str, ProbedCorpus])
    return [(name, corpus.probed) for name, corpus in corpora.items()]


def _ablation(files: RunFiles) -> tuple[PredictedBody | None, AblationBody | None]:
    predicted, trained = files.ablation_predicted, files.ablation
    return (
        view_of(predicted, PredictedBody) if predicted else None,
        view_of(trained, AblationBody) if trained else None,
    )


# --- the summary


def _facts(files: RunFiles) -> list[tuple[str, str]]:
    facts = []
    if files.statistics:
        totals = view_of(files.statistics, Totals)
        facts += [("utterances", f"{totals.utterances}"), ("hours", f"{totals.hours:.2f}")]
    if files.bucket_plan:
        facts.append(("buckets", str(len(view_of(files.bucket_plan["plan"], Grid).buckets))))
    for profile in view_of((files.batch_profile or {}).get("profiles", []), list[ProfileSizes]):
        sizes = profile.batch_sizes
        facts.append(("batch sizes", f"{max(sizes)} … {min(sizes)} ({profile.setting.device_name})"))
    if files.metrics:
        last = files.metrics[-1]
        facts += [("steps", str(last["step"])), ("training", f"{last['time_s'] / 60:.1f} min")]
    return facts + (_score_facts(view_of(files.scores, ScoreTotals)) if files.scores else [])


def _score_facts(scores: ScoreTotals) -> list[tuple[str, str]]:
    facts = []
    if scores.wer is not None and scores.utterances:
        facts.append((_with_interval("test WER", scores.wer_ci, 100), f"{100 * scores.wer:.1f} %"))
    for language, value in scores.bleu.items():
        interval = scores.bleu_ci.get(language)
        facts.append((_with_interval(f"test BLEU, {language}", interval, 1), f"{value:.1f}"))
    return facts


def _with_interval(name: str, ends: Interval | None, scale: float) -> str:
    return f"{name} (95 %: {scale * ends[0]:.1f} – {scale * ends[1]:.1f})" if ends else name


# --- figures


def _figures(files: RunFiles) -> tuple[list[figures.Figure], list[str]]:
    """All figures that the artifacts allow, and a sentence per missing figure."""
    drawn: list[figures.Figure] = []
    missing: list[str] = []

    def add(name: str, draw: Callable[[], list[figures.Figure]]) -> None:
        # One bad file must not affect the other figures.
        try:
            drawn.extend(draw())
        except (*_NONSENSE, OSError) as error:
            missing.append(f"{name} can't be drawn ({type(error).__name__}: {error}).")

    plan, profile, statistics = files.bucket_plan, files.batch_profile, files.statistics
    histogram = files.folder / "histogram.parquet"
    if plan and histogram.exists():
        add("The length histogram", lambda: [_lengths(histogram, plan["plan"])])
    else:
        missing.append("There is no bucket plan yet: run the stages statistics and buckets.")
    if plan and (rows := plan.get("padding_by_scheme")):
        add("Padding by scheme", lambda: [figures.padding(view_of(rows, list[PaddingRow]))])
    if statistics and (bins := statistics.get("tokens_per_second")):
        add("Tokens per second", lambda: [figures.speaking_rate(view_of(bins, list[RateBin]))])
    if plan and profile:
        add("The batch profile", lambda: _profiles(plan["plan"], profile["profiles"]))
    else:
        missing.append("There is no batch profile yet: run the stage oomptimize.")
    if files.metrics:
        add("The training curves", lambda: training_figures(files.metrics))
    else:
        missing.append("There are no training metrics yet: run the stage train.")
    if files.ablation_predicted or files.ablation:
        add("The ablation", lambda: ablation_figures(*_ablation(files)))
    return drawn, missing


def _lengths(histogram: Path, plan: object) -> figures.Figure:
    table = pq.read_table(histogram)
    durations_ms, tokens, counts = (table[name].to_numpy() for name in ("duration_ms", "tokens", "count"))
    return figures.lengths(durations_ms, tokens, counts, view_of(plan, Grid))


def _profiles(plan: object, profiles: object) -> list[figures.Figure]:
    grid = view_of(plan, Grid)
    return [figures.batch_profile(grid, profile) for profile in view_of(profiles, list[Profile])]
