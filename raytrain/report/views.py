"""What the report reads from a run's artifacts: frozen views of just these fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Interval = tuple[float, float]
Metrics = Mapping[str, float]  # a line of metrics.jsonl


@dataclass(frozen=True)
class Totals:
    """From `statistics.json`: the training data's size."""

    utterances: int
    hours: float


@dataclass(frozen=True)
class RateBin:
    """From `statistics.json`: tokens per second of the utterances between two durations."""

    from_ms: int
    to_ms: int
    mean: float
    std: float


@dataclass(frozen=True)
class ProbedCorpus:
    """From `statistics.json`: how many recordings of a corpus had their headers read."""

    probed: int


@dataclass(frozen=True)
class Grid:
    """From `bucket_plan.json`: each bucket's longest duration (ms) and most tokens."""

    buckets: list[tuple[int, int]]


@dataclass(frozen=True)
class ProfileDevice:
    """From `batch_profile.json`: the device, and the fraction of its memory that a step may use."""

    device_name: str
    device_gib: float
    memory_fraction: float

    @property
    def budget_gib(self) -> float:
        """The bytes that a step may use."""
        return self.device_gib * self.memory_fraction


@dataclass(frozen=True)
class ProfileSizes:
    """Of `batch_profile.json`: the batch size of each bucket."""

    setting: ProfileDevice
    batch_sizes: list[int]


@dataclass(frozen=True)
class Profile(ProfileSizes):
    """Of `batch_profile.json`: batch size and peak memory of each bucket; `confirmed` by real steps, or traced."""

    peak_gib: list[float]
    confirmed: bool


@dataclass(frozen=True)
class Score:
    """Of `scores.json`: a word error rate with its 95 % interval."""

    wer: float | None
    utterances: int
    wer_ci: Interval | None = None


@dataclass(frozen=True)
class ScoreTotals(Score):
    """Of `scores.json`: the rates over all languages; BLEU by target language, with its 95 % intervals."""

    bleu: dict[str, float] = field(default_factory=dict)
    bleu_ci: dict[str, Interval | None] = field(default_factory=dict)
