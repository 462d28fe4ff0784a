"""What is sent with a job: the resolved configuration, raytrain's source if it is not installed on the cluster, and
environment variables. Data is never included, nor are secrets that were not named.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import raytrain
from raytrain.config import DATA_ROOT_VARIABLE, RUN_ROOT_VARIABLE, Config
from raytrain.errors import ConfigError
from raytrain.redaction import MLFLOW_VARIABLE, TRACKING_VARIABLE, is_secret, redacted
from raytrain.storage.locations import absolute
from raytrain.storage.run_files import CONFIG

# Locations; credentials must be set on the nodes or named with --env.
PASSED = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    DATA_ROOT_VARIABLE,
    RUN_ROOT_VARIABLE,
    MLFLOW_VARIABLE,
    "RAYTRAIN_CUDA_GRAPHS",
)
# Variables that a run may need but receives only if they are named.
_SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    TRACKING_VARIABLE,
)
_SOURCE = ("raytrain", "pipelines")


@dataclass(frozen=True)
class Variables:
    """Environment variables of a job; `secret` lists passed secrets, `kept` secrets that are not passed."""

    values: dict[str, str]
    secret: tuple[str, ...]
    kept: tuple[str, ...]


def variables(named: Sequence[str], environment: Mapping[str, str]) -> Variables:
    """The `PASSED` variables without secrets, and those `named`, given as NAME (with its local value) or NAME=VALUE.

    Raises `ConfigError` if a named variable has no value.
    """
    present = {name: environment[name] for name in PASSED if environment.get(name)}
    values = {name: value for name, value in present.items() if not is_secret(name, value)}
    for text in named:
        name, equals, value = text.partition("=")
        if not equals and name not in environment:
            raise ConfigError(
                f"--env {name} has no local value",
                allowed="a variable that is set, or NAME=VALUE",
                remedy=f"export {name} first, or write --env {name}=VALUE",
            )
        values[name] = value if equals else environment[name]
    # Paths are resolved as by the same command without `submit`.
    for name in (DATA_ROOT_VARIABLE, RUN_ROOT_VARIABLE):
        if name in values and name not in {text.partition("=")[0] for text in named}:
            values[name] = absolute(values[name])
    secrets = [name for name in _SECRETS if environment.get(name)]
    return Variables(
        values,
        secret=tuple(sorted(name for name, value in values.items() if is_secret(name, value))),
        kept=tuple(name for name in (*present, *secrets) if name not in values),
    )


def job_settings(config: Config, given: Mapping[str, str]) -> dict[str, Any]:
    """The settings with absolute paths, since a job has a different working directory, and without a cluster address,
    since it runs on the cluster."""
    values = config.model_dump(mode="json")
    values["cluster"]["address"] = None
    if config.run.root or RUN_ROOT_VARIABLE not in given:
        values["run"]["root"] = absolute(config.run.root or "runs")
    if config.data.root or DATA_ROOT_VARIABLE not in given:
        values["data"]["root"] = absolute(config.data.root or ".")
    for section, name in (("tokenizer", "path"), ("train", "init_from"), ("train", "storage_path")):
        if values[section][name]:
            values[section][name] = absolute(values[section][name])
    return redacted(values)


def pack(folder: Path, settings: Mapping[str, Any], with_source: bool) -> None:
    """Write the files of a job's working directory."""
    (folder / CONFIG).write_text(yaml.safe_dump(dict(settings), sort_keys=False))
    if with_source:
        for name in _SOURCE:
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(_source_root() / name, folder / name, ignore=ignored)


def is_checkout() -> bool:
    """Whether raytrain runs from a source checkout rather than as an installed package."""
    return (_source_root() / "pyproject.toml").exists() and all((_source_root() / name).is_dir() for name in _SOURCE)


def version() -> str:
    """raytrain's version; empty if it is not installed."""
    try:
        return metadata.version("raytrain")
    except metadata.PackageNotFoundError:
        return ""


def entrypoint(stages: Sequence[str], python: str, take_over: bool = False) -> str:
    """The job's shell command."""
    options = ["--take-over"] if take_over else []
    return shlex.join([python, "-m", "pipelines.run", "--config", CONFIG, *options, *stages])


def _source_root() -> Path:
    return Path(os.path.abspath(raytrain.__file__)).parents[1]
