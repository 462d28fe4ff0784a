"""Measure a run's resources from one machine: the speed of its storage, its manifests, its MLflow.

`measure_storage` runs as a Ray task on every node. It does not raise: a failed measurement is described in `error`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import requests

from raytrain.errors import RaytrainError
from raytrain.operations.facts import MIB, Manifest, Mlflow, Speed, Storage
from raytrain.operations.machine import HTTP_SECONDS, folder_facts
from raytrain.storage.filesystem import is_folder, list_files, open_stream
from raytrain.storage.locations import is_uri, locate
from raytrain.storage.patterns import expand

_BLOCK = 4 * MIB


@dataclass(frozen=True)
class Witness:
    """A file that the driver wrote below `run.root`, and its text."""

    path: str
    text: str

    def is_here(self) -> bool:
        """Whether this machine sees it."""
        try:
            return Path(self.path).read_text() == self.text
        except OSError:
            return False


@dataclass(frozen=True)
class StorageQuestion:
    """What to measure: `root` is a folder or URI, `seconds` limits writing and reading `probe_bytes` each, `manifests`
    are (corpus, path) pairs, and `mlflow` is a URI."""

    root: str
    probe_bytes: int
    seconds: float
    manifests: tuple[tuple[str, str], ...] = ()
    witness: Witness | None = None
    mlflow: str | None = None


def measure_storage(question: StorageQuestion) -> Storage:
    """This machine's view of the run's files; without a speed if the folder is not the driver's."""
    sees_driver = question.witness.is_here() if question.witness else None
    speed = None
    if sees_driver is not False:
        speed = measure_speed(question.root, question.probe_bytes, question.seconds)
    manifests = tuple(Manifest(corpus, path, read_start(path)) for corpus, path in question.manifests)
    mlflow = ask_mlflow(question.mlflow) if question.mlflow else None
    return Storage(sees_driver=sees_driver, speed=speed, manifests=manifests, mlflow=mlflow)


def measure_speed(root: str, size: int, seconds: float) -> Speed:
    """Write `size` bytes below `root`, read them, remove them.

    Either direction stops after `seconds`, with the speed until then. On a local disk the bytes are flushed and dropped
    from the page cache before they are read.
    """
    name = f"{root.rstrip('/')}/.doctor-{socket.gethostname()}-{os.urandom(4).hex()}"
    probe: _SpeedProbe | None = None
    try:
        probe = _SpeedProbe(name, seconds)
        probe.write(size)
        equal = probe.read()
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        return probe.speed(why) if probe else Speed(error=why)
    finally:
        if probe is not None:
            probe.remove()
    return probe.speed("" if equal else "the data read differ from the data written")


class _SpeedProbe:
    """A file that is written and read to measure both speeds, for at most `seconds` each."""

    def __init__(self, name: str, seconds: float) -> None:
        self._filesystem, self._path = locate(name)
        self._is_local, self._seconds = not is_uri(name), seconds
        self._block = os.urandom(_BLOCK)
        self._bytes, self._write_mib_s, self._read_mib_s = 0, 0.0, 0.0

    def write(self, size: int) -> None:
        start, written = time.perf_counter(), 0
        with self._filesystem.open_output_stream(self._path) as file:
            while written < size and time.perf_counter() - start < self._seconds:
                written += file.write(self._block) or len(self._block)
        if self._is_local:
            _push_out(self._path)
        self._bytes, self._write_mib_s = written, written / MIB / (time.perf_counter() - start)

    def read(self) -> bool:
        """Read the file; returns whether the data equal those written."""
        start, read, equal = time.perf_counter(), 0, True
        with self._filesystem.open_input_stream(self._path) as file:
            while read < self._bytes and time.perf_counter() - start < self._seconds:
                data = file.read(len(self._block))
                equal = equal and data == self._block
                read += len(data)
                if not data:
                    break
        self._read_mib_s = read / MIB / (time.perf_counter() - start)
        return equal

    def speed(self, error: str) -> Speed:
        """The speeds measured so far."""
        return Speed(self._write_mib_s, self._read_mib_s, self._bytes, error)

    def remove(self) -> None:
        with contextlib.suppress(Exception):
            self._filesystem.delete_file(self._path)


def _push_out(path: str) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_start(path: str) -> str:
    """Read the first bytes of the first file that a corpus' path expands to; returns the problem, or ""."""
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


def ask_mlflow(uri: str) -> Mlflow:
    """Whether the server answers, or the SQLite file can be written."""
    if uri.startswith("sqlite:///"):
        folder = folder_facts(str(Path(uri.removeprefix("sqlite:///")).parent))
        return Mlflow("can be written", "" if folder.writable else "its folder can't be written")
    if not uri.startswith(("http://", "https://")):
        return Mlflow("not asked")
    try:
        answer = _search_experiments(uri)
    except requests.RequestException as error:
        return Mlflow(error=f"no answer ({type(error).__name__})")
    if answer.status_code != 200:
        return Mlflow(error=f"answers {answer.status_code} {answer.reason}")
    return Mlflow(f"answers in {answer.elapsed.total_seconds() * 1000:.0f} ms")


def _search_experiments(uri: str) -> requests.Response:
    """/health answers everyone; a request like those of training also passes through the server's host and user
    checks."""
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    return requests.post(
        f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search",
        json={"max_results": 1},
        headers={"Authorization": f"Bearer {token}"} if token else {},
        auth=(user, password) if user and password else None,
        timeout=HTTP_SECONDS,
    )
