"""The whole way on a small spoken corpus with a real local Ray and a real MLflow store."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import tiny_config
from typer.testing import CliRunner

from raytrain.cli.app import app
from raytrain.console import Console
from raytrain.data.assignment import INDEX_FORMAT, Assignment
from raytrain.data.augment import AugmentSettings
from raytrain.demo.run import ARTIFACTS
from raytrain.errors import ArtifactError, CheckpointError, ManifestError, ProfileError, RaytrainError, StorageError
from raytrain.model.canary import Canary
from raytrain.model.formats.transfer import initialize_from, pieces_of
from raytrain.run_folder.batches import make_loader
from raytrain.run_folder.documents import PROFILE_FORMAT
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.pipeline import STAGE_NAMES, run_pipeline
from raytrain.storage.artifacts import read_json
from raytrain.training.checkpoint import CheckpointFolder
from raytrain.training.conversion import Format, load_model, save_model

pytestmark = pytest.mark.usefixtures("local_ray")


def run(config, *names: str) -> list[str]:
    return run_pipeline(config, Console(quiet=True), names or STAGE_NAMES)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory, local_ray):
    """A configuration whose pipeline has run once."""
    config = tiny_config(corpus, tmp_path_factory.mktemp("runs"))
    assert run(config) == list(STAGE_NAMES)
    return config


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_every_artifact_is_there_and_says_what_it_should(finished, corpus):
    run_dir = finished.run_dir
    assert [name for name in ARTIFACTS if not (run_dir / name).exists()] == []
    statistics = read_json(run_dir / "statistics.json", "raytrain.statistics/4")["body"]
    manifest = lines(corpus / "train.jsonl")
    assert statistics["utterances"] == len(manifest) == 96
    assert statistics["hours"] == pytest.approx(sum(row["duration"] for row in manifest) / 3600, rel=1e-3)
    assert statistics["prompt_tokens_mean"] == 9
    assignment = Assignment(run_dir / "assignment")
    index = read_json(run_dir / "assignment" / "index.json", "raytrain.assignment/4")["body"]
    assert sum(assignment.rows_per_bucket) + sum(index["rejected"].values()) == 96
    paths = set()
    for bucket, (duration, tokens) in enumerate(index["grid"]):
        for number in range(assignment.rows_per_bucket[bucket]):
            row = assignment.row(bucket, number)
            assert row.duration_ms <= duration and len(row.tokens) <= tokens
            paths.add(row.audio_path)
    assert len(paths) == sum(assignment.rows_per_bucket)
    (profile,) = read_json(run_dir / "batch_profile.json", PROFILE_FORMAT)["body"]["profiles"]
    assert all(1 <= size <= 8 for size in profile["batch_sizes"])
    budget = 0.9 * 64 / 1024
    assert all(0 < peak <= budget for peak in profile["peak_gib"])
    metrics = lines(run_dir / "metrics.jsonl")
    assert [row["step"] for row in metrics if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {"lr", "audio_padding", "batch_size", "memory_gib"} <= set(metrics[0])
    hypotheses = lines(run_dir / "hypotheses.jsonl")
    assert [row["text"] for row in hypotheses] == [row["text"] for row in lines(corpus / "test.jsonl")]
    scores = read_json(run_dir / "scores.json", "raytrain.scores/2")["body"]
    assert scores["utterances"] == 10 and scores["wer"] >= 0
    assert scores["wer_ci"][0] <= scores["wer"] <= scores["wer_ci"][1] and "wer_normalized" not in scores
    assert sum(span["utterances"] for span in scores["by_duration"]) == 10
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["name"] == "tiny"


def test_mlflow_has_a_parent_and_a_child_for_each_stage(finished):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{finished.run_dir / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    children = {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert set(STAGE_NAMES) <= set(children)
    train = children["train"]
    assert train.info.status == "FINISHED"
    assert {
        "loss",
        "lr",
        "audio_padding",
        "batch_size",
        "audio_seconds_per_second",
        "memory_gib",
        "wer",
        "wer_by_second",
    } <= set(train.data.metrics)
    assert len(client.get_metric_history(train.info.run_id, "loss")) == 6
    assert {"test_wer", "test_cer"} <= set(children["evaluate"].data.metrics)
    assert "errors.html" in {artifact.path for artifact in client.list_artifacts(children["evaluate"].info.run_id)}
    parent = client.get_run(train.data.tags["mlflow.parentRunId"])
    assert parent.data.params["train.max_steps"] == "6"


def test_the_report_is_one_page_that_needs_nothing_else(finished):
    page = (finished.run_dir / "report.html").read_text()
    assert page.count("<svg") >= 8
    for text in (
        "Lengths and buckets",
        "Padding by scheme",
        "Batch profile",
        "WER by wall time",
        "Transcripts",
    ):
        assert text in page
    outside = [word for word in page.split() if word.startswith(("src=", 'href="http'))]
    assert outside == []
    assert 'href="errors.html"' in page
    errors = (finished.run_dir / "errors.html").read_text()
    first = lines(finished.run_dir / "hypotheses.jsonl")[0]
    assert first["audio_filepath"] in errors and "S: another word" in errors


def test_a_second_run_does_nothing_and_a_changed_setting_redoes_what_depends_on_it(finished, corpus):
    assert run(finished) == []
    root = finished.run_dir.parent
    changed = tiny_config(corpus, root, evaluate={"batch_size": 4, "max_generation_delta": 5})
    # Other batches give the same hypotheses, so the report stands.
    assert run(changed) == ["evaluate"]
    (finished.run_dir / "report.html").unlink()
    assert run(changed) == ["report"]
    normalized = tiny_config(corpus, root, evaluate={"max_generation_delta": 5, "normalizer": "whisper"})
    assert run(normalized) == ["evaluate", "report"]
    scores = read_json(finished.run_dir / "scores.json", "raytrain.scores/2")["body"]
    assert {"wer_normalized", "wer_normalized_ci"} <= set(scores) & set(scores["by_language"]["de"])


def test_training_goes_on_when_more_steps_are_asked_for(finished, corpus):
    config = tiny_config(corpus, finished.run_dir.parent, train={"max_steps": 8})
    assert run(config, "train") == ["train"]
    metrics = lines(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in metrics if "loss" in row] == list(range(1, 9))
    assert CheckpointFolder(config.run_dir / "checkpoints").newest().step == 8


def test_equal_runs_write_equal_bytes(finished, corpus, tmp_path):
    config = tiny_config(corpus, tmp_path)
    run(config, "statistics", "buckets", "assign")
    for name in ("histogram.parquet", "statistics.json", "bucket_plan.json", "assignment/index.json"):
        assert (config.run_dir / name).read_bytes() == (finished.run_dir / name).read_bytes(), name


def test_assignment_goes_on_where_it_was_stopped(corpus, tmp_path):
    config = tiny_config(corpus, tmp_path, data={"chunk_bytes": 2048})
    run(config, "statistics", "buckets", "assign")
    folder = config.run_dir / "assignment"
    whole = (folder / "index.json").read_bytes()
    notes = sorted((folder / "parts").iterdir())
    assert len(notes) > 3
    untouched = {note: note.stat().st_mtime_ns for note in notes[:-2]}
    for path in (*notes[-2:], folder / "index.json"):
        path.unlink()
    assert run(config, "assign") == ["assign"]
    assert (folder / "index.json").read_bytes() == whole
    assert {note: note.stat().st_mtime_ns for note in notes[:-2]} == untouched


def test_broken_audio_is_quarantined_and_training_goes_on(corpus, tmp_path):
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    names = [row["audio_filepath"] for row in lines(copy / "train.jsonl")]
    (copy / names[0]).unlink()
    (copy / names[1]).write_bytes(b"broken")
    (copy / lines(copy / "test.jsonl")[2]["audio_filepath"]).unlink()
    train = {"num_workers": 1, "max_steps": 24, "validate_every_steps": 24}
    data = {"max_bad_fraction": 0.2}
    config = tiny_config(copy, tmp_path, train=train, data=data, tracking={"enabled": False})
    run(config)
    assert read_json(config.run_dir / "assignment" / "index.json", INDEX_FORMAT)["body"]["rejected"] == {
        "missing_audio": 1
    }
    quarantined = {line["audio_path"] for line in lines(config.run_dir / "quarantine.jsonl")}
    assert quarantined == {str(copy / names[1])}
    assert sum(row.get("replaced", 0) for row in lines(config.run_dir / "metrics.jsonl")) >= 1
    scores = read_json(config.run_dir / "scores.json", "raytrain.scores/2")["body"]
    assert scores["utterances"] == 9 and scores["unreadable"] == 1
    assert lines(config.run_dir / "hypotheses.jsonl")[2]["hypothesis"] is None


def test_bad_rows_are_counted_up_to_the_limit_then_an_error(corpus, tmp_path):
    good = (corpus / "train.jsonl").read_text().splitlines()
    good = [
        json.dumps({**json.loads(line), "audio_filepath": str(corpus / json.loads(line)["audio_filepath"])})
        for line in good
    ]
    bad = [
        "{oops",
        json.dumps({**json.loads(good[0]), "duration": 0}),
        json.dumps({**json.loads(good[0]), "text": ""}),
    ]
    manifest = tmp_path / "mixed.jsonl"
    manifest.write_text("\n".join([*good[:5], *bad, *good[5:]]))
    sections = {"root": str(tmp_path), "train": ["mixed.jsonl"]}
    config = tiny_config(corpus, tmp_path, data={**sections, "max_bad_fraction": 0.05})
    run(config, "statistics", "buckets", "assign")
    statistics = read_json(config.run_dir / "statistics.json", "raytrain.statistics/4")["body"]
    assert statistics["rejected"] == {"bad_duration": 1, "bad_json": 1, "empty_text": 1}
    first = {example["reason"]: example["first"][0]["line"] for example in statistics["rejected_examples"]}
    assert first == {"bad_duration": 7, "bad_json": 6, "empty_text": 8}
    rejected = lines(config.run_dir / "assignment" / "rejected" / "part-00000.jsonl")
    assert {row["reason"] for row in rejected} >= {"bad_duration", "bad_json", "empty_text"}
    strict = tiny_config(corpus, tmp_path, data={**sections, "max_bad_fraction": 0.01})
    with pytest.raises(ManifestError, match=r"3 of 99 manifest rows are bad.*(?s:.)*mixed.jsonl:6: bad_json"):
        run(strict, "statistics")


def test_a_missing_manifest_and_a_missing_stage_are_named(corpus, tmp_path):
    with pytest.raises(ManifestError, match="corpus absent: can't read .*absent.jsonl"):
        run(tiny_config(corpus, tmp_path, data={"train": ["absent.jsonl"]}))
    with pytest.raises(ArtifactError, match="train needs the output of assign, oomptimize"):
        run(tiny_config(corpus, tmp_path), "train")


def test_a_profile_of_another_model_is_refused(finished, corpus):
    other = tiny_config(corpus, finished.run_dir.parent, model={"encoder_layers": 2})
    with pytest.raises(ProfileError, match="model .* instead of .*run oomptimize again"):
        Workspace(other, other.run_dir).profiles()


def test_a_bucket_where_nothing_fits_names_need_budget_and_remedy(finished, corpus, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "tiny")
    config = tiny_config(corpus, tmp_path, oomptimize={"device_memory": "1MiB"})
    with pytest.raises(
        ProfileError,
        match=r"bucket 0 \(≤ \d+ ms.*batch size 1 needs .* GiB of 0.00 GiB; to do: set train.activation_checkpointing",
    ):
        run(config, "oomptimize")


def test_a_dry_plan_for_a_gpu_that_is_not_there(finished):
    profile = finished.run_dir / "batch_profile.json"
    before = profile.stat().st_mtime_ns
    arguments = ["oomptimize", "-c", str(finished.run_dir / "config.yaml"), "--dry", "--device-memory"]
    sizes = []
    for memory in ("64MiB", "256MiB"):
        result = CliRunner().invoke(app, [*arguments, memory, "--json", "-s", "oomptimize.max_batch_size=4096"])
        assert result.exit_code == 0, result.stderr
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        budget = {"64MiB": 0.0625, "256MiB": 0.25}[memory] * 0.9
        for row in rows:
            assert row["predicted_gib"] <= budget + 0.001
            assert sum(row["mib_by_phase"].values()) == pytest.approx(sum(row["mib_by_module"].values()), abs=1)
        for small, large in itertools.permutations(rows, 2):
            if small["max_duration_ms"] <= large["max_duration_ms"] and small["max_tokens"] <= large["max_tokens"]:
                assert small["batch_size"] >= large["batch_size"]
        sizes.append([row["batch_size"] for row in rows])
    assert all(large > 3 * small for small, large in zip(*sizes, strict=True))
    result = CliRunner().invoke(app, [*arguments, "64MiB"], env={"COLUMNS": "100"})
    assert "batch size" in result.stdout and "activations" in result.stdout and "encoder." in result.stdout
    assert profile.stat().st_mtime_ns == before


def test_policies_side_by_side_and_the_schedule_write_nothing(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.run_dir.rglob("*")}
    arguments = ["-c", str(finished.run_dir / "config.yaml")]
    result = CliRunner().invoke(app, ["buckets", "--compare", *arguments], env={"COLUMNS": "120"})
    assert result.exit_code == 0 and "equal_mass" in result.stdout and "optimal" in result.stdout
    result = CliRunner().invoke(app, ["schedule", "--simulate", "--steps", "5", *arguments], env={"COLUMNS": "120"})
    assert result.exit_code == 0 and "train" in result.stdout and "100.0%" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.run_dir.rglob("*")} == before


def test_a_finite_schedule_loads_every_row_once_and_ends(finished):
    config = finished.model_copy(update={"train": replace(finished.train, max_epochs=1)})
    workspace = Workspace(config, config.run_dir)
    sizes = workspace.profiles()[0].batch_sizes
    seen, last = 0, []
    for rank in range(2):
        with make_loader(workspace, sizes, None, [rank], 2) as batches:
            for loaded in batches:
                seen += len(loaded.batch)
                last.append(loaded.is_last)
    rows = sum(Assignment(config.run_dir / "assignment").rows_per_bucket)
    assert rows - len(sizes) <= seen <= rows
    assert last.count(True) == 2 and last[-1]


def test_augmented_batches_stay_in_their_buckets_and_are_the_same_for_any_workers(finished):
    augment = AugmentSettings(speeds=(0.9, 1.1), gain_db=(-3.0, 3.0))
    config = finished.model_copy(update={"augment": augment, "train": replace(finished.train, max_epochs=1)})
    workspace = Workspace(config, config.run_dir)
    plain = Workspace(config.model_copy(update={"augment": AugmentSettings()}), config.run_dir)
    sizes, edges = workspace.profiles()[0].batch_sizes, Assignment(config.run_dir / "assignment").edges
    sums_by_run = []
    for source, workers in ((workspace, 1), (workspace, 2), (plain, 1)):
        sums = {}
        for rank in range(workers):
            with make_loader(source, sizes, None, [rank], workers) as batches:
                for loaded in batches:
                    lengths = loaded.batch.audio_lengths
                    assert lengths.max() <= edges[loaded.plan.bucket][0] * 16
                    start = loaded.plan.start + sum(loaded.plan.sizes[:rank])
                    for place, total in enumerate(loaded.batch.audio.abs().sum(1).tolist()):
                        sums[loaded.plan.bucket, start + place] = total
        sums_by_run.append(sums)
    both = sums_by_run[0].keys() & sums_by_run[1].keys()
    assert len(both) > 0.9 * len(sums_by_run[0])
    assert all(sums_by_run[0][key] == pytest.approx(sums_by_run[1][key], rel=1e-4) for key in both)
    assert sum(sums_by_run[0][key] != sums_by_run[2][key] for key in both) > 0.9 * len(both)


def test_a_schedule_is_described_and_simulated(finished):
    arguments = ["schedule", "-c", str(finished.run_dir / "config.yaml")]
    result = CliRunner().invoke(app, [*arguments, "--simulate", "--workers", "3", "--steps", "20", "--json"])
    assert result.exit_code == 0, result.stderr
    simulation = json.loads(result.stdout)
    assert simulation["steps"] == 20 and simulation["world_size"] == 3 and simulation["bucket_agreement"] == 1.0
    assert simulation["audio_share"] == [1.0] and simulation["corpora"][0]["repeats"] == 1.0
    assert 0 < simulation["audio_padding"] < 0.5 and simulation["slowest_rank"] >= 1
    shown = CliRunner().invoke(app, [*arguments, "--simulate", "--steps", "5"], env={"COLUMNS": "100"}).stdout
    assert "repeats per epoch" in shown and "workers in one bucket" in shown
    assert "simulated" not in CliRunner().invoke(app, arguments).stdout


def test_an_unwritable_run_folder_is_a_clear_error(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write .*not a directory.*run.root"):
        run(tiny_config(corpus, tmp_path / "file"))


def test_an_error_in_a_worker_reaches_the_user_readably(corpus, tmp_path):
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    config = tiny_config(copy, tmp_path, train={"max_failures": 0, "num_workers": 1}, tracking={"enabled": False})
    run(config, "statistics", "buckets", "assign", "oomptimize")
    shutil.rmtree(copy / "audio")
    with pytest.raises(
        RaytrainError, match="can replace the broken ones; got .*flac; because .*no such file;.* to do: check data.root"
    ):
        run(config, "train")


def test_training_starts_from_another_model_with_another_tokenizer(finished, corpus, tmp_path):
    source = load_model(finished.run_dir)
    save_model(source, tmp_path / "source.nemo", Format.nemo)
    # A step that changes nothing shows what training began with.
    train = {
        "init_from": str(tmp_path / "source.nemo"),
        "max_steps": 1,
        "learning_rate": 1e-12,
        "min_learning_rate": 0.0,
        "weight_decay": 0.0,
        "num_workers": 1,
        "validate_every_steps": 1,
    }
    twice = [{"name": "once", "path": "train.jsonl"}, {"name": "often", "path": "train.jsonl", "weight": 3.0}]
    changed = {
        "tokenizer": {"vocab_size": 28},
        "model": {"prompt_format": "canary"},
        "data": {"train": twice},
    }
    config = tiny_config(corpus, tmp_path, train=train, tracking={"enabled": False}, **changed)
    run(config, *STAGE_NAMES[: STAGE_NAMES.index("train") + 1])
    assert read_json(config.run_dir / "statistics.json", "raytrain.statistics/4")["body"]["prompt_tokens_mean"] == 5
    (line,) = [row for row in lines(config.run_dir / "metrics.jsonl") if "loss" in row]
    assert line["share_once"] + line["share_often"] == pytest.approx(1) and line["share_often"] > line["share_once"]
    model = load_model(config.run_dir)
    assert model.config.vocab_size < source.config.vocab_size
    for name in ("encoder.layers.0.feed_forward1.linear1.weight", "transf_decoder._decoder.final_layer_norm.bias"):
        torch.testing.assert_close(model.state[name], source.state[name], atol=1e-6, rtol=0)
    old, new = pieces_of(source.tokenizers), pieces_of(model.tokenizers)
    stayed = [piece for piece in new if piece in old]
    assert {"<|en|>", "<|de|>", "<|endoftext|>"} <= {piece for _, piece in stayed} and len(stayed) < len(old)
    for name in ("transf_decoder._embedding.token_embedding.weight", "log_softmax.mlp.layer0.bias"):
        rows = [model.state[name][new[piece]] for piece in stayed]
        wanted = [source.state[name][old[piece]] for piece in stayed]
        torch.testing.assert_close(torch.stack(rows), torch.stack(wanted), atol=1e-6, rtol=0)
    with pytest.raises(CheckpointError, match="decoder_width 32.*decoder_width 48"):
        initialize_from(Canary(replace(model.config, decoder_width=48)), model.tokenizers, source)
