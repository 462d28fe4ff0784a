"""`Config`: everything about one run. An algorithm's settings are defined next to the class they configure and nested
here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from raytrain.config.data import ELSEWHERE, WRITTEN, AssignSection, DataSection, TokenizerSection
from raytrain.config.experiments import AblateSection, TuneSection
from raytrain.config.sections import ClusterSection, EvaluateSection, OomptimizeSection, RunSection, TrackingSection
from raytrain.config.values import Section
from raytrain.data.augment import AugmentSettings
from raytrain.lengths.plan import BucketSettings
from raytrain.model.config import ModelConfig
from raytrain.redaction import MLFLOW_VARIABLE, holds_credentials
from raytrain.settings import Range, Setting, refuse
from raytrain.storage.locations import absolute, is_uri
from raytrain.storage.run_store import local_folder
from raytrain.training.settings import TrainSettings

RUN_ROOT_VARIABLE = "RAYTRAIN_RUN_ROOT"


class Config(Section):
    """Everything about one run: what to read, what to produce, and how."""

    name: Annotated[
        str, Setting("The run's name, also its folder's name: letters, digits, dots, - and _.", lineage=False)
    ] = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Annotated[int, Range(0, 2**63 - 1), Setting("Seed of all randomness in the run.")] = 1
    run: Annotated[RunSection, Setting("Where results go: <root>/<name>/.", lineage=False)] = RunSection()
    data: Annotated[DataSection, Setting("Corpora by split, and how they are read.")]
    tokenizer: Annotated[TokenizerSection, Setting("A trained tokenizer to use, or how to train one.")] = (
        TokenizerSection()
    )
    buckets: Annotated[
        BucketSettings,
        Setting("How durations and tokens are divided into a grid of buckets, and which rows are rejected."),
    ] = BucketSettings()
    assign: Annotated[AssignSection, Setting("How rows are written into their buckets.")] = AssignSection()
    augment: Annotated[AugmentSettings, Setting("Audio augmentation in training; none by default.")] = AugmentSettings()
    oomptimize: Annotated[
        OomptimizeSection,
        Setting("The memory budget of a step, and the search for the largest batch sizes.", lineage=False),
    ] = OomptimizeSection()
    model: Annotated[
        ModelConfig, Setting("Shape of the Canary model; the defaults are those of canary-180m-flash.")
    ] = ModelConfig()
    train: Annotated[
        TrainSettings,
        Setting("Training. It ends at max_steps, max_epochs or max_minutes, whichever comes first."),
    ] = TrainSettings()
    evaluate: Annotated[
        EvaluateSection, Setting("Decoding of the dev and test corpora, and their scores.", lineage=False)
    ] = EvaluateSection()
    tune: Annotated[TuneSection, Setting("The hyperparameter search of raytrain tune.", lineage=False)] = TuneSection()
    ablate: Annotated[AblateSection, Setting("The batching schemes that raytrain ablate compares.", lineage=False)] = (
        AblateSection()
    )
    tracking: Annotated[TrackingSection, Setting("MLflow.", lineage=False)] = TrackingSection()
    cluster: Annotated[
        ClusterSection,
        Setting(
            "Ray, and which nodes do what: train_… places training and probes, data_… places data processing.",
            lineage=False,
        ),
    ] = ClusterSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        refuse([*self._text_problems(), *self._model_problems(), *self._location_problems()])
        return self

    def _text_problems(self) -> list[str]:
        texts = list(_texts(self.model_dump(mode="json")))
        problems = [
            f"{key} holds credentials, and {WRITTEN}; {ELSEWHERE}" for key, text in texts if holds_credentials(text)
        ]
        return problems + [
            f"{key} contains a NUL character, which names can't have" for key, text in texts if "\0" in text
        ]

    def _model_problems(self) -> list[str]:
        problems = []
        longest = self.model.max_positions + 1  # the decoder does not read the last token
        if self.buckets.max_tokens > longest:
            problems.append(
                f"buckets.max_tokens is {self.buckets.max_tokens}, but the model has positions for {longest} tokens "
                f"(model.max_positions + 1)"
            )
        if self.evaluate.ctc_weight and (self.evaluate.beam_size == 1 or not self.train.ctc_weight):
            problems.append("evaluate.ctc_weight needs a beam_size above 1 and train.ctc_weight, which trains the head")
        return problems

    def _location_problems(self) -> list[str]:
        problems = []
        start = self.train.init_from
        if start and Path(start).expanduser().absolute().is_relative_to(self.run_dir):
            problems.append(
                "train.init_from is in this run's own folder, whose checkpoints are replaced by the new "
                "ones; give the run another name, or copy the model out first"
            )
        if not is_uri(self.run_location):
            return problems
        if self.tracking.enabled and not (self.tracking.uri or os.environ.get(MLFLOW_VARIABLE)):
            problems.append(
                f"run.root is {self.run_location.rpartition('/')[0]}, where MLflow can't keep its "
                f"database; set tracking.uri to a server, or tracking.enabled to false"
            )
        if self.train.storage_path:
            problems.append(
                "train.storage_path copies checkpoints of a run on disk; those of a run at a URI are there already"
            )
        return problems

    @property
    def run_dir(self) -> Path:
        """Absolute path of this run's artifacts on this machine; for a run at a URI, in the cache."""
        return local_folder(self.run_location)

    @property
    def run_location(self) -> str:
        """Absolute path or URI of this run's artifacts, valid on all nodes."""
        root = self.run.root or os.environ.get(RUN_ROOT_VARIABLE) or "runs"
        return f"{root.rstrip('/')}/{self.name}" if is_uri(root) else absolute(f"{root}/{self.name}")

    def section(self, *names: str) -> dict[str, Any]:
        """Named sections as plain JSON values, for keys and records."""
        return self.model_dump(mode="json", include=set(names))


def _texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings in nested settings, each with its dotted key."""
    if isinstance(value, str):
        yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, item in items:
        yield from _texts(item, f"{key}.{name}" if key else str(name))
