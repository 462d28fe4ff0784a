"""The training runs of an ablation: a run folder for each candidate, and the trials that train in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raytrain.cluster.trials import run_grid
from raytrain.config import Config
from raytrain.console import Console
from raytrain.lengths.histogram import LengthHistogram
from raytrain.run_folder.histograms import read_histogram
from raytrain.stages.pipeline import read_stages, run_pipeline, write_stages
from raytrain.storage.artifacts import make_folder
from raytrain.storage.run_files import CHUNKS, HISTOGRAM, STATISTICS
from raytrain.tracking.runs import tracking_uri


def histogram_of(config: Config, console: Console) -> LengthHistogram:
    """The corpus' lengths, counted if necessary."""
    run_pipeline(config, console, ("statistics",))
    return read_histogram(config.run_dir / HISTOGRAM)


def training_limits(config: Config) -> Config:
    """The run's configuration with the ablation's training limits; saving at each validation is enough."""
    section = config.ablate
    names = ("max_minutes", "max_steps", "validate_every_steps")
    limits = {name: getattr(section, name) for name in names if getattr(section, name) is not None}
    train = replace(
        config.train, **limits, stop_at_wer=section.stop_at_wer, patience=None, checkpoint_every_steps=10**9
    )
    return config.model_copy(update={"train": train})


def prepare_run(config: Config, console: Console, name: str, update: Mapping[str, object]) -> Config:
    """A run folder below `ablate/` with the run's statistics and, for the configuration with `update`, its plan,
    assignment and batch sizes; returns that configuration."""
    values = config.model_dump(mode="json")
    values |= {"name": name, "run": {"root": str(config.run_dir / "ablate")}}
    values["tracking"]["enabled"] = False
    candidate = Config.model_validate(values).model_copy(update=update)
    _share_statistics(config.run_dir, make_folder(candidate.run_dir))
    run_pipeline(candidate, console, ("buckets", "assign", "oomptimize"))
    return candidate


def _share_statistics(source: Path, target: Path) -> None:
    """The artifacts that all candidates share, and the record that their stages are done."""
    for name in ("tokenizer", HISTOGRAM, STATISTICS, CHUNKS):
        if not (target / name).exists():
            (target / name).symlink_to(source / name)
    shared = {name: record for name, record in read_stages(source).items() if name == "statistics"}
    write_stages(target, {**read_stages(target), **shared})


@dataclass(frozen=True)
class PlannedTrial:
    """A training run of `candidate`, from `prepare_run`, with additional `settings`; `files`, by name, replace
    artifacts of its run folder. `scheme` is the scheme it trains, if any."""

    label: str
    candidate: Config
    settings: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    scheme: str | None = None

    def to_json(self, config: Config) -> dict[str, Any]:
        """The job for `RunningTrial`, tracked like the run of `config`."""
        job = {
            "label": self.label,
            "scheme": self.scheme,
            "config": {
                **self.candidate.model_dump(mode="json"),
                "tracking": config.tracking.model_dump(mode="json"),
            },
            "run_dir": str(self.candidate.run_dir),
            "files": dict(self.files),
            "settings": dict(self.settings),
            "tracking_uri": tracking_uri(config, config.run_dir),
        }
        return {name: value for name, value in job.items() if value not in (None, {})}


@dataclass(frozen=True)
class TrialEnd:
    """How a trial ended: its run folder, if it got one, and `why` it failed if it did."""

    folder: Path | None
    why: str | None


def train_trials(
    config: Config, console: Console, jobs: Sequence[PlannedTrial], parent_run_id: str | None
) -> list[TrialEnd]:
    """Train every job as far as possible; returns each outcome, in order. A finished trial is not repeated."""
    folder = config.run_dir / "ablate"
    trials = run_grid(config, console, [job.to_json(config) for job in jobs], folder, parent_run_id)
    return [TrialEnd(Path(trial["folder"]) if trial["folder"] else None, trial["why"]) for trial in trials]
