"""`BatchProfile`: the batch size of every bucket, and for which plan, model and device it holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from raytrain.errors import ProfileError


@dataclass(frozen=True)
class ProbeSetting:
    """Under what the sizes were found."""

    model_id: str
    optimizer: str
    precision: str
    device_name: str
    device_gib: float
    memory_fraction: float
    world_size: int
    torch_version: str


@dataclass(frozen=True)
class BatchProfile:
    """Sizes and peaks (GiB) per bucket; `step_seconds` and `confirmed` only where real steps were run."""

    plan_id: str
    setting: ProbeSetting
    batch_sizes: tuple[int, ...]
    peak_gib: tuple[float, ...]
    predicted_gib: tuple[float, ...]
    step_seconds: tuple[float, ...] | None
    confirmed: bool

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.batch_sizes):
            raise ProfileError("every batch size must be at least 1", got=self.batch_sizes)

    def to_body(self) -> dict[str, Any]:
        """JSON values."""
        body = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in body.items()}

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> BatchProfile:
        """The inverse of `to_body`."""
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in body.items()}
        return cls(**{**values, "setting": ProbeSetting(**body["setting"])})

    def check_matches(self, *, plan_id: str, model_id: str) -> None:
        """Raise `ProfileError` that names each difference where the profile is for another plan or model."""
        differences = [
            f"{name} {found} instead of {wanted}"
            for name, found, wanted in (
                ("bucket plan", self.plan_id, plan_id),
                ("model", self.setting.model_id, model_id),
            )
            if found != wanted
        ]
        if differences:
            raise ProfileError(
                "the batch profile was made under another setting",
                got=", ".join(differences),
                why="its batch sizes would waste memory or run out of it",
                remedy="run oomptimize again",
            )
