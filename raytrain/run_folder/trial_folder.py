"""The run folder of a trial, which shares the artifacts of the run it belongs to, and the settings it tries."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from raytrain.config import Config, check_config
from raytrain.errors import ConfigError
from raytrain.storage.artifacts import content_id, file_id, make_folder
from raytrain.storage.locations import is_uri
from raytrain.storage.run_files import BATCH_PROFILE, BUCKET_PLAN, CHUNKS, STATISTICS

SHARED = (
    "tokenizer",
    CHUNKS,
    STATISTICS,
    BUCKET_PLAN,
    BATCH_PROFILE,
    "assignment",
)
_SEARCHED_SECTIONS = ("train", "model", "augment")


@dataclass(frozen=True)
class TrialJob:
    """A trial: the `config` as JSON, the `run_dir` whose artifacts it shares, and the locations of the trials' folders
    and the tracking server. `settings`, by dotted name, override the configuration; `files`, by name, replace artifacts
    of the run; `label` identifies the trial in a comparison."""

    config: dict[str, Any]
    run_dir: str
    trials_dir: str
    tracking_uri: str
    label: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    parent_run_id: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrialJob:
        """The job in a JSON object, which may have other keys."""
        return cls(**{part.name: values[part.name] for part in fields(cls) if part.name in values})

    def folder(self, settings: Mapping[str, Any], lineage: str) -> Path:
        """The trial's run folder, created if necessary; the same one for the same settings and inputs."""
        files = {name: Path(self.run_dir) / name for name in SHARED}
        files |= {name: Path(path) for name, path in self.files.items()}
        identity = content_id([settings, lineage, self.label, file_id(files[BATCH_PROFILE])])
        folder = make_folder(Path(self.trials_dir) / f"trial-{identity[:12]}")
        for name, path in files.items():
            with contextlib.suppress(FileExistsError):
                if path.exists():
                    (folder / name).symlink_to(path)
        return folder


def with_settings(config: Config, settings: Mapping[str, Any], source: str = "trial") -> Config:
    """The configuration with a trial's settings, given by dotted name. Raises `ConfigError` for settings that would
    change the artifacts that trials share."""
    values = config.model_dump(mode="json")
    values["train"]["storage_path"] = None  # the best settings are trained again; trials are disposable
    for name, value in settings.items():
        _check_searched(name, source)
        node = values
        *parents, last = name.split(".")
        for part in parents:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[last] = value
    return check_config(values, source=f"{source} with {settings}")


def _check_searched(name: str, source: str) -> None:
    section, _, setting = name.partition(".")
    if section not in _SEARCHED_SECTIONS or (section == "model" and "spec_augment" not in setting):
        raise ConfigError(
            f"{source} can't search {name}",
            allowed="train.…, augment.… and model.spec_augment.…",
            why="any other setting changes the artifacts that trials share",
            remedy=f"remove {name} from tune.space, and set it for the whole run instead",
        )


def check_on_disk(config: Config, what: str) -> None:
    """Raises `ConfigError` for a run folder at a URI, where trials can't read each other's artifacts."""
    if is_uri(config.run_location):
        raise ConfigError(
            f"{what} needs a run folder on a shared disk",
            got=f"run.root {config.run_location.rpartition('/')[0]}",
            why="its trials read one another's artifacts in place",
            remedy="set run.root to a shared folder for this command",
        )
