"""The content of a checkpoint's `meta.json` and a run's `best.json`, and its validation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeGuard

from raytrain.storage.artifacts import is_count, is_number, parse_json

FORMAT = "raytrain.checkpoint/1"


class CheckpointMeta(TypedDict, total=False):
    """The content of `meta.json`. `format`, `step` and `files` (ids by name) are always there; `seconds` and
    `audio_seconds` are of training so far, `schedule` is the state of the schedule or stream."""

    format: str
    step: int
    files: dict[str, str]
    ids: dict[str, str]
    model: Mapping[str, Any]
    schedule: Mapping[str, Any]
    seconds: float
    audio_seconds: float


class Score(TypedDict):
    """A checkpoint's validation error."""

    step: int
    error: float


class BestNote(Score):
    """The best checkpoint, and all that are kept for their scores, best first."""

    kept: list[Score]
    validation: NotRequired[str]


def parse_meta(data: bytes) -> CheckpointMeta | None:
    """The content of a checkpoint's `meta.json`; None if it is not valid output of `write_checkpoint`."""
    try:
        meta = parse_json(data)
    except ValueError:
        return None
    return meta if _is_meta(meta) else None


def _is_meta(meta: object) -> TypeGuard[CheckpointMeta]:
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or not is_count(meta.get("step")):
        return False
    files, optional = meta.get("files"), {"ids": {}, "model": {}, "schedule": {}, **meta}
    return (
        isinstance(files, dict)
        and "model.pt" in files
        and all(Path(name).name == name and isinstance(identity, str) for name, identity in files.items())
        and all(isinstance(optional[name], dict) for name in ("ids", "model"))
        and all(isinstance(identity, str) for identity in optional["ids"].values())
        and all(is_number(meta.get(name, 0.0)) for name in ("seconds", "audio_seconds"))
        and _is_schedule(optional["schedule"])
    )


def _is_schedule(state: object) -> bool:
    """Whether this is the state of a `BatchSchedule` or a stream, or None."""
    if not isinstance(state, dict) or not is_count(state.get("epoch", 0)):
        return False
    positions, segments = state.get("positions", []), state.get("segments", [])
    return (
        (not state or "epoch" in state and ("positions" in state or "segments" in state))
        and _are_counts(positions)
        and isinstance(segments, list)
        and all(
            isinstance(segment, list) and len(segment) == 2 and _are_counts(segment[0]) and is_count(segment[1])
            for segment in segments
        )
    )


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(map(is_count, values))


def is_score(note: object) -> bool:
    """Whether a JSON value has a step and an error."""
    return isinstance(note, dict) and is_count(note.get("step")) and is_number(note.get("error"))


def validation_of(meta: CheckpointMeta) -> str | None:
    """The validation of a checkpoint with this `meta`; see `CheckpointFolder.mark_best`."""
    return meta.get("ids", {}).get("validation")
