"""What follows a failure of training, and the error that a person sees."""

import pytest
import ray

from raytrain.cluster.failures import Failure, Restart, cause_of_kind, decide, failure_of, readable
from raytrain.errors import DataError, TrainingError

KILLED, ANY = Failure.KILLED_FOR_MEMORY, Failure.ANY


@pytest.mark.parametrize(
    ("failure", "lowered", "attempts_left", "decision"),
    [
        # A batch that did not fit is smaller now: that costs no attempt.
        (ANY, ["bucket 3 takes 9"], 0, Restart(0, "bucket 3 takes 9")),
        (KILLED, ["bucket 3 takes 9", "bucket 1 takes 4"], 2, Restart(2, "bucket 1 takes 4")),
        # A worker that was killed in the middle of anything else may be killed again.
        (KILLED, [], 2, Restart(1, "a worker ran out of host memory and was killed")),
        (KILLED, [], 1, Restart(0, "a worker ran out of host memory and was killed")),
        (KILLED, [], 0, None),
        # Ray Train has used up its own attempts.
        (ANY, [], 3, None),
        (ANY, [], 0, None),
    ],
)
def test_what_follows_a_failure(failure, lowered, attempts_left, decision):
    assert decide(failure, lowered, attempts_left) == decision


class WorkersFailed(Exception):
    """As Ray Train's error: what each worker raised, by rank."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__("workers failed")
        self.worker_failures = dict(enumerate(failures))


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_a_kill_for_memory_is_known_wherever_ray_wraps_it():
    kill = ray.exceptions.OutOfMemoryError("killed")
    assert failure_of(kill) is KILLED
    assert failure_of(WorkersFailed(ValueError("x"), raised_from(RuntimeError("y"), kill))) is KILLED
    assert failure_of(WorkersFailed(MemoryError("of the process itself"))) is ANY


def test_a_readable_error_is_raised_as_it_is():
    error = DataError("too many rows can't be read", remedy="check them")
    wrapped = WorkersFailed(ValueError("x"), raised_from(RuntimeError("y"), error))
    assert readable(wrapped) is error and cause_of_kind(wrapped, DataError) is error
    assert cause_of_kind(wrapped, TrainingError) is None


def test_any_error_ends_in_a_message_with_a_remedy():
    error = readable(WorkersFailed(ValueError("first line\nlast line\n\n")))
    assert isinstance(error, TrainingError)
    assert str(error).startswith("training failed; because last line; to do: fix the cause")


def test_no_room_for_workers_is_an_error_of_its_own():
    timeout = type("WorkerGroupStartupTimeoutError", (Exception,), {})("it\ntimed out after 60 s\nand so on")
    assert "no room for the training workers; because timed out after 60 s" in str(readable(timeout))
