"""`report.html`: the run's own story from the files of its folder, one page that needs nothing else.

What a stage did not write, or what can't be read or drawn, is said on the page in plain words: a report on a run
that went wrong is when one is needed most.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from raytrain.report import figures
from raytrain.report.ablation import ablation_figures, ablation_tables
from raytrain.report.rendering import write_page
from raytrain.storage.artifacts import is_count, lines_of, parse_json, read_at_once

_NUM_SAMPLES = 12


def write_report(run_dir: Path, out: Path, *, title: str) -> Path:
    """Write the page for the artefacts in `run_dir` and return its path."""
    notes: list[str] = []
    names = ("statistics", "bucket_plan", "batch_profile", "scores", "ablation_predicted", "ablation")
    files = {name: _body(run_dir / f"{name}.json", notes) for name in names}
    files["assignment"] = _body(run_dir / "assignment" / "index.json", notes)
    metrics = [row for row in _lines(run_dir / "metrics.jsonl", notes) if is_count(row.get("step"))]
    hypotheses = _lines(run_dir / "hypotheses.jsonl", notes)
    drawn, missing = _figures(run_dir, files, metrics)
    values: dict[str, Any] = {
        "title": title,
        "facts": _made("The summary", lambda: _facts(files, metrics), notes),
        "figures": drawn,
        "samples": _made("Transcripts", lambda: _samples(hypotheses), notes),
        "tables": _made("The ablation", lambda: ablation_tables(files["ablation_predicted"], files["ablation"]), notes),
        "has_errors": out.with_name("errors.html").exists(),
        "scores": files["scores"],
        "rejected": (files["assignment"] or {}).get("rejected_examples", []),
        "replaced": [row for row in _lines(run_dir / "quarantine.jsonl", notes) if "error" in row],
        "audio": (files["statistics"] or {}).get("audio_examples", []),
        "probed": dict(_made("The audio that was looked at", lambda: _probed(files["statistics"]), notes)),
    }
    try:
        return write_page(out, "report.html", **values, missing=notes + missing)
    except (*_NONSENSE, TemplateError) as error:
        notes.append(f"Scores and rejected rows can't be shown ({error}): rerun evaluate and assign.")
    return write_page(out, "report.html", **values | _NOTHING, missing=notes + missing)


# What comes of artefacts that hold something else than their stages write.
_NONSENSE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


_NOTHING = {"scores": None, "rejected": [], "audio": [], "probed": {}, "replaced": []}


def _probed(statistics: Any) -> list[tuple[str, int]]:
    """Recordings of each corpus whose headers were read."""
    corpora = (statistics or {}).get("audio", {})
    return [(name, corpus["probed"]) for name, corpus in corpora.items()]


def _made(name: str, make: Callable[[], list[Any]], notes: list[str]) -> list[Any]:
    """What `make` gives, nothing where its artefacts are damaged, which is noted."""
    try:
        return make()
    except _NONSENSE as error:
        notes.append(f"{name} can't be shown ({type(error).__name__}: {error}): rerun the stages.")
        return []


def _body(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        body = parse_json(read_at_once(path))["body"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        notes.append(f"{path.name} can't be read ({error}): rerun its stage.")
        return None
    if not isinstance(body, dict):
        notes.append(f"{path.name} holds something else than its stage writes: rerun its stage.")
        return None
    return body


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file; a killed writer leaves half a line, which is counted."""
    rows, broken = [], 0
    for line in lines_of(path):
        try:
            row = json.loads(line)
            rows.append(row) if isinstance(row, dict) else None
        except (ValueError, RecursionError):
            broken += bool(line.strip())
    if broken:
        notes.append(f"{path.name} has {broken} broken lines, which are left out here.")
    return rows


def _facts(files: dict[str, Any], metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    facts = []
    if statistics := files["statistics"]:
        facts += [("utterances", f"{statistics['utterances']}"), ("hours", f"{statistics['hours']:.2f}")]
    if plan := files["bucket_plan"]:
        facts.append(("buckets", str(len(plan["plan"]["buckets"]))))
    for profile in (files["batch_profile"] or {}).get("profiles", ()):
        sizes, device = profile["batch_sizes"], profile["setting"]["device_name"]
        facts.append(("batch sizes", f"{max(sizes)} … {min(sizes)} ({device})"))
    if metrics:
        facts += [("steps", str(metrics[-1]["step"])), ("training", f"{metrics[-1]['time_s'] / 60:.1f} min")]
    if scores := files["scores"]:
        if scores["wer"] is not None and scores["utterances"]:
            facts.append((_with_interval("test WER", scores.get("wer_ci"), 100), f"{100 * scores['wer']:.1f} %"))
        intervals = scores.get("bleu_ci", {})
        for language, value in scores.get("bleu", {}).items():
            facts.append((_with_interval(f"test BLEU, {language}", intervals.get(language), 1), f"{value:.1f}"))
    return facts


def _with_interval(name: str, ends: list[float] | None, scale: float) -> str:
    return f"{name} (95 %: {scale * ends[0]:.1f} – {scale * ends[1]:.1f})" if ends else name


def _figures(
    run_dir: Path, files: dict[str, Any], metrics: list[dict[str, Any]]
) -> tuple[list[figures.Figure], list[str]]:
    drawn: list[figures.Figure] = []
    missing: list[str] = []

    def add(name: str, draw: Callable[[], list[figures.Figure]]) -> None:
        # One bad file must not cost the other figures.
        try:
            drawn.extend(draw())
        except (*_NONSENSE, OSError) as error:
            missing.append(f"{name} can't be drawn ({type(error).__name__}: {error}).")

    plan, profile, statistics = files["bucket_plan"], files["batch_profile"], files["statistics"]
    histogram = run_dir / "histogram.parquet"
    if plan and histogram.exists():
        add("The length histogram", lambda: [figures.lengths(*_histogram(histogram), plan["plan"])])
    else:
        missing.append("There is no bucket plan yet: run the stages statistics and buckets.")
    if plan and plan.get("padding_by_scheme"):
        add("Padding by scheme", lambda: [figures.padding(plan["padding_by_scheme"])])
    if statistics and statistics.get("tokens_per_second"):
        add("Tokens per second", lambda: [figures.speaking_rate(statistics["tokens_per_second"])])
    if plan and profile:
        add("The batch profile", lambda: [figures.batch_profile(plan["plan"], one) for one in profile["profiles"]])
    else:
        missing.append("There is no batch profile yet: run the stage oomptimize.")
    if metrics:
        add("The training curves", lambda: _training_figures(metrics))
    else:
        missing.append("There are no training metrics yet: run the stage train.")
    predicted, trained = files["ablation_predicted"], files["ablation"]
    if predicted or trained:
        add("The ablation", lambda: ablation_figures(predicted, trained))
    return drawn, missing


def _histogram(path: Path) -> list[Any]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return [table[name].to_numpy() for name in ("duration_ms", "tokens", "count")]


def _training_figures(metrics: list[dict[str, Any]]) -> list[figures.Figure]:
    steps = [row for row in metrics if "loss" in row]
    checks = [row for row in metrics if "wer" in row]
    drawn = []
    if steps:
        first, last = steps[0], steps[-1]
        went = "fell" if last["loss"] < first["loss"] else "did not fall: it went"
        drawn.append(
            figures.curve(
                "Loss",
                metrics,
                {"loss": "training", "val_loss": "validation (cross-entropy)"},
                "loss per token",
                f"The training loss {went} from {first['loss']:.2f} to {last['loss']:.2f} per token in "
                f"{last['step']} steps.",
            )
        )
    if checks:
        best = min(checks, key=lambda row: row["wer"])
        sentence = f"The lowest validation WER is {best['wer']:.1%}, at step {best['step']}"
        keys = {"wer": "validation WER"}
        drawn.append(figures.curve("WER by step", checks, keys, "WER (%)", f"{sentence}.", percent=True))
        drawn.append(
            figures.curve(
                "WER by wall time",
                checks,
                keys,
                "WER (%)",
                f"{sentence}, after {best['time_s'] / 60:.1f} minutes.",
                by="time_s",
                scale=1 / 60,
                percent=True,
            )
        )
    rates = [row for row in steps if "lr" in row]
    if rates:
        top = max(rates, key=lambda row: row["lr"])
        drawn.append(
            figures.curve(
                "Learning rate",
                steps,
                {"lr": "learning rate"},
                "learning rate",
                f"The learning rate peaks at {top['lr']:.1e} at step {top['step']} and ends at {rates[-1]['lr']:.1e}.",
            )
        )
    sizes = [row["batch_size"] for row in steps if "batch_size" in row]
    if sizes:
        mean = sum(sizes) / len(sizes)
        drawn.append(
            figures.curve(
                "Batch size",
                steps,
                {"batch_size": "utterances over all workers"},
                "utterances per step",
                f"A step takes {mean:.1f} utterances over all workers on average.",
            )
        )
    peaks = [row["memory_gib"] for row in steps if "memory_gib" in row]
    if peaks:
        drawn.append(
            figures.curve(
                "Memory",
                steps,
                {"memory_gib": "peak of worker 0"},
                "GiB",
                f"The first worker's memory peaked at {max(peaks):.2f} GiB.",
            )
        )
    return drawn


def _samples(hypotheses: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first transcripts of each language in turn, with the words that differ marked."""
    by_language: dict[str, list[dict]] = {}
    for item in hypotheses:
        if isinstance(item.get("hypothesis"), str) and isinstance(item.get("text"), str):
            by_language.setdefault(str(item.get("lang", "")), []).append(item)
    chosen = []
    for place in range(_NUM_SAMPLES):
        chosen += [items[place] for items in by_language.values() if place < len(items)]
    return [
        {**item, "words": _marked(item.get("reference", item["text"]), item["hypothesis"])}
        for item in chosen[:_NUM_SAMPLES]
    ]


def _marked(reference: str, hypothesis: str) -> list[tuple[str, bool]]:
    """Words of the hypothesis with whether they differ; a lost word shows as a gap."""
    old, new = reference.split(), hypothesis.split()
    words: list[tuple[str, bool]] = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words += [(word, kind != "equal") for word in new[start:end]]
        if kind == "delete":
            words.append(("␣", True))
    return words
