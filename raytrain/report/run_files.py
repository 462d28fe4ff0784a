"""The files of a run folder, read for the report; an unreadable file produces a note instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.report.views import Metrics
from raytrain.storage.artifacts import is_count, lines_of, parse_json, read_at_once
from raytrain.storage.run_files import BATCH_PROFILE, BUCKET_PLAN, HYPOTHESES, METRICS, QUARANTINE, SCORES, STATISTICS

Body = Mapping[str, Any]  # an artifact's body as in its file


@dataclass(frozen=True)
class RunFiles:
    """Bodies of artifacts and lines of notes."""

    folder: Path
    statistics: Body | None
    bucket_plan: Body | None
    batch_profile: Body | None
    scores: Body | None
    ablation_predicted: Body | None
    ablation: Body | None
    assignment: Body | None
    metrics: list[Metrics]
    hypotheses: list[Body]
    unreadable: list[Body]

    @classmethod
    def read(cls, folder: Path, notes: list[str]) -> RunFiles:
        """Read the folder; `notes` receives a sentence per file that can't be read."""
        return cls(
            folder,
            read_body(folder / STATISTICS, notes),
            read_body(folder / BUCKET_PLAN, notes),
            read_body(folder / BATCH_PROFILE, notes),
            read_body(folder / SCORES, notes),
            read_body(folder / "ablation_predicted.json", notes),
            read_body(folder / "ablation.json", notes),
            read_body(folder / "assignment" / "index.json", notes),
            [line for line in read_lines(folder / METRICS, notes) if is_count(line.get("step"))],
            read_lines(folder / HYPOTHESES, notes),
            [line for line in read_lines(folder / QUARANTINE, notes) if "error" in line],
        )


def read_body(path: Path, notes: list[str]) -> Body | None:
    """The body of an artifact."""
    try:
        body = parse_json(read_at_once(path))["body"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        notes.append(f"{path.name} can't be read ({error}): rerun its stage.")
        return None
    if not isinstance(body, dict):
        notes.append(f"{path.name} holds something other than what its stage writes: rerun its stage.")
        return None
    return body


def read_lines(path: Path, notes: list[str]) -> list[Body]:
    """The complete lines of a JSON Lines file; partial lines left by a killed writer are counted."""
    rows: list[Body] = []
    broken = 0
    for line in lines_of(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            broken += bool(line.strip())
            continue
        if isinstance(row, dict):
            rows.append(row)
    if broken:
        notes.append(f"{path.name} has {broken} broken lines, which are omitted here.")
    return rows
