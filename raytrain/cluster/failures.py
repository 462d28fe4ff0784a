"""What Ray's errors mean: the cause that a person can act on, and what training may go on after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytrain.config import Config
from raytrain.errors import RaytrainError, TrainingError, last_line


@dataclass(frozen=True)
class Restart:
    """Training starts again from its last checkpoint, with `attempts_left` more restarts if it fails again."""

    attempts_left: int
    because: str


@dataclass(frozen=True)
class GiveUp:
    """Training ends with the error that there was."""


def decide(was_killed_for_memory: bool, lowered: Sequence[str], attempts_left: int) -> Restart | GiveUp:
    """What follows when Ray Train has given up. `lowered` says which batches the failed attempt made smaller.

    A batch that did not fit has been made smaller, so that this comes to an end by itself and costs no attempt; a
    worker that Ray's memory monitor killed may be killed again. Ray Train itself has retried everything else.
    """
    if lowered:
        return Restart(attempts_left, lowered[-1])
    if was_killed_for_memory and attempts_left > 0:
        return Restart(attempts_left - 1, "a worker was killed for its memory")
    return GiveUp()


def killed_for_memory(error: BaseException) -> bool:
    """Whether Ray's memory monitor ended a worker, after which Ray Train does not start again by itself."""
    import ray

    return any(isinstance(one, ray.exceptions.OutOfMemoryError) for one in _causes(error))


def stalled(stalls: list[str], config: Config) -> TrainingError:
    """The error for workers that made no progress; `stalls` say what each was doing."""
    return TrainingError(
        f"training made no progress for {config.train.stall_minutes:g} minutes and was ended",
        got=f"last of all {'; '.join(sorted(set(stalls)))}",
        remedy="the worker that does not wait for others is the one to look at: its storage, its GPU, its network; "
        "raise train.stall_minutes where a step or a validation batch may take as long; `raytrain train` goes on from "
        "the last checkpoint",
    )


def cause_of_kind(error: BaseException, kind: type[RaytrainError]) -> RaytrainError | None:
    """The error of a kind that is or that is inside `error`, None where there is none."""
    return next((cause for cause in _causes(error) if isinstance(cause, kind)), None)


def readable(error: BaseException) -> Exception:
    """The `RaytrainError` inside Ray's wrapping, or a `TrainingError` with the last line of its cause."""
    if (cause := cause_of_kind(error, RaytrainError)) is not None:
        return cause
    seen = _causes(error)
    lines = [line for line in str(seen[-1]).strip().splitlines() if line.strip()]
    if any(type(item).__name__ == "WorkerGroupStartupTimeoutError" for item in seen):
        return TrainingError(
            "there was no room for the training workers",
            why=next((line for line in lines if "timed out" in line), None),
            remedy="free CPUs or GPUs, add nodes, or lower train.num_workers; [least, most] takes what there is",
        )
    return TrainingError(
        "training failed",
        why=last_line(seen[-1]),
        remedy="mend the cause, then run the same command, which goes on from the last checkpoint; `raytrain doctor` "
        "looks at every node",
    )


def _causes(error: BaseException) -> list[BaseException]:
    """The error and all that it wraps, outermost first."""
    seen = [error]
    for item in seen:
        failures = getattr(item, "worker_failures", None) or {}
        inner = [*failures.values(), item.__cause__, getattr(item, "cause", None)]
        inner += [getattr(item, "_exc", None), getattr(item, "controller_failure", None)]
        seen.extend(one for one in inner if isinstance(one, BaseException) and one not in seen)
    return seen
