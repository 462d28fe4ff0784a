"""`BatchProfile`: the batch size of every bucket, and the plan, model and device for which it is valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from raytrain.errors import ProfileError

_MADE_ANEW = "delete batch_profile.json and run oomptimize again"


@dataclass(frozen=True)
class ProbeSetting:
    """The conditions under which the sizes were found. A size is valid for no other model, precision, device or number
    of workers."""

    model_id: str
    optimizer: str
    precision: str
    activation_checkpointing: bool | str  # a truth value where earlier versions knew it
    device_name: str
    device_gib: float
    memory_fraction: float
    world_size: int
    torch_version: str
    objective: str = "memory"
    shard: bool = False
    compiled: bool = False

    @property
    def budget_gib(self) -> float:
        """The memory that a step may take."""
        return self.device_gib * self.memory_fraction


@dataclass(frozen=True)
class BatchProfile:
    """Per bucket: batch size, predicted peak (GiB) at that size, and `num_probes`, how many real steps were tried.

    If real steps were run, there are also the measured peak (GiB), seconds per step, and `smallest_as_fast`: the
    smallest batch that is as fast per second of audio; None for a bucket that was not measured.
    """

    plan_id: str
    setting: ProbeSetting
    batch_sizes: tuple[int, ...]
    predicted_gib: tuple[float, ...]
    num_probes: tuple[int, ...]
    measured_gib: tuple[float | None, ...] | None = None
    step_seconds: tuple[float | None, ...] | None = None
    audio_seconds_per_second: tuple[float | None, ...] | None = None
    smallest_as_fast: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        if not self.batch_sizes or any(size < 1 for size in self.batch_sizes):
            raise ProfileError("every batch size must be at least 1", got=self.batch_sizes, remedy=_MADE_ANEW)
        if any(len(column) != len(self.batch_sizes) for column in vars(self).values() if isinstance(column, tuple)):
            raise ProfileError("a profile's lists differ in length", remedy=_MADE_ANEW)

    @property
    def confirmed(self) -> bool:
        """Whether the sizes come from real steps on the device, not from a trace alone."""
        return self.measured_gib is not None

    @property
    def peak_gib(self) -> tuple[float, ...]:
        """The measured peak of each bucket, or the predicted peak if it was not measured."""
        measured = self.measured_gib or (None,) * len(self.predicted_gib)
        return tuple(
            traced if peak is None else peak for peak, traced in zip(measured, self.predicted_gib, strict=True)
        )

    def to_body(self) -> dict[str, Any]:
        """JSON values."""
        body = asdict(self) | {"confirmed": self.confirmed, "peak_gib": self.peak_gib}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in body.items()}

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> BatchProfile:
        """The inverse of `to_body`."""
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in body.items()}
        values["setting"] = ProbeSetting(**_fields_of(ProbeSetting, body["setting"]))
        return cls(**_fields_of(cls, values))

    def check_matches(self, *, plan_id: str, model_id: str) -> None:
        """Raise `ProfileError` that names each difference if the profile is for another plan or model."""
        differences = [
            f"{name} {actual} instead of {wanted}"
            for name, actual, wanted in (
                ("bucket plan", self.plan_id, plan_id),
                ("model", self.setting.model_id, model_id),
            )
            if actual != wanted
        ]
        if differences:
            raise ProfileError(
                "the batch profile was made under another setting",
                got=", ".join(differences),
                why="its batch sizes would waste memory or run out of it",
                remedy="run oomptimize again",
            )


def _fields_of(kind: type[BatchProfile | ProbeSetting], values: Mapping[str, Any]) -> dict[str, Any]:
    return {part.name: values[part.name] for part in fields(kind) if part.name in values}


_NOMINAL = 1.03  # a GPU of "80 GB" reports 79.2 GiB


def choose_profile(profiles: Sequence[BatchProfile], device_name: str | None, device_gib: float) -> BatchProfile:
    """The profile for a GPU of `device_gib`: the profile measured on its kind, else the largest traced profile whose
    budget fits. Without a GPU (`device_name` None) the first.

    Raises `ProfileError` if none fits.
    """
    if device_name is None:
        return profiles[0]
    for profile in profiles:
        if profile.confirmed and profile.setting.device_name == device_name:
            return profile
    limit = device_gib * _NOMINAL
    traced = [profile for profile in profiles if not profile.confirmed and profile.setting.device_gib <= limit]
    if not traced:
        settings = [profile.setting for profile in profiles]
        listing = ", ".join(f"{setting.device_name} ({setting.device_gib:g} GiB)" for setting in settings)
        raise ProfileError(
            f"no batch profile for {device_name} with {device_gib:.1f} GiB",
            got=listing,
            why="batch sizes of another GPU waste memory or run out of it",
            remedy="run oomptimize on this kind of GPU, or trace it with oomptimize.device_memory",
        )
    return max(traced, key=lambda profile: profile.setting.device_gib)


def least_sizes(profiles: Sequence[BatchProfile]) -> tuple[int, ...]:
    """Batch sizes that fit every worker's device, even if their kinds differ."""
    return tuple(map(min, zip(*(profile.batch_sizes for profile in profiles), strict=True)))
