"""`Context`: what a stage's `run` works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raytrain.config import Config
from raytrain.console import Console
from raytrain.run_folder.workspace import Workspace
from raytrain.tracking.base import Tracker
from raytrain.tracking.runs import RunTracking


@dataclass(frozen=True)
class Context:
    """What a stage works with; `key` is the hash of everything it depends on."""

    workspace: Workspace
    console: Console
    tracking: RunTracking
    key: str

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.workspace.config

    @property
    def tracker(self) -> Tracker:
        """Where the stage logs metrics and artifacts."""
        return self.tracking.current

    def path(self, *parts: str) -> Path:
        """A path below the run folder."""
        return self.workspace.path(*parts)
