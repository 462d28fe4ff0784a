"""The error tree: every failure that a user can cause or fix is a `RaytrainError`.

    RaytrainError
    ├── ConfigError          a setting is unknown, of the wrong type or contradicts another
    ├── DataError            the corpus can't be used
    │   ├── ManifestError    a manifest is missing or has too many bad lines
    │   └── TokenizerError   a tokenizer can't be made, read, or lacks a language
    ├── ArtifactError        a file that a stage reads is absent, of another format or damaged
    │   ├── PlanError        a bucket plan can't be made
    │   └── ProfileError     a batch profile was made for another plan, model or device
    ├── StorageError         the run folder can't be written (full, read-only, not a folder)
    ├── OwnedError           another process owns the run folder
    ├── ClusterError         a cluster or its Jobs server can't be reached, or refuses
    └── TrainingError        training can't start or continue
        └── CheckpointError  no checkpoint can be read

A message says what happened, what it got, what is allowed, why, and what to do:

    >>> str(PlanError("bucket 7 is empty", got=0, remedy="lower num_duration_buckets"))
    'bucket 7 is empty; got 0; to do: lower num_duration_buckets'
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class RaytrainError(Exception):
    """Base of all errors that raytrain raises on purpose; `str()` is one readable line."""

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        allowed: object = None,
        why: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.got, self.allowed, self.why, self.remedy = what, got, allowed, why, remedy
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if why:
            parts.append(f"because {why}")
        if remedy:
            parts.append(f"to do: {remedy}")
        super().__init__("; ".join(parts))

    def to_dict(self) -> dict[str, str | None]:
        """The parts as text, from which the error can be rebuilt."""
        parts = {"what": self.what, "got": self.got, "allowed": self.allowed, "why": self.why, "remedy": self.remedy}
        return {name: None if part is None else str(part) for name, part in parts.items()}

    def __reduce__(self) -> tuple[Callable[..., RaytrainError], tuple[object, ...]]:
        # Exceptions cross process boundaries by pickle (Ray), which needs help with keyword arguments.
        return _rebuild, (type(self), self.what, self.got, self.allowed, self.why, self.remedy)


def _rebuild(
    kind: type[RaytrainError], what: str, got: object, allowed: object, why: str | None, remedy: str | None
) -> RaytrainError:
    return kind(what, got=got, allowed=allowed, why=why, remedy=remedy)


def last_line(error: BaseException | str) -> str:
    """The last line of an error's message, where a worker's traceback says what happened, or of a program's output.

    An error without a message gives the name of its type.

    >>> last_line(RuntimeError("Traceback (most recent call last):\\n  ...\\nOSError: disk full\\n"))
    'OSError: disk full'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines:
        return lines[-1][:300]
    return "" if isinstance(error, str) else type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, where libraries state the problem; the error's type if the message is
    empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def system_reason(error: OSError) -> str:
    """Why the operating system refused, as it stands inside a message."""
    return (error.strerror or str(error)).lower()


class ConfigError(RaytrainError):
    """A setting is unknown, of the wrong type or contradicts another one."""


class DataError(RaytrainError):
    """The corpus can't be used."""


class ManifestError(DataError):
    """A manifest is missing or has more bad lines than allowed."""


class TokenizerError(DataError):
    """A tokenizer can't be trained or read, or lacks a language or a token."""


class ArtifactError(RaytrainError):
    """A file that a stage reads is absent, of another format or damaged."""


class PlanError(ArtifactError):
    """A bucket plan can't be made from this histogram and these settings."""


class ProfileError(ArtifactError):
    """A batch profile doesn't belong to this plan, model or device."""


class StorageError(RaytrainError):
    """The run folder can't be written."""


class OwnedError(RaytrainError):
    """Another process owns the run folder, or has taken it over."""


class ClusterError(RaytrainError):
    """A cluster or its Jobs server can't be reached, or refuses."""


class TrainingError(RaytrainError):
    """Training can't start or continue."""


class CheckpointError(TrainingError):
    """No checkpoint can be read."""
