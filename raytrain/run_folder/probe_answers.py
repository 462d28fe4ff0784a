"""`batch_probes.json`: what probes of batch sizes came to, so that a search that was stopped resumes."""

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
    """What the file holds: the answers of each job, by the job's id."""

    jobs: dict[str, list[AnswerNote]]


def read_answers(path: Path, job: ProbeJob) -> list[Answer]:
    """The answers that a stopped process left for an equal job; none where the file has none that can be read."""
    try:
        answers = answers_from_json(_read_jobs(path).get(job.id, []))
        ProbeCoordinator(job, answers)  # which learns from them, where they are answers to this job
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError):
        return []
    return answers


def write_answers(path: Path, job: ProbeJob, answers: list[Answer]) -> None:
    """Put a job's answers in place of those that the file has for it."""
    jobs = {**_read_jobs(path), job.id: answers_to_json(answers)}
    atomic_write_bytes(path, canonical_json({"jobs": jobs}))


def _read_jobs(path: Path) -> dict[str, Any]:
    note = read_state(path, ProbesNote)
    return note["jobs"] if note else {}
