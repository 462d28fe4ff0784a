"""Batching schemes: what they promise by prediction, and real trainings of them on the small spoken corpus."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml
from conftest import tiny_values
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from raytrain.cli.app import app
from raytrain.config import check_config, load_config
from raytrain.errors import ConfigError
from raytrain.experiments.ablate import ABLATION_FORMAT, PREDICTED_FORMAT
from raytrain.experiments.outcomes import best_trials, read_outcome
from raytrain.experiments.prediction import SchemeSimulator, fit_limits, trace_surface
from raytrain.lengths import BucketSettings, LengthHistogram, make_plan
from raytrain.lengths.schemes import (
    SCHEMES,
    Hardware,
    gpu_plans,
    largest_batch_seconds,
    scheme_settings,
    simulate_scheme,
    sizes_by_memory,
    sizes_by_seconds,
)
from raytrain.model.config import ModelConfig
from raytrain.model.cost import cost_of
from raytrain.model.formats.published import PUBLISHED
from raytrain.report.ablation_results import TrialResult
from raytrain.storage.artifacts import read_json
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.settings import TrainSettings

MODEL = ModelConfig(
    encoder_layers=2,
    encoder_width=64,
    encoder_heads=4,
    subsampling_channels=16,
    decoder_layers=2,
    decoder_width=64,
    decoder_heads=4,
    max_positions=300,
    vocab_size=200,
)


def long_tailed(number: int = 20_000) -> LengthHistogram:
    rng = np.random.default_rng(1)
    seconds = np.clip(rng.lognormal(1.6, 0.8, number), 0.5, 40)
    rate = np.clip(rng.normal(3.5, 0.8, number), 0.5, None) * np.where(rng.random(number) < 0.01, 4, 1)
    return LengthHistogram.from_lengths((seconds * 1000).astype(int), (seconds * rate).astype(int) + 9)


def linear_memory(size, duration_ms, tokens):
    return 1e6 + size * (duration_ms + 20.0 * tokens)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_shapes_are_those_of_the_configurations(name):
    assert PUBLISHED[name] == load_config(f"configs/{name}.yaml").model


def test_each_scheme_pads_less_or_fills_more_than_the_one_before():
    histogram, base = long_tailed(), fit_limits(BucketSettings(12, 2, max_tokens=10_000), MODEL)
    train, budget = TrainSettings(num_workers=2), 1 << 30
    surface = trace_surface(histogram, base, MODEL, train, precision="fp32", device_type="cpu", budget=budget)
    simulator = SchemeSimulator(histogram, base, MODEL, surface, budget)
    rows = {scheme: simulator.simulate(simulator.plan(scheme, batch_seconds=60.0)) for scheme in SCHEMES}
    assert rows["R"].compute_padding > 0.5 > 0.15 > rows["D+"].compute_padding
    assert rows["D"].token_padding < rows["C"].token_padding
    assert rows["D+"].compute_padding <= rows["D"].compute_padding
    assert rows["A"].rejected < rows["B"].rejected == rows["C"].rejected
    assert rows["C"].mean_batch > 2 * rows["B"].mean_batch
    assert rows["D"].mean_batch >= rows["C"].mean_batch
    for row in rows.values():
        assert 0 < row.memory_mean <= row.memory_worst <= 1
        assert max(row.memory_trace) <= row.memory_worst + 1e-4
    # The surface predicts what a trace of the step gives.
    tracer = StepTracer(MODEL, train, precision="fp32", world_size=2, device_type="cpu")
    for size, duration, tokens in ((20, 3000, 20), (9, 17000, 90), (4, 38000, 290)):
        traced = tracer.trace(size, duration, tokens).peak_bytes
        fitted = float(surface(np.array([size]), np.array([duration]), np.array([tokens]))[0])
        assert fitted == pytest.approx(traced, rel=0.05)


@settings(max_examples=25, deadline=None)
@given(st.integers(2_000_000, 400_000_000), st.sampled_from(SCHEMES))
def test_no_batch_of_a_plan_exceeds_the_budget(budget, scheme):
    histogram = long_tailed(2000)
    plan = make_plan(histogram, scheme_settings(scheme, BucketSettings(8, 2, max_tokens=10_000)), "")
    edges = np.array([(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets])
    by_memory = np.array(sizes_by_memory(plan, linear_memory, budget))
    taken = linear_memory(by_memory, edges[:, 0], edges[:, 1])
    more = linear_memory(by_memory + 1, edges[:, 0], edges[:, 1])
    assert ((taken <= budget) | (by_memory == 1)).all() and ((more > budget) | (by_memory == 4096)).all()
    seconds = largest_batch_seconds(histogram, plan, linear_memory, budget)
    sizes = np.array(sizes_by_seconds(histogram, plan, seconds))
    assert ((linear_memory(sizes, edges[:, 0], edges[:, 1]) <= budget) | (sizes == 1)).all()
    assert (np.minimum(sizes, 4096) <= by_memory).all()


def test_seconds_of_audio_make_the_published_batches():
    # 360 s of d + d²/15 give about 76 utterances of 3.8 s, 11.8 of 15.2 s and 2.5 of 40 s (arXiv 2503.05931).
    for duration, size in ((3800, 75), (15200, 11), (40000, 2)):
        one = LengthHistogram.from_lengths(np.full(5, duration), np.full(5, 30))
        plan = make_plan(one, BucketSettings(1, 1), "")
        assert sizes_by_seconds(one, plan, 360.0) == (size,)


def test_padding_is_counted_as_it_is():
    # Two kinds of utterance in random pairs: half of the pairs are mixed.
    both = LengthHistogram.from_lengths(np.array([1000, 3000]), np.array([10, 10]))
    plan = make_plan(both, scheme_settings("R", BucketSettings()), "")
    row = simulate_scheme("R", both, plan, (2,), cost_of(MODEL), linear_memory, 1e9, steps=20_000)
    assert row.audio_padding == pytest.approx(1 - 4000 / (0.25 * 2000 + 0.75 * 6000), abs=0.01)
    assert row.token_padding == 0 and row.mean_batch == 2 and row.steps_per_epoch == 1
    assert row.audio_seconds == pytest.approx(4.0, rel=0.01)


def test_gpus_and_hours_are_the_arithmetic_that_is_told():
    histogram, base = long_tailed(3000), BucketSettings(6, 2, max_tokens=10_000)
    rows = []
    for scheme, size in (("A", 10), ("D", 50)):
        plan = make_plan(histogram, scheme_settings(scheme, base), "")
        sizes = (size,) * len(plan.grid.buckets)
        rows.append(simulate_scheme(scheme, histogram, plan, sizes, cost_of(MODEL), linear_memory, 1e12))
    hardware = Hardware("any", 80, 1e12, 0.5, 0.1)
    a, d = gpu_plans(rows, hardware, gpus=128, steps=36_000)
    assert a.step_seconds == pytest.approx(0.1 + rows[0].flops / 0.5e12)
    assert (a.throughput, a.gpus_same_batch, a.gpus_same_hours) == (1, 128, 128)
    assert d.gpus_same_batch == 26  # 128 · 10 / 50, rounded up
    assert d.throughput == pytest.approx(5 * a.step_seconds / d.step_seconds)
    assert d.hours_same_gpus == pytest.approx(10 * a.step_seconds / d.throughput)
    assert d.gpu_hours == pytest.approx(128 * d.hours_same_gpus)


def test_the_first_at_the_target_is_a_schemes_best():
    def trial(scheme, seconds, wer):
        outcome = replace(read_outcome(None, 0.2), seconds_to_target=seconds, best_wer=wer)
        return TrialResult(scheme, "", 1e-3, None, **vars(outcome))

    trials = [trial("R", None, 0.4), trial("R", 90.0, 0.19), trial("R", 60.0, 0.2), trial("D", None, 0.5)]
    trials += [trial("D", None, 0.3), trial("D", None, None)]
    assert best_trials(trials) == {"R": 2, "D": 4}


def write(values: dict, folder) -> str:
    path = folder / "ablate.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_predicting_needs_manifests_alone(corpus, tmp_path, local_ray):
    path = write(tiny_values(corpus, tmp_path, buckets={"max_duration_ms": 8000, "max_tokens": 64}), tmp_path)
    command = ["ablate", "--predict", "--json", "--model", "own", "--config", path]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    printed = json.loads(next(line for line in result.output.splitlines() if line.startswith("{")))
    assert printed == read_json(tmp_path / "tiny" / "ablation_predicted.json", PREDICTED_FORMAT)["body"]
    assert list(printed["models"]) == ["own"] and printed["utterances"] == 96
    for model in printed["models"].values():
        assert [row["scheme"] for row in model["schemes"]] == list(SCHEMES)
        assert len(model["gpu_plans"]) == len(SCHEMES) and 0 <= model["memory_fit_error"] < 0.1
    unknown = CliRunner().invoke(app, ["ablate", "--predict", "--model", "canary-9b", "--config", path])
    assert isinstance(unknown.exception, ConfigError) and "canary-1b-flash" in str(unknown.exception)
    unknown = CliRunner().invoke(app, ["ablate", "--predict", "--gpu", "abacus", "--config", path])
    assert isinstance(unknown.exception, ConfigError)


@pytest.mark.timeout(600)
def test_schemes_are_trained_and_compared_and_a_second_call_trains_nothing(corpus, tmp_path, local_ray):
    ablate = {
        "schemes": ["A", "D+"],
        "learning_rates": [1e-3],
        "max_steps": 4,
        "validate_every_steps": 2,
        "device_memory": "24MiB",
        "max_batch_size": 32,
        "target_wer": 5.0,
    }
    values = tiny_values(corpus, tmp_path, ablate=ablate, train={"log_every_steps": 2, "num_workers": 1})
    path, run_dir = write(values, tmp_path), tmp_path / "tiny"
    result = CliRunner().invoke(app, ["ablate", "--json", "--config", path])
    assert result.exit_code == 0, (result.output, result.exception)
    printed = json.loads(next(line for line in result.output.splitlines() if line.startswith("{")))
    assert printed == read_json(run_dir / "ablation.json", ABLATION_FORMAT)["body"]
    assert [(one["scheme"], one["learning_rate"]) for one in printed["trials"]] == [("A", 1e-3), ("D+", 1e-3)]
    assert [one["why"] for one in printed["trials"]] == [None, None]
    assert all([point["step"] for point in one["curve"]] == [2, 4] for one in printed["trials"])
    assert list(printed["best"]) == ["A", "D+"]
    by_name = {row["scheme"]: row for row in printed["schemes"]}
    assert by_name["A"]["mean_batch"] < by_name["D+"]["mean_batch"]
    # Trained batches are the planned ones: no bucket exceeds its size.
    for scheme, folder in (("A", "A"), ("D+", "D-plus")):
        sized = json.loads((run_dir / "ablate" / folder / "batch_profile_sized.json").read_bytes())
        assert sized["body"]["profiles"][0]["batch_sizes"] == list(by_name[scheme]["batch_sizes"])

    client = MlflowClient(f"sqlite:///{run_dir / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("raytrain").experiment_id])
    (parent,) = (one for one in runs if one.info.run_name == "ablate")
    children = [one for one in runs if one.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(one.info.run_name for one in children) == sorted(one["label"] for one in printed["trials"])
    assert all("wer" in one.data.metrics and one.info.status == "FINISHED" for one in children)

    stamps = {path: path.stat().st_mtime_ns for path in run_dir.glob("ablate/trials/*/metrics.jsonl")}
    again = CliRunner().invoke(app, ["ablate", "--config", path])
    assert again.exit_code == 0, (again.output, again.exception)
    assert len(stamps) == 2
    assert {path: path.stat().st_mtime_ns for path in run_dir.glob("ablate/trials/*/metrics.jsonl")} == stamps
    page = (run_dir / "report.html").read_text()
    for text in ("A random batch", "Memory over steps", "Schemes side by side", "Validation WER by wall time"):
        assert text in page


@pytest.mark.timeout(600)
def test_decoder_depths_are_counted_trained_and_timed(corpus, tmp_path, local_ray):
    ablate = {"max_steps": 2, "validate_every_steps": 2}
    path = write(tiny_values(corpus, tmp_path, ablate=ablate, train={"num_workers": 1}), tmp_path)
    printed = {}
    for depths, more in (("2,1", ["--predict"]), ("1", [])):
        command = ["ablate", "--decoder-depths", depths, "--json", "--config", path, *more]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (result.output, result.exception)
        printed[depths] = json.loads(next(line for line in result.output.splitlines() if line.startswith("{")))["rows"]
    (deep, shallow), (trained,) = printed["2,1"], printed["1"]
    assert [(row["encoder_layers"], row["decoder_layers"]) for row in (deep, shallow)] == [(1, 2), (1, 1)]
    assert deep["parameters"] > shallow["parameters"] == trained["parameters"]
    assert deep["training_compute"] == 1 > shallow["training_compute"]
    assert trained["why"] is None and trained["steps"] == 2 and trained["best_wer"] is not None
    assert trained["rtfx"]["rtfx_batch_1"] > 0 and 0 < trained["rtfx"]["decoder_share_batch_8"] < 1
    predicted = CliRunner().invoke(
        app,
        [
            "ablate",
            "--predict",
            "--decoder-depths",
            "24,4",
            "--encoder-depths",
            "24,32",
            "--model",
            "canary-1b",
            "--json",
            "--config",
            path,
        ],
    )
    rows = json.loads(next(line for line in predicted.output.splitlines() if line.startswith("{")))["rows"]
    assert [round(row["parameters"] / 1e6, 1) for row in rows] == [1016.7, 882.4]
    uneven = ["ablate", "--decoder-depths", "4,2,1", "--encoder-depths", "4,2", "--config", path]
    wrong = CliRunner().invoke(app, uneven)
    assert isinstance(wrong.exception, ConfigError) and "one each" in str(wrong.exception)


def test_what_an_ablation_needs_is_said(corpus, tmp_path):
    with pytest.raises(ConfigError, match="must be distinct values of R, A, B, C, D, D\\+, got R, E"):
        check_config(tiny_values(corpus, tmp_path, ablate={"schemes": ["R", "E"]}))
    values = tiny_values(corpus, tmp_path)
    values["data"]["dev"] = []
    printed = CliRunner().invoke(app, ["ablate", "--config", write(values, tmp_path)])
    assert isinstance(printed.exception, ConfigError) and "needs data.dev" in str(printed.exception)
    assert asdict(PUBLISHED["canary-1b"])["decoder_layers"] == 24
