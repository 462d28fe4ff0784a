"""The commands `submit`, `status`, `logs` and `stop`: runs as jobs on a cluster."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raytrain.cli import stopping
from raytrain.cli.options import ConfigOption, SetOption, StagesArgument, TakeOverOption, json_option, print_json
from raytrain.cli.stages import checked_stages

if TYPE_CHECKING:
    from datetime import datetime

    from raytrain.cluster.jobs import Jobs, SubmittedJob
    from raytrain.config import Config
    from raytrain.console import Console
    from raytrain.operations.submission import Variables

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The cluster's Jobs server. By default cluster.address if it is one, RAY_API_SERVER_ADDRESS or "
        "RAY_ADDRESS, http://127.0.0.1:8265.",
    ),
]
OptionalConfig = Annotated[
    Path | None, typer.Option("--config", "-c", help="A configuration whose cluster.address to use.")
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.")]
OptionalJob = Annotated[str | None, typer.Argument(metavar="JOB", help="A job's id; all jobs by default.")]
Follow = Annotated[bool, typer.Option("--follow/--no-follow", help="Print the job's output until it ends.")]
FollowLogs = Annotated[
    bool, typer.Option("--follow", "-f", help="Keep printing until the job ends; exit code 0 if it succeeded.")
]
Python = Annotated[str, typer.Option(help="The Python interpreter on the cluster's head.")]
Env = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=VALUE]",
        help="A variable for the job, by default with its local value; may be repeated. Endpoints, regions and "
        "roots are passed automatically, secrets only with --env: anyone with the cluster's token can read them.",
    ),
]
WithSource = Annotated[
    bool | None,
    typer.Option(
        "--with-source/--without-source",
        help="Upload raytrain's source; otherwise raytrain must be installed on the cluster's nodes. By default it is "
        "uploaded if raytrain runs from a checkout.",
    ),
]


def submit(
    config: ConfigOption,
    stages: StagesArgument = None,
    set: SetOption = None,
    address: Address = None,
    follow: Follow = True,
    env: Env = None,
    with_source: WithSource = None,
    python: Python = "python",
    take_over: TakeOverOption = False,
) -> None:
    """Run all stages, or the named ones, as a job on a cluster.

    Uploads the resolved configuration, never data. Submitting the same configuration again resumes the run. Exit code 0
    if the job succeeded. Ctrl-C stops following; the job keeps running.
    """
    from raytrain.cluster.jobs import Jobs, server_address
    from raytrain.config import load_config
    from raytrain.console import Console
    from raytrain.operations import submission

    names = checked_stages(stages)
    console, loaded = Console(), load_config(config, set)
    variables = submission.variables(env or [], os.environ)
    _say_variables(console, variables)
    server = Jobs(server_address(address, loaded.cluster.address), console.warn)
    uploads_source = submission.is_checkout() if with_source is None else with_source
    command = submission.entrypoint(names, python, take_over)
    job = _submit(server, loaded, names, command, variables, uploads_source)
    if not follow:
        typer.echo(job)
        return
    console.say(f"job {job} at {server.address}")
    _follow(server, console, job)


def _submit(
    server: Jobs, config: Config, stages: Sequence[str], command: str, variables: Variables, uploads_source: bool
) -> str:
    """Start the job; returns its id."""
    from raytrain.cluster.jobs import JobRequest
    from raytrain.operations import submission

    about = {"run": config.name, "stages": " ".join(stages) or "all", "raytrain": submission.version()}
    with tempfile.TemporaryDirectory(prefix="raytrain-job-") as folder:
        submission.pack(Path(folder), submission.job_settings(config, variables.values), uploads_source)
        return server.submit(JobRequest(config.name, command, Path(folder), variables.values, about))


def status(
    job: OptionalJob = None,
    config: OptionalConfig = None,
    address: Address = None,
    json: Annotated[bool, json_option("One JSON object per job.")] = False,
) -> None:
    """List a cluster's jobs, newest first, or show one; with a configuration, also show the run folder's owner."""
    from raytrain.console import Console

    console = Console()
    jobs = _listed(console, job, config, address)
    if jobs is None:
        return
    if json:
        for entry in jobs:
            print_json(_values(entry))
    elif job is None:
        console.table(("job", "run", "stages", "state", "since"), _job_rows(jobs))
    else:
        console.table((jobs[0].id, ""), _details(jobs[0]))


def _listed(console: Console, job: str | None, config: Path | None, address: str | None) -> list[SubmittedJob] | None:
    """All jobs, or the named one; None, with a message, if no server was named and none answers."""
    from raytrain.cluster.jobs import DEFAULT_ADDRESS, server_address
    from raytrain.config import load_config
    from raytrain.errors import ClusterError

    loaded = load_config(config) if config is not None else None
    if loaded is not None:
        _say_owner(console, loaded)
    try:
        server = _server(config, address, console)
    except ClusterError as error:
        is_named = loaded is None or server_address(address, loaded.cluster.address) != DEFAULT_ADDRESS
        if is_named or job is not None:
            raise
        console.say(f"can't list jobs: {error}")
        return None
    return server.list() if job is None else [server.get(job)]


def _values(job: SubmittedJob) -> dict[str, object]:
    from dataclasses import asdict

    return {**asdict(job), "since": job.since}


def _job_rows(jobs: Sequence[SubmittedJob]) -> list[tuple[str, ...]]:
    return [(job.id, job.run, job.stages, job.state, _local(job.since)) for job in jobs]


def _details(job: SubmittedJob) -> list[tuple[str, str]]:
    """The description of a job, line by line."""
    rows = [
        ("run", job.run),
        ("stages", job.stages),
        ("raytrain", job.raytrain),
        ("state", job.state),
        ("started", _local(job.started)),
        ("ended", _local(job.ended)),
        ("exit code", "" if job.exit_code is None else str(job.exit_code)),
        ("message", job.message.strip()),
    ]
    return [row for row in rows if row[1]]


def logs(job: JobArgument, config: OptionalConfig = None, address: Address = None, follow: FollowLogs = False) -> None:
    """Print a job's output."""
    from raytrain.console import Console

    console = Console()
    server = _server(config, address, console)
    if follow:
        _follow(server, console, job)
    else:
        typer.echo(server.logs(job), nl=False)


def stop(job: JobArgument, config: OptionalConfig = None, address: Address = None) -> None:
    """Stop a job. Finished work is kept; submitting the same configuration again resumes from there."""
    from raytrain.console import Console

    console = Console()
    was_running, now = _server(config, address, console).stop(job)
    if not was_running:
        console.say(f"{job} was not running: it is {now.state}")
    elif now.is_over:
        console.say(f"{job} is {now.state}")
    else:
        console.say(f"{job} was asked to stop and is still {now.state}; check again with `raytrain status {job}`")


def _server(config: Path | None, address: str | None, console: Console) -> Jobs:
    from raytrain.cluster.jobs import Jobs, server_address
    from raytrain.config import load_config

    configured = load_config(config).cluster.address if config is not None else None
    return Jobs(server_address(address, configured), console.warn)


def _follow(server: Jobs, console: Console, job: str) -> None:
    """Print a job's lines; exit code 0 if it succeeds, 130 on Ctrl-C."""
    try:
        done = server.follow(job, _print_line)
    except KeyboardInterrupt:
        stopping.say_at_stop(None)
        console.say(
            f"{job} keeps running. Follow it again with `raytrain logs --follow {job}`, stop it with "
            f"`raytrain stop {job}` (--address {server.address})"
        )
        raise typer.Exit(130) from None
    console.say(f"{job} {done.state}")
    if not done.succeeded:
        if done.message:
            console.say(done.message.strip())
        raise typer.Exit(1)


def _print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _say_variables(console: Console, variables: Variables) -> None:
    if variables.secret:
        console.warn(
            f"{', '.join(variables.secret)} can be read by anyone with the cluster's token (Jobs API, dashboard); "
            "it is safer to set credentials on the nodes"
        )
    if variables.kept:
        names = ", ".join(variables.kept)
        console.say(f"secrets not passed: {names} (set them on the nodes, or name them with --env)")


def _say_owner(console: Console, config: Config) -> None:
    from raytrain.storage.ownership import describe_owner

    owner = describe_owner(config.run_location)
    console.say(owner[0] if owner else "nobody owns the run folder")


def _local(moment: datetime | None) -> str:
    return "" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
