"""`report.html`: the run's own story from the files of its folder, one page that needs nothing else.

What a stage did not write is said on the page in plain words.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import jinja2

from raytrain.artifacts import atomic_write_bytes
from raytrain.errors import ArtifactError
from raytrain.report import figures

_TEMPLATE = Path(__file__).with_name("template.html")
_NUM_SAMPLES = 12


def write_report(run_dir: Path, out: Path, *, title: str) -> Path:
    """Write the page for the artefacts in `run_dir` and return its path."""
    files = {name: _body(run_dir / f"{name}.json") for name in ("statistics", "bucket_plan", "batch_profile", "scores")}
    files["assignment"] = _body(run_dir / "assignment" / "index.json")
    metrics, hypotheses = _lines(run_dir / "metrics.jsonl"), _lines(run_dir / "hypotheses.jsonl")
    drawn, missing = _figures(run_dir, files, metrics)
    page = _environment().from_string(_TEMPLATE.read_text()).render(
        title=title,
        facts=_facts(files, metrics),
        figures=drawn,
        missing=missing,
        samples=_samples(hypotheses),
        scores=files["scores"],
        rejected=(files["assignment"] or {}).get("rejected", {}),
        examples=(files["statistics"] or {}).get("rejected_examples", {}),
    )  # fmt: skip
    atomic_write_bytes(out, page.encode())
    return out


def _environment() -> jinja2.Environment:
    # All text is escaped: transcripts and file names come from outside.
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    return environment


def _body(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())["body"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} can't be read", why=str(error), remedy="rerun its stage") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]


def _facts(files: dict[str, Any], metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    facts = []
    if statistics := files["statistics"]:
        facts += [("utterances", f"{statistics['utterances']}"), ("hours", f"{statistics['hours']:.2f}")]
    if plan := files["bucket_plan"]:
        facts.append(("buckets", str(len(plan["plan"]["buckets"]))))
    if profile := files["batch_profile"]:
        facts.append(("batch sizes", f"{max(profile['batch_sizes'])} … {min(profile['batch_sizes'])}"))
    if metrics:
        facts += [("steps", str(metrics[-1]["step"])), ("training", f"{metrics[-1]['time_s'] / 60:.1f} min")]
    if scores := files["scores"]:
        facts.append(("test WER", f"{100 * scores['wer']:.1f} %"))
    return facts


def _figures(
    run_dir: Path, files: dict[str, Any], metrics: list[dict[str, Any]]
) -> tuple[list[figures.Figure], list[str]]:
    drawn, missing = [], []
    plan, profile, statistics = files["bucket_plan"], files["batch_profile"], files["statistics"]
    histogram = run_dir / "histogram.parquet"
    if plan and histogram.exists():
        import pyarrow.parquet as pq

        table = pq.read_table(histogram)
        columns = [table[name].to_numpy() for name in ("duration_ms", "tokens", "count")]
        drawn.append(figures.lengths(*columns, plan["plan"]))
    else:
        missing.append("There is no bucket plan yet: run the stages statistics and buckets.")
    if plan and plan["padding_by_scheme"]:
        drawn.append(figures.padding(plan["padding_by_scheme"]))
    if statistics and statistics["tokens_per_second"]:
        drawn.append(figures.speaking_rate(statistics["tokens_per_second"]))
    if plan and profile:
        drawn.append(figures.batch_profile(plan["plan"], profile))
    else:
        missing.append("There is no batch profile yet: run the stage oomptimize.")
    if metrics:
        drawn += _training_figures(metrics)
    else:
        missing.append("There are no training metrics yet: run the stage train.")
    return drawn, missing


def _training_figures(metrics: list[dict[str, Any]]) -> list[figures.Figure]:
    steps = [row for row in metrics if "loss" in row]
    checks = [row for row in metrics if "wer" in row]
    drawn = []
    if steps:
        first, last = steps[0], steps[-1]
        drawn.append(
            figures.curve(
                "Loss",
                metrics,
                {"loss": "training", "val_loss": "validation (cross-entropy)"},
                "loss per token",
                f"The training loss fell from {first['loss']:.2f} to {last['loss']:.2f} per token in "
                f"{last['step']} steps.",
            )  # fmt: skip
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
            )  # fmt: skip
        )
    if steps:
        peak = max(row["lr"] for row in steps)
        drawn.append(
            figures.curve(
                "Learning rate",
                steps,
                {"lr": "learning rate"},
                "learning rate",
                f"Warm-up to {peak:.1e}, then inverse square root.",
            )  # fmt: skip
        )
        mean = sum(row["batch_size"] for row in steps) / len(steps)
        drawn.append(
            figures.curve(
                "Batch size",
                steps,
                {"batch_size": "utterances over all workers"},
                "utterances per step",
                f"A step takes {mean:.1f} utterances over all workers on average.",
            )  # fmt: skip
        )
        top = max(row["memory_gib"] for row in steps)
        drawn.append(
            figures.curve(
                "Memory",
                steps,
                {"memory_gib": "peak of worker 0"},
                "GiB",
                f"The first worker's memory peaked at {top:.2f} GiB.",
            )  # fmt: skip
        )
    return drawn


def _samples(hypotheses: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first transcripts of each language in turn, with the words that differ marked."""
    by_language: dict[str, list[dict]] = {}
    for item in hypotheses:
        if item["hypothesis"] is not None:
            by_language.setdefault(item["lang"], []).append(item)
    chosen = []
    for place in range(_NUM_SAMPLES):
        chosen += [items[place] for items in by_language.values() if place < len(items)]
    return [{**item, "words": _marked(item["text"], item["hypothesis"])} for item in chosen[:_NUM_SAMPLES]]


def _marked(reference: str, hypothesis: str) -> list[tuple[str, bool]]:
    """Words of the hypothesis with whether they differ; a lost word shows as a gap."""
    old, new = reference.split(), hypothesis.split()
    words: list[tuple[str, bool]] = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words += [(word, kind != "equal") for word in new[start:end]]
        if kind == "delete":
            words.append(("␣", True))
    return words
