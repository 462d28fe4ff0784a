"""The JSON artifacts of a run folder: their formats, and the fields that are read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter

from raytrain.data.corpora.rejected import RejectedExamples
from raytrain.lengths.plan import BucketPlanBody
from raytrain.lengths.profile import BatchProfile
from raytrain.storage.artifacts import read_json

PLAN_FORMAT = "raytrain.bucket_plan/1"
PROFILE_FORMAT = "raytrain.batch_profile/2"
STATISTICS_FORMAT = "raytrain.statistics/4"
CHUNKS_FORMAT = "raytrain.chunks/2"
SCORES_FORMAT = "raytrain.scores/2"

Body = TypeVar("Body")


@dataclass(frozen=True)
class Artifact(Generic[Body]):
    """An artifact's content id and its body."""

    id: str
    body: Body


def read_artifact(path: Path, format: str, kind: type[Body]) -> Artifact[Body]:
    """Read a JSON artifact whose body is a `kind`. Raises `ArtifactError` as `read_json` does."""
    document = read_json(path, format, kind)
    return Artifact(document["id"], TypeAdapter(kind).validate_python(document["body"]))


@dataclass(frozen=True)
class CorpusStatistics:
    """A corpus in `statistics.json`: the fields that are read back."""

    hours: float
    utterances: int
    languages: list[str]


@dataclass(frozen=True)
class StatisticsBody:
    """`statistics.json`: the fields that are read back."""

    rows: int
    histogram_id: str
    by_corpus: dict[str, CorpusStatistics]
    rejected_examples: list[RejectedExamples]


@dataclass(frozen=True)
class PlanBody:
    """The body of `bucket_plan.json`."""

    plan: BucketPlanBody


@dataclass(frozen=True)
class ProfileBody:
    """The body of `batch_profile.json`."""

    profiles: list[BatchProfile]

    def __post_init__(self) -> None:
        if not self.profiles:
            raise ValueError("it holds no profile")
