"""Facts about the nodes of a cluster: plain values that a node sends and `raytrain doctor --json` prints.

Sizes are bytes, speeds MiB/s. Nodes and driver may run different versions of raytrain: each field added after the first
version needs a default, used if a node does not send it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch sees it; `capability` is 90 for sm_90."""

    name: str
    memory: int
    capability: str


@dataclass(frozen=True)
class GpuFacts:
    """GPUs as counted by their drivers and as usable by torch; `error` says why torch could not use one."""

    installed: int = 0
    driver: str = ""
    gpus: tuple[Gpu, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Folder:
    """The space in a folder, or where it would be created."""

    path: str
    free: int
    total: int
    writable: bool


@dataclass(frozen=True)
class Decoders:
    """The audio library, and the formats it can't read; `error` is set if it reads none."""

    library: str = ""
    missing: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class JobsApi:
    """The Jobs API's answer to a request without a token: an HTTP status, or None if nothing answered."""

    url: str
    status: int | None


@dataclass(frozen=True)
class Speed:
    """The speeds at which `bytes` were written and read, or why that failed."""

    write_mib_s: float = 0.0
    read_mib_s: float = 0.0
    bytes: int = 0
    error: str = ""


@dataclass(frozen=True)
class Manifest:
    """The first manifest of a corpus, and why it can't be read, if it can't."""

    corpus: str
    path: str
    error: str = ""


@dataclass(frozen=True)
class Mlflow:
    """A tracking server's answer, or why there was none."""

    seen: str = ""
    error: str = ""


@dataclass(frozen=True)
class Storage:
    """A node's view of the run's files. `error` is set if the node did not answer; then nothing else is set.

    `sees_driver` is whether the driver's file is in `run.root` there, or None if that was not checked; `speed` is None
    if it is not.
    """

    error: str = ""
    sees_driver: bool | None = None
    speed: Speed | None = None
    manifests: tuple[Manifest, ...] = ()
    mlflow: Mlflow | None = None

    @property
    def problem(self) -> str:
        """Why there is no speed; empty if it was measured or not requested."""
        return self.error or (self.speed.error if self.speed else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the speed's fields merged in."""
        if self.error:
            return {"error": self.error}
        speed = asdict(self.speed) if self.speed else {}
        values = {"error": speed.pop("error", ""), "sees_driver": self.sees_driver, **speed}
        return {
            **values,
            "manifests": [asdict(manifest) for manifest in self.manifests],
            "mlflow": asdict(self.mlflow) if self.mlflow else None,
        }


@dataclass(frozen=True)
class NodeFacts:
    """The facts about a node. `error` is set if it did not answer; then only Ray's information about it is set.

    `open_files` are the soft and the hard limit; `clock_s` is how far the node's clock is ahead of the driver's;
    `memory_monitor` is the raylet's RAY_memory_monitor_refresh_ms, or None if it is not set; `jobs_api` is None if the
    node did not check it.
    """

    host: str = ""
    address: str = ""
    is_head: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    cpus: float = 0
    memory: int = 0
    gpus: tuple[Gpu, ...] = ()
    ray_gpus: float = 0
    installed_gpus: int = 0
    gpu_driver: str = ""
    gpu_error: str = ""
    shm_total: int = 0
    shm_free: int = 0
    object_store: int = 0
    open_files: tuple[int, int] = (0, 0)
    clock_s: float = 0.0
    temp_folder: Folder | None = None
    cache_folder: Folder | None = None
    decoders: Decoders | None = None
    auth_mode: str = ""
    memory_monitor: str | None = None
    jobs_api: JobsApi | None = None
    storage: Storage | None = None
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; anything not measured is an empty object."""
        values = asdict(self)
        for name in ("temp_folder", "cache_folder", "decoders"):
            values[name] = values[name] or {}
        return values | {"storage": self.storage.to_dict() if self.storage else {}}
