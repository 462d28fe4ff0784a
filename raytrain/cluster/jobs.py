"""Jobs on a cluster, through Ray's Jobs server: submit, follow, list, stop.

    jobs = Jobs("http://127.0.0.1:8265")
    name = jobs.submit(JobRequest("digits", "python -m pipelines.run …", folder, {}, {"run": "digits"}))
    jobs.follow(name, print).succeeded

The token is sent only to a server that requires it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.cluster.authentication import NO_AUTHENTICATION, TOKEN_SOURCES, token_header
from raytrain.errors import ClusterError, first_line, last_line
from raytrain.redaction import redacted, without_credentials
from raytrain.waiting import reporting_wait

if TYPE_CHECKING:
    import requests
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_ANSWER_SECONDS = 10.0
_SILENT_SECONDS = 120.0
_AGENT_SECONDS = 60.0  # a head's job agent starts after its server
_STOP_SECONDS = 20.0
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class JobRequest:
    """A job to submit: its shell `command` runs in a copy of `folder`."""

    run: str
    command: str
    folder: Path
    variables: dict[str, str]
    metadata: dict[str, str]


@dataclass(frozen=True)
class SubmittedJob:
    """A job as the server reports it; times are UTC, None if it has not started or ended yet."""

    id: str
    state: str
    run: str
    stages: str
    raytrain: str
    started: datetime | None
    ended: datetime | None
    message: str
    exit_code: int | None

    @property
    def is_over(self) -> bool:
        """Whether its state is final."""
        return self.state in _ENDED

    @property
    def succeeded(self) -> bool:
        """Whether it ended with exit code 0."""
        return self.state == "SUCCEEDED"

    @property
    def since(self) -> datetime | None:
        """When it entered its state."""
        return self.ended if self.is_over else self.started


def server_address(given: str | None, configured: str | None) -> str:
    """The Jobs server's address: `given`, else `configured` if it is a URL, else from the environment, else this
    machine."""
    fallbacks = [address for address in (configured, *map(os.environ.get, _ADDRESSES)) if _is_http(address)]
    address = next((address for address in (given, *fallbacks) if address), DEFAULT_ADDRESS)
    return (address if "://" in address else f"http://{address}").rstrip("/")


class Jobs:
    """A Jobs server. All methods raise `ClusterError`."""

    def __init__(self, address: str, warn: Callable[[str], None] = lambda text: None) -> None:
        if not _is_http(address):
            raise ClusterError(
                "a Jobs server's address begins with http",
                got=without_credentials(address),
                allowed=f"for example {DEFAULT_ADDRESS}",
                remedy="correct --address, or unset RAY_API_SERVER_ADDRESS",
            )
        self.address = address
        self._shown = without_credentials(address)
        with self._readable():
            for name in _TALKATIVE:
                logging.getLogger(name).setLevel(logging.ERROR)
            headers = token_header() if self._asks_for_token() else {}
            self._has_token = bool(headers)
            if not headers:
                warn(NO_AUTHENTICATION % self._shown)
            with _without(*_ADDRESSES):  # they would override the address
                self._client = _client(address, headers)

    def submit(self, request: JobRequest) -> str:
        """Start a job; returns its id."""
        name = f"{request.run}-{secrets.token_hex(4)}"
        until = time.monotonic() + _AGENT_SECONDS
        environment = {"working_dir": str(request.folder), "env_vars": request.variables}
        while True:
            try:
                with self._readable(), reporting_wait(f"the Jobs server at {self._shown} to take the job"):
                    return self._client.submit_job(
                        entrypoint=request.command,
                        submission_id=name,
                        runtime_env=environment,
                        metadata=request.metadata,
                    )
            except ClusterError as error:
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(2.0)

    def list(self) -> list[SubmittedJob]:
        """All submitted jobs, the newest first."""
        with self._readable():
            jobs = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(jobs, key=lambda job: (job.started or datetime.now(UTC), job.id), reverse=True)

    def get(self, name: str) -> SubmittedJob:
        """One job."""
        with self._readable(name):
            return _job(self._client.get_job_info(name))

    def logs(self, name: str) -> str:
        """What a job has printed so far, with secrets redacted."""
        with self._readable(name):
            return redacted(self._client.get_job_logs(name))

    def follow(self, name: str, write: Callable[[str], None]) -> SubmittedJob:
        """Pass a job's output to `write`, line by line with secrets redacted, until it ends; returns the job."""
        import aiohttp

        printed = _Lines(write)
        with reporting_wait(lambda: f"job {name} to begin: it is {self.get(name).state}"):
            while (job := self.get(name)).state == "PENDING":
                time.sleep(1.0)
        while True:
            with contextlib.suppress(RuntimeError, aiohttp.ClientError):  # a lost connection; `get` says more
                asyncio.run(self._tail(name, printed))
            job = self.get(name)
            if job.is_over:
                printed.end()
                return job
            time.sleep(1.0)

    def stop(self, name: str) -> tuple[bool, SubmittedJob]:
        """Stop a job; returns whether it was running, and the job after it ended or 20 s passed."""
        with self._readable(name):
            was_running = self._client.stop_job(name)
        until = time.monotonic() + _STOP_SECONDS
        while not (job := self.get(name)).is_over and time.monotonic() < until:
            time.sleep(0.5)
        return was_running, job

    async def _tail(self, name: str, printed: _Lines) -> None:
        printed.begin()
        async for text in self._client.tail_job_logs(name):
            printed.add(text)

    def _asks_for_token(self) -> bool:
        """Whether the server requires a token. The request carries none, so no token reaches a server that does not
        need it."""
        import requests

        answer = requests.get(f"{self.address}/api/version", timeout=_ANSWER_SECONDS)
        if answer.status_code in (401, 403):
            return True
        answer.raise_for_status()
        answer.json()["ray_version"]
        return False

    @contextlib.contextmanager
    def _readable(self, job: str = "") -> Iterator[None]:
        """Convert errors of Ray's client to ours."""
        try:
            import requests
            from ray.exceptions import AuthenticationError
        except ImportError as error:
            raise _needs_default() from error
        try:
            yield
        except AuthenticationError as error:
            raise self._refused(error.message.startswith("Authentication failed")) from None
        except (ConnectionError, requests.ConnectionError, requests.Timeout):
            raise ClusterError(
                f"no Jobs server answers at {self._shown}",
                remedy="check --address, cluster.address and RAY_API_SERVER_ADDRESS; `ray start --head` starts "
                "one, with ray[default]; `ssh -L 8265:127.0.0.1:8265 HEAD` forwards a remote one",
            ) from None
        except (requests.RequestException, KeyError, ValueError) as error:
            raise ClusterError(
                f"what answers at {self._shown} is not a Jobs server",
                why=redacted(first_line(error)),
                remedy="use the address of the head's dashboard (port 8265 by default)",
            ) from None
        except RuntimeError as error:
            if "ray[default]" in str(error):
                raise _needs_default() from None
            if job and "404" in str(error):
                raise ClusterError(f"{self._shown} has no job {job}", remedy="`raytrain status` lists them") from None
            raise ClusterError(
                f"the Jobs server at {self._shown} refused the request",
                why=last_line(redacted(str(error))),
                remedy="fix what it names; `raytrain doctor --address` checks the server",
            ) from None

    def _refused(self, wrong: bool) -> ClusterError:
        return ClusterError(
            f"the Jobs server at {self._shown} requires the cluster's token",
            got="another token" if wrong else "none",
            remedy=f"put the cluster's token into {TOKEN_SOURCES}",
        )


class _Lines:
    """Whole lines of a text that may restart from its beginning: each line is written once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._rest = write, ""
        self._seen = self._skip = 0

    def begin(self) -> None:
        """The text restarts from its beginning."""
        self._skip = self._seen

    def add(self, text: str) -> None:
        new = text[self._skip :]
        self._skip = max(0, self._skip - len(text))
        self._seen += len(new)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            self._write(redacted(line))

    def end(self) -> None:
        if self._rest:
            self._write(redacted(self._rest))
        self._rest = ""


def _job(details: JobDetails) -> SubmittedJob:
    metadata = details.metadata or {}
    started, ended = (
        None if stamp is None else datetime.fromtimestamp(stamp / 1000, UTC)
        for stamp in (details.start_time, details.end_time)
    )
    return SubmittedJob(
        details.submission_id or "",
        str(details.status.value),
        metadata.get("run", ""),
        metadata.get("stages", ""),
        metadata.get("raytrain", ""),
        started,
        ended,
        redacted(details.message or ""),
        details.driver_exit_code,
    )


def _client(address: str, headers: dict[str, str]) -> JobSubmissionClient:
    """Ray's client, with a timeout for a server that stops responding."""
    from ray.job_submission import JobSubmissionClient

    class BoundedClient(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
            return super()._do_request(method, endpoint, **{"timeout": _SILENT_SECONDS, **options})

    return BoundedClient(address, headers=headers)


def _needs_default() -> ClusterError:
    return ClusterError(
        "jobs need Ray's Jobs client", why="Ray is installed without it", remedy="pip install 'ray[default]'"
    )


def _is_http(address: str | None) -> bool:
    return address is not None and address.startswith(("http://", "https://"))


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Temporarily remove variables from the environment."""
    removed = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(removed)
