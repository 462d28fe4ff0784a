"""`batch_probes.json`: the answers of batch size probes, so that an interrupted search can resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, read_state
from raytrain.training.memory.coordinator import (
    Answer,
    AnswerNote,
    ProbeCoordinator,
    ProbeJob,
    answers_from_json,
    answers_to_json,
)


@dataclass(frozen=True)
class ProbesNote:
    """The file's body: the answers of each job, by job id."""

    jobs: dict[str, list[AnswerNote]]


def read_answers(path: Path, job: ProbeJob) -> list[Answer]:
    """The answers that an interrupted process left for an equal job; empty if the file has none that can be read."""
    try:
        answers = answers_from_json(_read_jobs(path).get(job.id, []))
        ProbeCoordinator(job, answers)  # raises if they are not answers to this job
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError):
        return []
    return answers


def write_answers(path: Path, job: ProbeJob, answers: list[Answer]) -> None:
    """Replace the file's answers for a job."""
    jobs = {**_read_jobs(path), job.id: answers_to_json(answers)}
    atomic_write_bytes(path, canonical_json({"jobs": jobs}))


def _read_jobs(path: Path) -> dict[str, Any]:
    note = read_state(path, ProbesNote)
    return note["jobs"] if note else {}
