"""Measure one machine: plain facts for `raytrain.operations.checks`.

`measure_node` runs as a Ray task on every node. It only reports measurements and does not raise: a failed measurement
is described in `error`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from raytrain.cluster.authentication import auth_mode
from raytrain.cluster.gpu_driver import has_amd_driver, nvidia_gpus
from raytrain.errors import last_line
from raytrain.model.device import emulated_gpu
from raytrain.operations.facts import Decoders, Folder, Gpu, GpuFacts, JobsApi, NodeFacts
from raytrain.storage.run_store import cache_folder

PACKAGES = ("ray", "torch", "raytrain", "pyarrow", "lhotse", "mlflow", "numpy", "sentencepiece", "soundfile")
_FORMATS = {"WAV", "FLAC", "OGG", "MP3"}
HTTP_SECONDS = 5.0
_GPU_SECONDS = 60.0
# In a separate process: a broken driver may hang or abort it, and the worker must not hold GPU memory.
_ASK_TORCH = """
import json, torch
gpus = []
for index in range(torch.cuda.device_count()):
    torch.zeros(1, device=f"cuda:{index}")
    gpu = torch.cuda.get_device_properties(index)
    gpus.append({"name": gpu.name, "memory": gpu.total_memory, "capability": f"{gpu.major}{gpu.minor}"})
print(json.dumps(gpus))
"""


@dataclass(frozen=True)
class NodeQuestion:
    """What to measure on a node: `node` is Ray's information about it, `temp_folder` is Ray's, `jobs_api` the URL of a
    Jobs API to call without a token."""

    node: NodeFacts
    temp_folder: str
    jobs_api: str | None = None


def measure_node(question: NodeQuestion) -> tuple[NodeFacts, float]:
    """The node with the facts about this machine, and the time on its clock."""
    import psutil

    raylet = _raylet_environment()
    shm = psutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    gpus = gpu_facts(question.node.ray_gpus, raylet.get("CUDA_VISIBLE_DEVICES"))
    url = question.jobs_api
    facts = replace(
        question.node,
        versions=versions(),
        memory=psutil.virtual_memory().total,
        gpus=gpus.gpus,
        installed_gpus=gpus.installed,
        gpu_driver=gpus.driver,
        gpu_error=gpus.error,
        shm_total=shm.total if shm else 0,
        shm_free=shm.free if shm else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        temp_folder=folder_facts(question.temp_folder),
        cache_folder=folder_facts(str(cache_folder())),
        decoders=decoders(),
        auth_mode=auth_mode(),
        memory_monitor=raylet.get("RAY_memory_monitor_refresh_ms"),
        jobs_api=JobsApi(url, _status(url)) if url else None,
    )
    return facts, time.time()


def versions() -> dict[str, str]:
    """Versions of Python and the packages that nodes must agree on; `code` is a hash of raytrain's files."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return {**installed, "code": _code_id()}


@functools.cache
def _code_id() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _raylet_environment() -> dict[str, str]:
    """The environment of `ray start`; a worker's own environment may have been changed for its task."""
    import psutil

    with contextlib.suppress(psutil.Error, ValueError, KeyError):
        return psutil.Process(int(os.environ["RAY_RAYLET_PID"])).environ()
    return dict(os.environ)


def gpu_facts(ray_gpus: float, visible: str | None, seconds: float = _GPU_SECONDS) -> GpuFacts:
    """GPUs as counted by the driver and as usable by torch; `visible` is CUDA_VISIBLE_DEVICES, None for all.

    torch is queried only if there is a sign of a GPU.
    """
    installed, driver = nvidia_gpus()
    if visible is not None:
        installed = min(installed, len([name for name in visible.split(",") if name.strip()]))
    if (emulated := emulated_gpu()) is not None:
        gpu = Gpu(emulated.name, emulated.total_bytes, "none")
        return GpuFacts(int(ray_gpus), driver, (gpu,) * int(ray_gpus))
    counted = GpuFacts(installed, driver)
    if not (installed or ray_gpus or has_amd_driver()):
        return counted
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return replace(counted, error=f"no answer within {seconds:.0f} s")
    if done.returncode:
        return replace(counted, error=last_line(done.stderr) or f"exit code {done.returncode}")
    return replace(counted, gpus=tuple(Gpu(**gpu) for gpu in json.loads(done.stdout)))


def folder_facts(path: str) -> Folder:
    """The space in a folder, or where it would be made."""
    import psutil

    folder = Path(path).expanduser().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    usage = psutil.disk_usage(str(existing))
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    return Folder(str(folder), usage.free, usage.total, writable)


def decoders() -> Decoders:
    """The audio formats that this machine reads."""
    try:
        import miniaudio
        import soundfile

        missing = sorted(_FORMATS - set(soundfile.available_formats()))
        if "OPUS" not in soundfile.available_subtypes("OGG"):
            missing.append("Opus")
        library = f"libsndfile {soundfile.__libsndfile_version__}, miniaudio {miniaudio.__version__}"
        return Decoders(library, tuple(missing))
    except (ImportError, OSError) as error:
        return Decoders(error=str(error))


def _status(url: str) -> int | None:
    """The HTTP status of a request without a token, or None if nothing answers."""
    import requests

    with requests.Session() as session:
        session.trust_env = False  # neither a proxy nor stored credentials
        with contextlib.suppress(requests.RequestException):
            return session.get(url, timeout=HTTP_SECONDS).status_code
    return None
