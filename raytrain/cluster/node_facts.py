"""Measure one machine, or what it sees of the storage: plain values, for `raytrain.operations.checks` to judge.

Both functions run as Ray tasks on every node, and the first on the driver too. They say what they found, never what it
means, and they do not raise: what can't be measured is a text under `error`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from raytrain.model.device import emulated_gpu

PACKAGES = ("ray", "torch", "raytrain", "pyarrow", "lhotse", "mlflow", "numpy", "sentencepiece", "soundfile")
CACHE_VARIABLE = "RAYTRAIN_CACHE"
MIB = 1 << 20
_FORMATS = {"WAV", "FLAC", "OGG", "MP3"}
_HTTP_SECONDS = 5.0
_GPU_SECONDS = 60.0
# In a process of its own: a broken driver may hang or abort it, and the worker keeps no memory on a GPU.
_ASK_TORCH = """
import json, torch
gpus = []
for index in range(torch.cuda.device_count()):
    torch.zeros(1, device=f"cuda:{index}")
    one = torch.cuda.get_device_properties(index)
    gpus.append({"name": one.name, "memory": one.total_memory, "capability": f"{one.major}{one.minor}"})
print(json.dumps(gpus))
"""


def measure_node(wanted: dict[str, Any]) -> dict[str, Any]:
    """Facts about this machine, by the names of `checks.NodeFacts`.

    `wanted` has `ray_gpus`, how many GPUs Ray hands out here; `temp_folder`, Ray's; and `jobs_api`, the URL of a Jobs
    API to ask without a token, or None.
    """
    import psutil

    raylet = _raylet_environment()
    shm = psutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {
        "versions": versions(),
        "memory": psutil.virtual_memory().total,
        **gpu_facts(wanted["ray_gpus"], raylet.get("CUDA_VISIBLE_DEVICES")),
        "shm_total": shm.total if shm else 0,
        "shm_free": shm.free if shm else 0,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "temp_folder": folder_facts(wanted["temp_folder"]),
        "cache_folder": folder_facts(os.environ.get(CACHE_VARIABLE) or "~/.cache/raytrain"),
        "decoders": decoders(),
        "auth_mode": auth_mode(),
        "memory_monitor": raylet.get("RAY_memory_monitor_refresh_ms"),
        "jobs_api": {"url": wanted["jobs_api"], "status": _status(wanted["jobs_api"])} if wanted["jobs_api"] else None,
        "time": time.time(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and the packages that nodes must agree on; `code` names raytrain's very files."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {**found, "code": _code_id()}


@functools.cache
def _code_id() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def auth_mode() -> str:
    """`token` or `disabled`, as this process talks to Ray."""
    from ray._private.authentication.authentication_utils import get_authentication_mode_name
    from ray._raylet import get_authentication_mode

    return get_authentication_mode_name(get_authentication_mode())


def has_token() -> bool:
    """Whether this process has a token to show."""
    from ray._raylet import AuthenticationTokenLoader

    return AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)


def _raylet_environment() -> dict[str, str]:
    """What `ray start` was given: a worker's own environment may have been changed for its task."""
    import psutil

    with contextlib.suppress(psutil.Error, ValueError, KeyError):
        return psutil.Process(int(os.environ["RAY_RAYLET_PID"])).environ()
    return dict(os.environ)


def gpu_facts(ray_gpus: float, visible: str | None, seconds: float = _GPU_SECONDS) -> dict[str, Any]:
    """GPUs as the driver counts them and as torch can use them; `visible` is CUDA_VISIBLE_DEVICES, None for all.

    torch is only asked where there is a sign of a GPU. `gpu_error` says why it could not use one.
    """
    installed, driver = _nvidia()
    if visible is not None:
        installed = min(installed, len([one for one in visible.split(",") if one.strip()]))
    found: dict[str, Any] = {"installed_gpus": installed, "gpu_driver": driver, "gpus": [], "gpu_error": ""}
    if (emulated := emulated_gpu()) is not None:
        gpu = {"name": emulated.name, "memory": emulated.total_bytes, "capability": "none"}
        return {**found, "gpus": [gpu] * int(ray_gpus), "installed_gpus": int(ray_gpus)}
    if not (installed or ray_gpus or os.path.exists("/dev/kfd")):
        return found
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {**found, "gpu_error": f"no answer within {seconds:.0f} s"}
    if done.returncode:
        return {**found, "gpu_error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return {**found, "gpus": json.loads(done.stdout)}


def _nvidia() -> tuple[int, str]:
    """NVIDIA GPUs and the driver's version, as nvidia-smi would say them."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0, ""
    try:
        return pynvml.nvmlDeviceGetCount(), pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return 0, ""
    finally:
        pynvml.nvmlShutdown()


def installed_gpus() -> int:
    """GPUs of this machine, as far as drivers tell; whether torch can use them is another matter."""
    return _nvidia()[0] or int(os.path.exists("/dev/kfd"))


def folder_facts(path: str) -> dict[str, Any]:
    """Space in a folder, or where it would be made: `path`, `free` and `total` bytes, `writable`."""
    import psutil

    wanted = Path(path).expanduser().absolute()
    there = next(one for one in (wanted, *wanted.parents) if one.exists())
    usage = psutil.disk_usage(str(there))
    writable = there.is_dir() and os.access(there, os.W_OK)
    return {"path": str(wanted), "free": usage.free, "total": usage.total, "writable": writable}


def decoders() -> dict[str, Any]:
    """`library`, and the `missing` audio formats; `error` where none can be read."""
    try:
        import miniaudio
        import soundfile

        missing = sorted(_FORMATS - set(soundfile.available_formats()))
        if "OPUS" not in soundfile.available_subtypes("OGG"):
            missing.append("Opus")
        library = f"libsndfile {soundfile.__libsndfile_version__}, miniaudio {miniaudio.__version__}"
        return {"library": library, "missing": missing, "error": ""}
    except (ImportError, OSError) as error:
        return {"library": "", "missing": [], "error": str(error)}


def measure_storage(wanted: dict[str, Any]) -> dict[str, Any]:
    """What this machine sees of the run's files.

    `wanted` has `root` (a folder or URI), `probe_bytes`, `seconds` (for writing, and as much for reading); `witness`,
    a file of the driver's below `root` and its text, or None; `manifests`, pairs of corpus and path; and `mlflow`, a
    URI or None. The answer's `sees_driver` is whether the witness is here.
    """
    found: dict[str, Any] = {"error": "", "sees_driver": None}
    if wanted["witness"]:
        path, text = wanted["witness"]
        try:
            found["sees_driver"] = Path(path).read_text() == text
        except OSError:
            found["sees_driver"] = False
    if found["sees_driver"] is not False:
        found |= measure_speed(wanted["root"], wanted["probe_bytes"], wanted["seconds"])
    found["manifests"] = [
        {"corpus": corpus, "path": path, "error": read_start(path)} for corpus, path in wanted["manifests"]
    ]
    found["mlflow"] = ask_mlflow(wanted["mlflow"]) if wanted["mlflow"] else None
    return found


def measure_speed(root: str, size: int, seconds: float) -> dict[str, Any]:
    """Write `size` bytes below `root`, read them, remove them: `write_mib_s`, `read_mib_s`, `bytes`, `error`.

    Either direction ends after `seconds`, with the speed until then. The bytes are pushed to a local disk and dropped
    from memory before they are read.
    """
    from raytrain.storage.filesystem import is_uri, locate

    name = f"{root.rstrip('/')}/.doctor-{socket.gethostname()}-{os.urandom(4).hex()}"
    block = os.urandom(4 * MIB)
    done: dict[str, Any] = {"write_mib_s": 0.0, "read_mib_s": 0.0, "bytes": 0, "error": ""}
    filesystem = path = None
    try:
        filesystem, path = locate(name)
        start, written = time.perf_counter(), 0
        with filesystem.open_output_stream(path) as file:
            while written < size and time.perf_counter() - start < seconds:
                written += file.write(block) or len(block)
        if not is_uri(name):
            _push_out(path)
        done |= {"bytes": written, "write_mib_s": written / MIB / (time.perf_counter() - start)}
        start, read, equal = time.perf_counter(), 0, True
        with filesystem.open_input_stream(path) as file:
            while read < written and time.perf_counter() - start < seconds:
                data = file.read(len(block))
                equal = equal and data == block
                read += len(data)
                if not data:
                    break
        done["read_mib_s"] = read / MIB / (time.perf_counter() - start)
        if not equal:
            done["error"] = "what was read is not what was written"
    except Exception as error:
        done["error"] = " ".join(str(error).split())[:300] or type(error).__name__
    finally:
        if filesystem is not None:
            with contextlib.suppress(Exception):
                filesystem.delete_file(path)
    return done


def _push_out(path: str) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_start(path: str) -> str:
    """Read the first bytes of the first file that a corpus' path stands for; what is wrong, or nothing."""
    from raytrain.errors import RaytrainError
    from raytrain.storage.filesystem import expand, is_folder, list_files, open_stream

    try:
        first = expand(path)[0]
        if is_folder(first):
            inside = list_files(first)
            if not inside:
                return f"{first} has no files"
            first = inside[0]
        with open_stream(first) as file:
            return "" if file.read(4096) else f"{first} is empty"
    except RaytrainError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"{path}: {error}"


def ask_mlflow(uri: str) -> dict[str, Any]:
    """Whether the server answers, or the SQLite file can be written: `seen`, and what is wrong as `error`."""
    if uri.startswith("sqlite:///"):
        folder = folder_facts(str(Path(uri.removeprefix("sqlite:///")).parent))
        return {"seen": "can be written", "error": "" if folder["writable"] else "its folder can't be written"}
    if not uri.startswith(("http://", "https://")):
        return {"seen": "not asked", "error": ""}
    import requests

    url = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search"
    headers = {}
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {os.environ['MLFLOW_TRACKING_TOKEN']}"
    try:
        # /health answers everyone; a request as training makes them also meets the server's checks of host and user.
        answer = requests.post(
            url,
            json={"max_results": 1},
            headers=headers,
            auth=(user, password) if user and password else None,
            timeout=_HTTP_SECONDS,
        )
    except requests.RequestException as error:
        return {"seen": "", "error": f"no answer ({type(error).__name__})"}
    if answer.status_code != 200:
        return {"seen": "", "error": f"answers {answer.status_code} {answer.reason}"}
    return {"seen": f"answers in {answer.elapsed.total_seconds() * 1000:.0f} ms", "error": ""}


def _status(url: str) -> int | None:
    """The HTTP status of a request without a token, None where nothing answers."""
    import requests

    with requests.Session() as session:
        session.trust_env = False  # neither a proxy nor stored credentials
        with contextlib.suppress(requests.RequestException):
            return session.get(url, timeout=_HTTP_SECONDS).status_code
    return None
