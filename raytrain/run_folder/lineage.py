"""What training depends on: a checkpoint has a lineage, and training resumes only from checkpoints of the same
lineage."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from raytrain.config.lineage import lineage_settings
from raytrain.run_folder.chunks import split_inputs
from raytrain.run_folder.scored_rows import decode_settings
from raytrain.run_folder.workspace import Workspace
from raytrain.storage.artifacts import content_id, file_id, read_state
from raytrain.storage.run_files import BATCH_PROFILE
from raytrain.training.checkpoint_meta import CheckpointMeta
from raytrain.training.conversion import model_stamp
from raytrain.training.settings import CHECKPOINTING, TrainSettings


def training_lineage(workspace: Workspace) -> str:
    """The id of everything that a checkpoint is learned from: training can't resume from checkpoints of another
    lineage."""
    config = workspace.config
    settings = lineage_settings(config.train)
    if config.train.schedule == "cosine":  # which ends at max_steps
        settings["max_steps"] = config.train.max_steps
    start = model_stamp(Path(config.train.init_from)) if config.train.init_from else None
    return content_id(
        [
            settings,
            config.seed,
            _rows_id(workspace),
            _mixing(workspace),
            asdict(config.augment),
            workspace.tokenizer.id,
            asdict(workspace.model_config()),
            start,
        ]
    )


def _rows_id(workspace: Workspace) -> str:
    """The id of the rows that training reads."""
    stream = workspace.config.data.stream
    if stream is None:
        return workspace.assigned_rows_id
    return content_id([workspace.plan_id, split_inputs(workspace.config, "train"), stream.model_dump()])


def _mixing(workspace: Workspace) -> list[object]:
    """What the repetition of corpora depends on."""
    data = workspace.config.data
    mixing: list[object] = [
        data.temperature,
        data.temperature_by,
        [[corpus.name, corpus.weight] for corpus in data.train],
    ]
    if data.temperature != 1 or len({corpus.weight for corpus in data.train}) > 1:
        by_corpus = workspace.statistics().by_corpus  # includes rows that assign rejects
        mixing.append([by_corpus[corpus.name].hours for corpus in data.train])
    return mixing


def training_key(workspace: Workspace) -> list[object]:
    """Everything that training depends on, as JSON values."""
    return [training_lineage(workspace), _train_section(workspace), *_validation(workspace)]


def _train_section(workspace: Workspace) -> dict[str, object]:
    """The section `train` as earlier runs have it, so that they keep their keys: without later settings at their
    defaults, and with a truth value where there are more choices now."""
    section = workspace.config.section("train")
    train = section["train"]
    train["activation_checkpointing"] = CHECKPOINTING.earlier(train["activation_checkpointing"])
    for name in ("reduce_in", "compile"):
        if train[name] == getattr(TrainSettings, name):
            del train[name]
    return section


def _validation(workspace: Workspace) -> list[object]:
    """What a checkpoint is validated on, and how."""
    config = workspace.config
    return [split_inputs(config, "dev"), asdict(decode_settings(config))] if config.data.dev else [None, None]


def training_meta(workspace: Workspace) -> CheckpointMeta:
    """What every checkpoint records of its origin."""
    config = workspace.config
    return {
        "ids": {
            "lineage": training_lineage(workspace),
            "bucket_plan": workspace.plan_id,
            "tokenizer": workspace.tokenizer.id,
            "model": workspace.model_id(),
            "batch_profile": file_id(workspace.path(BATCH_PROFILE)),
            "validation": content_id([*_validation(workspace), config.train.max_validation_utterances]),
        },
        "model": asdict(workspace.model_config()),
    }


@dataclass(frozen=True)
class LineageNote:
    """The body of `checkpoints/lineage.json`."""

    lineage: str


def noted_lineage(path: Path) -> str | None:
    """The lineage of the checkpoints next to a note; None if the note is missing or can't be read."""
    note = read_state(path, LineageNote)
    return note and note["lineage"]
