"""`raytrain tune`: real training runs as trials of a real Ray Tune, on the small spoken corpus."""

import json

import pytest
import ray
import yaml
from conftest import tiny_config, tiny_values
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from raytrain.cli.app import app
from raytrain.cluster.running_trial import RunningTrial
from raytrain.config import check_config
from raytrain.errors import ArtifactError, ConfigError
from raytrain.experiments.tune import TUNE_FORMAT, nested
from raytrain.run_folder.trial_folder import with_settings
from raytrain.storage.artifacts import read_json
from raytrain.training.checkpoint import CheckpointFolder

TUNE = {
    "num_trials": 2,
    "max_steps": 4,
    "grace_steps": 2,
    "reduction_factor": 2,
    "space": {
        "train.learning_rate": {"log_uniform": [1e-5, 1e-2]},
        "model.spec_augment.time_masks": {"choice": [0, 2]},
    },
}
TRAIN = {"num_workers": 1, "validate_every_steps": 2, "log_every_steps": 2, "stop_at_wer": None}


@pytest.mark.timeout(600)
def test_a_search_trains_what_it_draws_and_keeps_the_best(copy_of, tmp_path):
    config = copy_of("tune", tune=TUNE, train=TRAIN, tracking={"enabled": True})
    values = config.model_dump(mode="json")
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(app, ["tune", "--config", str(path), "--json"])
    assert result.exit_code == 0, result.output
    trials = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
    assert len(trials) == 2 and [one["why"] for one in trials] == [None] * 2
    assert trials == read_json(config.run_dir / "tune.json", TUNE_FORMAT)["body"]
    errors = [one["error"] for one in trials]
    assert errors == sorted(errors)
    assert max(one["steps"] for one in trials) == 4
    assert len({one["settings"]["train.learning_rate"] for one in trials}) == 2
    assert yaml.safe_load((config.run_dir / "tune_best.yaml").read_text()) == nested(trials[0]["settings"])

    client = MlflowClient(f"sqlite:///{config.run_dir / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("raytrain").experiment_id])
    (search,) = (one for one in runs if one.info.run_name == "tune")
    children = [one for one in runs if one.data.tags.get("mlflow.parentRunId") == search.info.run_id]
    assert len(children) == 2
    assert sorted(float(one.data.params["train.learning_rate"]) for one in children) == pytest.approx(
        sorted(one["settings"]["train.learning_rate"] for one in trials)
    )
    assert all("loss" in one.data.metrics and "wer" in one.data.metrics for one in children)
    assert {one.info.status for one in children} == {
        "KILLED" if trial["stopped_early"] else "FINISHED" for trial in trials
    }

    # A trial that ASHA ends in mid-training stops there, and leaves room for the next.
    base = check_config({**values, "train": {**values["train"], "max_steps": 100_000}})
    job = {
        "config": base.model_dump(mode="json"),
        "run_dir": str(config.run_dir),
        "trials_dir": str(tmp_path),
        "tracking_uri": f"sqlite:///{config.run_dir / 'mlflow.db'}",
        "parent_run_id": search.info.run_id,
        "label": "ended",
    }
    trial = RunningTrial({"job": job, "settings": {"train.learning_rate": 1e-4}})
    first, second = trial.next(), trial.next()
    assert (first["step"], second["step"]) == (2, 4) and not second["done"]
    trial.end()
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} <= {"REMOVED"}
    last = json.loads((trial.folder / "metrics.jsonl").read_bytes().splitlines()[-1])["step"]
    assert 4 <= last < 100_000
    (ended,) = client.search_runs(runs[0].info.experiment_id.split(), "attributes.run_name = 'ended'")
    assert ended.info.status == "KILLED"
    # It would resume from there.
    assert CheckpointFolder(trial.folder / "checkpoints").newest().step == last


def test_what_cannot_be_searched_is_named(corpus, tmp_path):
    config = tiny_config(corpus, tmp_path)
    with pytest.raises(ArtifactError, match="tuning needs tokenizer.*oomptimize"):
        CliRunner().invoke(app, ["tune", "--config", _written(tmp_path, corpus)], catch_exceptions=False)
    with pytest.raises(ConfigError, match="can't search model.encoder_layers.*allowed"):
        with_settings(config, {"model.encoder_layers": 3})
    with pytest.raises(ConfigError, match="unknown key; did you mean learning_rate"):
        with_settings(config, {"train.learning_rat": 3})
    with pytest.raises(ConfigError, match="one of choice, uniform, log_uniform, got none"):
        tiny_config(corpus, tmp_path, tune={"space": {"train.learning_rate": {}}})
    with pytest.raises(ConfigError, match="log_uniform must be above 0"):
        tiny_config(corpus, tmp_path, tune={"space": {"train.learning_rate": {"log_uniform": [0, 1]}}})


def _written(tmp_path, corpus) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_values(corpus, tmp_path)))
    return str(path)
