"""`Workspace`: the artifacts of one run by name, and their ids.

Batches are built from it in `batches`, dev and test rows in `scored_rows`; what a training depends on is in `lineage`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from raytrain.config import Config
from raytrain.data.assignment import INDEX_FORMAT, Assignment, IndexBody
from raytrain.data.quarantine import Quarantine
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.lengths.plan import BucketPlan
from raytrain.lengths.profile import BatchProfile
from raytrain.model.config import ModelConfig
from raytrain.run_folder.documents import (
    PLAN_FORMAT,
    PROFILE_FORMAT,
    STATISTICS_FORMAT,
    Artifact,
    Body,
    PlanBody,
    ProfileBody,
    StatisticsBody,
    read_artifact,
)
from raytrain.run_folder.quarantine import open_quarantine
from raytrain.storage.artifacts import content_id
from raytrain.storage.locations import is_uri
from raytrain.storage.run_files import ASSIGNMENT_INDEX, BATCH_PROFILE, BUCKET_PLAN, STATISTICS
from raytrain.storage.run_store import RunStore
from raytrain.training.mirror import checkpoints_of

if TYPE_CHECKING:
    from raytrain.training.checkpoint import CheckpointFolder
    from raytrain.training.mirror import CheckpointMirror


class Workspace:
    """Artifacts of one run by name; most are read once, when first asked for."""

    def __init__(self, config: Config, location: Path | str) -> None:
        if is_uri(config.run_location) and Path(location) == config.run_dir:
            location = config.run_location
        self.config, self.store = config, RunStore(location, config.run.cache_size)
        self.run_dir = self.store.local

    def path(self, *parts: str) -> Path:
        """A path below the run folder, or below this machine's copy of it."""
        return self.run_dir.joinpath(*parts)

    def read(self, name: str, format: str, kind: type[Body]) -> Artifact[Body]:
        """The JSON artifact of a name in its current state. Raises `ArtifactError`."""
        self.store.fetch(name)
        return read_artifact(self.path(name), format, kind)

    @cached_property
    def tokenizer(self) -> CanaryTokenizer:
        """The run's tokenizer."""
        self.store.fetch_folder("tokenizer")
        return CanaryTokenizer.load(self.path("tokenizer"))

    def statistics(self) -> StatisticsBody:
        """What statistics counted. Raises `ArtifactError` if it has not run."""
        return self.read(STATISTICS, STATISTICS_FORMAT, StatisticsBody).body

    @cached_property
    def _plan_document(self) -> Artifact[PlanBody]:
        return self.read(BUCKET_PLAN, PLAN_FORMAT, PlanBody)

    @property
    def plan(self) -> BucketPlan:
        """The bucket plan."""
        return BucketPlan.from_body(asdict(self._plan_document.body.plan))

    @property
    def plan_id(self) -> str:
        """The bucket plan's content id."""
        return self._plan_document.id

    def assignment(self) -> Assignment:
        """The assigned rows. Raises `ArtifactError` if assign has not run."""
        self.store.fetch(ASSIGNMENT_INDEX)
        return Assignment(self.path("assignment"), self.store)

    @cached_property
    def assigned_rows_id(self) -> str:
        """The content id of all assigned rows. Raises `ArtifactError` if assign has not run."""
        return self.read(ASSIGNMENT_INDEX, INDEX_FORMAT, IndexBody).body.rows_id

    def profiles(self) -> list[BatchProfile]:
        """The batch profiles, one per kind of device. Raises `ProfileError` if they were made for another plan or
        model."""
        profiles = self.read(BATCH_PROFILE, PROFILE_FORMAT, ProfileBody).body.profiles
        for profile in profiles:
            profile.check_matches(plan_id=self.plan_id, model_id=self.model_id())
        return profiles

    def checkpoints(self, mirror: CheckpointMirror | None = None) -> CheckpointFolder:
        """The run's checkpoints; `mirror` keeps copies of those in a folder on disk."""
        train = self.config.train
        return checkpoints_of(self.store, train.keep_checkpoints, train.keep_best, mirror)

    @cached_property
    def quarantine(self) -> Quarantine:
        """Where this process records broken recordings, each once."""
        return open_quarantine(self.store)

    def model_config(self) -> ModelConfig:
        """The configured model with the tokenizer's vocabulary, and a CTC head if training uses one."""
        return replace(
            self.config.model,
            vocab_size=self.tokenizer.vocab_size,
            ctc_head=self.config.train.ctc_weight > 0,
        )

    def model_id(self) -> str:
        """The id of the model's shape, which a batch profile depends on. Masking takes no memory."""
        values = asdict(self.model_config())
        return content_id({name: value for name, value in values.items() if name != "spec_augment"})
