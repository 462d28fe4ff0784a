"""Unchanged inputs ⇔ nothing reruns: for each input and setting exactly the stages that depend on it."""

import dataclasses
import io
import itertools
import json
import os
import shutil
import tarfile
import types
import typing
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import copied, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import keys_of, pipeline_in_process
from pydantic import BaseModel

from raytrain.cluster.running_trial import training_inputs
from raytrain.config import Config, check_config
from raytrain.data.assignment import Assignment
from raytrain.data.corpora.types import Corpus
from raytrain.run_folder.lineage import training_meta
from raytrain.run_folder.workspace import Workspace
from raytrain.training.conversion import model_stamp

LEARNED = ["train", "evaluate", "report"]
IN_PLACE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def run():
    with pipeline_in_process() as run:
        yield run


@pytest.fixture(scope="module")
def base(run, corpus, tmp_path_factory) -> Config:
    """A finished run with a given tokenizer, on its own corpus."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(corpus, folder / "corpus")
    first = tiny_config(corpus, folder / "first", tracking={"enabled": False})
    run(first)
    (folder / "init.nemo").write_bytes(os.urandom(1 << 20))
    config = tiny_config(
        folder / "corpus",
        folder / "runs",
        tracking={"enabled": False},
        tokenizer={"path": str(first.run_dir / "tokenizer")},
        train={"ctc_weight": 0.5, "device": "cpu", "init_from": str(folder / "init.nemo")},
        evaluate={"beam_size": 2},
    )
    assert run(config) == ["statistics", "buckets", "assign", "oomptimize", *LEARNED]
    return config


@pytest.fixture
def changed(base):
    """`changed(name)`: a manifest of the base run, which is as it was after the test."""
    kept = {path: path.read_bytes() for path in Path(base.data.root).glob("*.jsonl")}
    yield lambda name: Path(base.data.root) / name
    for path, data in kept.items():
        if path.read_bytes() != data:
            path.write_bytes(data)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def reverse_words(rows: list[dict]) -> None:
    for row in rows:
        row["text"] = " ".join(reversed(row["text"].split()))


def rotate_recordings(rows: list[dict]) -> None:
    paths = [row["audio_filepath"] for row in rows[:10]]
    for row, path in zip(rows[:10], paths[1:] + paths[:1], strict=True):
        row["audio_filepath"] = path


def shorten_by_a_millisecond(rows: list[dict]) -> None:
    for row in rows:
        row["duration"] = round(row["duration"] - 0.001, 3)


def swap_two_rows(rows: list[dict]) -> None:
    rows[3], rows[50] = rows[50], rows[3]


def leave_out_a_row_twice(rows: list[dict]) -> None:
    rows += [{**rows[0], "_skipme": True}] * 2


@pytest.mark.parametrize(
    "manifest, edit, expected",
    [
        ("train.jsonl", None, []),
        ("train.jsonl", reverse_words, ["statistics", "assign", *LEARNED]),
        ("train.jsonl", rotate_recordings, ["statistics", "assign", *LEARNED]),
        ("train.jsonl", swap_two_rows, ["statistics", "assign", *LEARNED]),
        ("train.jsonl", leave_out_a_row_twice, ["statistics", "assign", "report"]),
        ("dev.jsonl", reverse_words, ["train"]),  # it resumes, and ends with the same weights
        ("test.jsonl", reverse_words, ["evaluate", "report"]),
        ("test.jsonl", rotate_recordings, ["evaluate", "report"]),
    ],
)
def test_an_edited_manifest_reruns_what_depends_on_it(base, run, changed, tmp_path, manifest, edit, expected):
    config, path = copied(base, tmp_path), changed(manifest)
    os.utime(path)  # a time is no content
    assert run(config) == []
    if edit is not None:
        rows = rows_of(path)
        edit(rows)
        write_rows(path, rows)
    assert run(config) == expected
    assert run(config) == []


def test_checkpoints_name_what_they_are_validated_on(base, changed):
    def named(**train) -> str:
        config = check_config({**base.model_dump(mode="json"), "train": {**dataclasses.asdict(base.train), **train}})
        return training_meta(Workspace(config, base.run_dir))["ids"]["validation"]

    first = named()
    assert named(max_steps=10**6) == first != named(max_validation_utterances=3)
    rows = rows_of(changed("dev.jsonl"))
    reverse_words(rows)
    write_rows(changed("dev.jsonl"), rows)
    assert named() != first


def test_a_millisecond_is_noticed(base, run, changed, tmp_path):
    config, path = copied(base, tmp_path), changed("train.jsonl")
    rows = rows_of(path)
    shorten_by_a_millisecond(rows)
    write_rows(path, rows)
    assert {"statistics", "assign", *LEARNED} <= set(run(config))


@pytest.mark.parametrize("materialize", [False, True])
def test_a_tar_counts_by_its_audio_where_members_lie_where_they_lay(base, run, tmp_path, materialize):
    samples = np.random.default_rng(0).integers(-9999, 9999, (24, 8000), np.int16)
    given = rows_of(Path(base.data.root) / "train.jsonl")[:24]
    rows = [{**row, "audio_filepath": f"{number}.wav", "duration": 1.0} for number, row in enumerate(given)]
    write_rows(tmp_path / "rows_0.json", rows)

    def write_tar(samples: np.ndarray) -> None:
        with tarfile.open(tmp_path / "audio_0.tar", "w") as tar:
            for number, sound in enumerate(samples):
                file = io.BytesIO()
                soundfile.write(file, sound, 8000, format="WAV")
                member = tarfile.TarInfo(f"{number}.wav")
                member.size = file.tell()
                file.seek(0)
                tar.addfile(member, file)

    tarred = {"name": "tarred", "path": str(tmp_path / "rows_0.json"), "audio": str(tmp_path / "audio_0.tar")}
    write_tar(samples)
    data = {**base.model_dump(mode="json")["data"], "train": [tarred]}
    config = copied(base, tmp_path / "runs", data=data, assign={"materialize": materialize})
    run(config)
    os.utime(tmp_path / "audio_0.tar")
    assert run(config) == ["statistics", "assign"]  # a time is no content
    write_tar(samples[::-1])
    assert run(config) == ["statistics", "assign", *LEARNED]
    assert run(config) == []


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["text", "audio_filepath", "duration", "order", "blank", "repeat", "key"]),
        st.integers(0, 95),
        st.integers(0, 95),
    ),
    min_size=1,
    max_size=3,
)


@given(EDITS)
@IN_PLACE
def test_training_reruns_where_and_only_where_assigned_rows_changed(base, run, changed, tmp_path_factory, edits):
    # A text may move to a row of the other language, whose model can't write it.
    section = {"max_unknown_fraction": 1.0}
    config, path = copied(base, tmp_path_factory.mktemp("edited"), tokenizer=section), changed("train.jsonl")
    kept, rows, before = path.read_bytes(), rows_of(path), assigned(config)
    for kind, first, second in edits:
        if kind == "order":
            rows[first], rows[second] = rows[second], rows[first]
        elif kind == "blank":
            rows[first] = {**rows[first], "_skipme": True}
        elif kind == "repeat":
            rows.append(rows[first])
        elif kind == "key":
            rows[first] = {**rows[first], "speaker": second}
        else:
            rows[first] = {**rows[first], kind: rows[second][kind]}
    try:
        write_rows(path, rows)
        ran = run(config)
    finally:
        path.write_bytes(kept)
    assert ("train" in ran) == (assigned(config) != before)


def assigned(config: Config) -> list:
    assignment = Assignment(config.run_dir / "assignment")
    return [assignment.rows(bucket, range(rows)) for bucket, rows in enumerate(assignment.rows_per_bucket)]


def test_how_the_corpus_is_cut_counts_only_where_assign_runs_for_another_reason(base, run, tmp_path):
    assert run(copied(base, tmp_path, data={"chunk_bytes": 2048})) == []


@given(st.integers(0, (1 << 20) - 1))
@IN_PLACE
def test_every_byte_of_a_model_counts(base, tmp_path_factory, place):
    path = tmp_path_factory.mktemp("model") / "a.nemo"
    data = bytearray(Path(base.train.init_from).read_bytes())
    path.write_bytes(data)
    before = model_stamp(path)
    data[place] ^= 1
    path.write_bytes(data)
    assert model_stamp(path) != before


def test_a_model_counts_wherever_it_lies(base, run, tmp_path):
    moved = tmp_path / "moved.nemo"
    shutil.copy(base.train.init_from, moved)
    changes = changes_of(base, with_value(base, "train.init_from", str(moved)))
    assert changes == {"train"}  # it resumes
    moved.write_bytes(b"another")
    assert changes_of(base, with_value(base, "train.init_from", str(moved))) == {"train", "anew"}


def test_trials_are_of_the_rows_validation_and_batches_that_they_trained_on(base, run, changed, tmp_path):
    config = copied(base, tmp_path)
    inputs = [training_inputs(config, config.run_dir)]
    assert training_inputs(config, config.run_dir) == inputs[0]
    for manifest in ("train.jsonl", "dev.jsonl"):
        rows = rows_of(changed(manifest))
        reverse_words(rows)
        write_rows(changed(manifest), rows)
        run(config)
        inputs.append(training_inputs(config, config.run_dir))
    (config.run_dir / "batch_profile.json").write_text("other batches")
    inputs.append(training_inputs(config, config.run_dir))
    assert all(before != after for before, after in itertools.pairwise(inputs))


# Stages whose key a setting changes, and values that change it. Stages after these run where what they read differs
# then. `anew`: training does not resume from its checkpoints.
SETTINGS = [
    (
        "",
        {
            "name": "other",
            "run.root": "elsewhere",
            "run.cache_size": "1GiB",
            "data.chunk_bytes": 2048,
            "data.workers": "ray",
            "model.vocab_size": 64,
            "model.ctc_head": True,  # both follow from other settings
            "tune.num_trials": 2,
            "tune.max_steps": 5,
            "tune.grace_steps": 1,
            "tune.reduction_factor": 2,
            "tune.max_concurrent": 1,
            "tune.space": {"train.clip_norm": {"choice": [1, 2]}},
            "ablate.schemes": ["R"],
            "ablate.learning_rates": [0.1],
            "ablate.target_wer": 0.1,
            "ablate.stop_at_wer": 0.1,
            "ablate.max_minutes": 1,
            "ablate.max_steps": 1,
            "ablate.validate_every_steps": 1,
            "ablate.device_memory": "1GiB",
            "ablate.max_batch_size": 1,
            "tracking.enabled": True,
            "tracking.uri": "http://127.0.0.1:5000",
            "tracking.experiment": "other",
            "cluster.address": "10.0.0.1:6379",
            "cluster.num_cpus": 1,
            "cluster.train_labels": {"role": "train"},
            "cluster.data_labels": {"role": "data"},
            "cluster.train_resources": {"gpu_host": 1},
            "cluster.data_resources": {"cpu_host": 1},
            "cluster.accelerator_type": "H100",
        },
    ),
    (
        "statistics",
        {
            "data.max_bad_fraction": 0.5,
            "tokenizer.path": None,
            "tokenizer.vocab_size": 33,
            "tokenizer.model_type": "unigram",
            "tokenizer.max_sentences": 7,
            "tokenizer.by_words": False,
            "tokenizer.max_unknown_fraction": 0.5,
        },
    ),
    (
        "statistics assign",
        {
            "data.train.path": "t*ain.jsonl",
            "data.train.format": "nemo",
            "data.train.audio": "audio",
            "data.train.language": "fr",
            "data.train.target_language": "fr",
            "data.audio_sample": 0,
        },
    ),
    ("statistics assign train anew", {"data.train.name": "renamed", "data.train": ["train.jsonl", "dev.jsonl"]}),
    ("statistics assign train evaluate", {"data.root": "linked", "data.default_language": "fr"}),
    (
        "train",
        {
            "data.dev": ["test.jsonl"],
            "train.init_from": "copied.nemo",
            "train.max_steps": 7,
            "train.max_epochs": 2,
            "train.max_minutes": 1.0,
            "train.stop_at_wer": 0.1,
            "train.max_skipped_steps": 2,
            "train.validate_every_steps": 2,
            "train.max_validation_utterances": 3,
            "train.checkpoint_every_steps": 2,
            "train.keep_checkpoints": 3,
            "train.keep_best": 2,
            "train.storage_path": "elsewhere",
            "train.patience": 2,
            "train.log_every_steps": 2,
            "train.num_loader_threads": 1,
            "train.prefetch_batches": 1,
            "train.max_failures": 1,
            "train.stall_minutes": 1.0,
        },
    ),
    (
        "train anew",
        {
            "data.train.weight": 2.0,
            "data.temperature": 2.0,
            "data.temperature_by": "language",
            "augment.speeds": [0.9, 1.0],
            "augment.gain_db": [-1.0, 1.0],
            "augment.noise": ["noise/*.flac"],
            "augment.noise_probability": 0.1,
            "augment.noise_snr_db": [1.0, 2.0],
            "augment.impulse_responses": ["rooms/*.wav"],
            "augment.reverb_probability": 0.1,
            "model.spec_augment.freq_masks": 1,
            "model.spec_augment.freq_width": 9,
            "model.spec_augment.time_masks": 1,
            "model.spec_augment.time_width": 0.1,
            "train.learning_rate": 0.1,
            "train.min_learning_rate": 1e-4,
            "train.warmup_steps": 1,
            "train.schedule": "cosine",
            "train.beta1": 0.8,
            "train.beta2": 0.8,
            "train.weight_decay": 0.1,
            "train.clip_norm": 2.0,
            "train.mask_prompt": True,
            "train.ctc_weight": 0.3,
        },
    ),
    ("train report anew", {"data.stream": {}}),  # which skips assign
    ("train anew", {"data.stream.buffer_size": 100, "data.stream.concurrent": True}),
    ("buckets train anew", {"seed": 2}),
    (
        "buckets",
        {
            "buckets.num_duration_buckets": 3,
            "buckets.num_token_buckets": 1,
            "buckets.policy": "optimal",
            "buckets.num_cells": 3,
            "buckets.min_duration_ms": 50,
            "buckets.max_duration_ms": 9000,
            "buckets.max_tokens": 63,
            "buckets.tps_sigma": None,
            "buckets.max_tps": 50.0,
        },
    ),
    ("assign", {"assign.materialize": True}),
    (
        "oomptimize",
        {
            "oomptimize.device_memory": "32MiB",
            "oomptimize.memory_fraction": 0.5,
            "oomptimize.max_batch_size": 4,
            "oomptimize.tolerance": 0.1,
            "oomptimize.objective": "throughput",
            "oomptimize.time_smaller_batches": False,
            "oomptimize.steps_per_probe": 2,
            "oomptimize.soak_steps": 2,
        },
    ),
    (
        "oomptimize train",
        {
            "train.activation_checkpointing": "full",
            "train.compile": "always",
            "train.shard": True,
            "train.num_workers": 1,
            "train.accumulate": 2,
            "train.device": "auto",
            "train.reduce_in": "bf16",
        },
    ),
    (
        "oomptimize train anew",
        {
            "model.encoder_layers": 2,
            "model.encoder_width": 64,
            "model.encoder_heads": 4,
            "model.encoder_ff_factor": 2,
            "model.subsampling_channels": 16,
            "model.conv_kernel": 5,
            "model.decoder_layers": 2,
            "model.decoder_width": 64,
            "model.decoder_heads": 4,
            "model.decoder_ff_factor": 2,
            "model.max_positions": 97,
            "model.dropout": 0.2,
            "model.label_smoothing": 0.1,
            "model.sample_rate": 8000,
            "model.mel_bins": 64,
            "train.precision": "bf16",
            "train.average_decay": 0.9,
        },
    ),
    ("statistics assign oomptimize train anew", {"model.prompt_format": "canary"}),
    (
        "evaluate",
        {
            "data.test": ["dev.jsonl"],
            "evaluate.batch_size": 2,
            "evaluate.num_workers": 2,
            "evaluate.checkpoint": "last",
            "evaluate.normalizer": "whisper",
            "evaluate.precision": "bf16",
        },
    ),
    (
        "train evaluate",
        {
            "evaluate.beam_size": 3,
            "evaluate.length_penalty": 1.0,
            "evaluate.ctc_weight": 0.1,
            "evaluate.max_generation_delta": 6,
        },
    ),
]
NEEDS = {
    "buckets.num_cells": {"buckets.policy": "optimal"},
    "data.stream.buffer_size": {"data.stream": {}},
    "data.stream.concurrent": {"data.stream": {}},
}
TABLE = {name: (value, set(stages.split())) for stages, values in SETTINGS for name, value in values.items()}


def names_of(kind: typing.Any, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a section's type; those of corpora once, for `data.train`."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = {name: field.annotation for name, field in kind.model_fields.items()}
    elif dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    else:
        return []
    names = []
    for name, inner in fields.items():
        dotted = f"{prefix}{name}"
        if isinstance(inner, types.UnionType):  # … | None
            inner = next(option for option in typing.get_args(inner) if option is not type(None))
        if inner == list[Corpus]:
            names += [dotted, *(names_of(Corpus, f"{dotted}.") if name == "train" else [])]
            continue
        below = names_of(inner, f"{dotted}.")
        names += below
        if not below or dotted == "data.stream":
            names.append(dotted)
    return names


def with_value(config: Config, name: str, value: typing.Any) -> Config:
    values = config.model_dump(mode="json")
    *sections, last = name.split(".")
    node = values
    for section in sections:
        node = node[section]
        if isinstance(node, list):
            node = node[0]
    node[last] = value
    return check_config(values)


def changes_of(config: Config, other: Config) -> set[str]:
    """Stages whose keys differ in the run folder of `config`."""
    before, after = keys_of(config, config.run_dir), keys_of(other, config.run_dir)
    return {name for name in after if before.get(name) != after[name]}


def test_every_setting_has_an_entry():
    assert sorted(names_of(Config)) == sorted(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_setting_changes_the_keys_of_the_stages_that_read_it(base, run, name):
    value, expected = TABLE[name]
    folder = Path(base.run_dir).parents[1]
    if name == "data.root":
        value = str(folder / "linked")
        if not Path(value).exists():
            Path(value).symlink_to(base.data.root)
    if name == "train.init_from":
        value = str(shutil.copy(base.train.init_from, folder / "copied.nemo"))
    for needed, setting in NEEDS.get(name, {}).items():
        base = with_value(base, needed, setting)
    other = with_value(base, name, value)
    assert other != base
    assert changes_of(base, other) == expected
