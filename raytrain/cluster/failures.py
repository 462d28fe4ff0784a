"""Interpreting Ray's errors: how to proceed after a training failure, and an error the user can act on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from raytrain.config import Config
from raytrain.errors import RaytrainError, TrainingError, last_line


class Failure(Enum):
    """Why Ray Train gave up, as far as it affects recovery."""

    KILLED_FOR_MEMORY = "a worker ran out of host memory and was killed"
    ANY = "Ray Train exhausted its own retries"


@dataclass(frozen=True)
class Restart:
    """Training restarts from its last checkpoint; `attempts_left` more restarts remain."""

    attempts_left: int
    because: str


def decide(failure: Failure, lowered: Sequence[str], attempts_left: int) -> Restart | None:
    """What follows when Ray Train has given up, None where training ends with the error that there was. `lowered` says
    which batches the failed attempt made smaller.

    A batch that did not fit has been made smaller, so these restarts cost no attempt and come to an end by themselves;
    a worker that Ray's memory monitor killed may be killed again. Ray Train itself has retried everything else.
    """
    if lowered:
        return Restart(attempts_left, lowered[-1])
    if failure is Failure.KILLED_FOR_MEMORY and attempts_left > 0:
        return Restart(attempts_left - 1, failure.value)
    return None


def failure_of(error: BaseException) -> Failure:
    """Classify an error from Ray Train, which does not restart by itself after Ray's memory monitor has killed a
    worker."""
    import ray

    killed = any(isinstance(cause, ray.exceptions.OutOfMemoryError) for cause in _causes(error))
    return Failure.KILLED_FOR_MEMORY if killed else Failure.ANY


def stalled(stalls: list[str], config: Config) -> TrainingError:
    """The error for workers that made no progress; `stalls` lists what each was doing."""
    return TrainingError(
        f"training made no progress for {config.train.stall_minutes:g} minutes and was ended",
        got=f"last activity: {'; '.join(sorted(set(stalls)))}",
        remedy="check the worker that is not waiting for the others: its storage, its GPU, its network; "
        "raise train.stall_minutes if a step or a validation batch may take that long; `raytrain train` resumes from "
        "the last checkpoint",
    )


def cause_of_kind(error: BaseException, kind: type[RaytrainError]) -> RaytrainError | None:
    """`error` or the first error it wraps that is of the given type, or None."""
    return next((cause for cause in _causes(error) if isinstance(cause, kind)), None)


def readable(error: BaseException) -> Exception:
    """The `RaytrainError` that Ray wrapped, or a `TrainingError` with the last line of the cause."""
    if (cause := cause_of_kind(error, RaytrainError)) is not None:
        return cause
    causes = _causes(error)
    lines = [line for line in str(causes[-1]).strip().splitlines() if line.strip()]
    if any(type(cause).__name__ == "WorkerGroupStartupTimeoutError" for cause in causes):
        return TrainingError(
            "there was no room for the training workers",
            why=next((line for line in lines if "timed out" in line), None),
            remedy="free CPUs or GPUs, add nodes, or lower train.num_workers; [least, most] uses what is available",
        )
    return TrainingError(
        "training failed",
        why=last_line(causes[-1]),
        remedy="fix the cause, then run the same command, which resumes from the last checkpoint; `raytrain doctor` "
        "checks every node",
    )


def _causes(error: BaseException) -> list[BaseException]:
    """The error and every error it wraps, outermost first."""
    causes = [error]
    for cause in causes:
        failures = getattr(cause, "worker_failures", None) or {}
        wrapped = [*failures.values(), cause.__cause__, getattr(cause, "cause", None)]
        wrapped += [getattr(cause, "_exc", None), getattr(cause, "controller_failure", None)]
        causes.extend(inner for inner in wrapped if isinstance(inner, BaseException) and inner not in causes)
    return causes
