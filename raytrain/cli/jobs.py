"""The commands `submit`, `status`, `logs` and `stop`: runs as jobs on a cluster."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from raytrain.cli import stopping
from raytrain.cli.options import ConfigOption, SetOption, StagesArgument, TakeOverOption

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The cluster's Jobs server. If left out: cluster.address where it is one, RAY_API_SERVER_ADDRESS or "
        "RAY_ADDRESS, http://127.0.0.1:8265.",
    ),
]
OptionalConfig = Annotated[
    Path | None, typer.Option("--config", "-c", help="A configuration, whose cluster.address is used.")
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.")]
Env = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=VALUE]",
        help="A variable that the job gets, with its value here if none is given; may be repeated. Endpoints, regions "
        "and roots go along by themselves, secrets only so: whoever has the cluster's token can read them.",
    ),
]
WithSource = Annotated[
    bool | None,
    typer.Option(
        "--with-source/--without-source",
        help="Take raytrain's source along; otherwise the cluster's nodes have it installed. If left out: taken along "
        "where raytrain runs from a checkout.",
    ),
]


def submit(
    config: ConfigOption,
    stages: StagesArgument = None,
    set: SetOption = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Print what the job prints, to its end.")] = True,
    env: Env = None,
    with_source: WithSource = None,
    python: Annotated[str, typer.Option(help="The interpreter on the cluster's head.")] = "python",
    take_over: TakeOverOption = False,
) -> None:
    """Run all stages, or those named, as a job on a cluster.

    Takes the resolved configuration along, never data. The same configuration again goes on where its artefacts stand.
    Exit code 0 if the job succeeded. Ctrl-C ends the following, not the job.
    """
    from raytrain.cluster.jobs import JobRequest, Jobs, server_address
    from raytrain.config import load_config
    from raytrain.console import Console
    from raytrain.operations import submission
    from raytrain.stages.pipeline import STAGE_NAMES

    names = stages or []
    unknown = [one for one in names if one not in STAGE_NAMES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(STAGE_NAMES)}", param_hint="STAGE")
    console = Console()
    loaded = load_config(config, set)
    given = submission.variables(env or [], os.environ)
    _tell(console, given)
    if with_source is None:
        with_source = submission.is_checkout()
    server = Jobs(server_address(address, loaded.cluster.address), console.warn)
    about = {"run": loaded.name, "stages": " ".join(names) or "all", "raytrain": submission.version()}
    with tempfile.TemporaryDirectory(prefix="raytrain-job-") as folder:
        submission.pack(Path(folder), submission.job_settings(loaded, given.values), with_source)
        command = submission.entrypoint(names, python, take_over)
        job = server.submit(JobRequest(loaded.name, command, Path(folder), given.values, about))
    if not follow:
        typer.echo(job)
        return
    console.say(f"job {job} at {server.address}")
    _follow(server, console, job)


def status(
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="A job's id; all jobs if left out.")] = None,
    config: OptionalConfig = None,
    address: Address = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per job.")] = False,
) -> None:
    """List a cluster's jobs, the newest first, or show one; with a configuration also who owns its run folder."""
    from dataclasses import asdict

    import orjson

    from raytrain.cluster.jobs import DEFAULT_ADDRESS, server_address
    from raytrain.config import load_config
    from raytrain.console import Console
    from raytrain.errors import ClusterError

    console = Console()
    loaded = load_config(config) if config is not None else None
    if loaded is not None:
        _tell_owner(console, loaded)
    try:
        server = _server(config, address, console)
    except ClusterError as error:
        is_named = loaded is None or server_address(address, loaded.cluster.address) != DEFAULT_ADDRESS
        if is_named or job is not None:
            raise
        console.say(f"no jobs are listed: {error}")
        return
    found = server.list() if job is None else [server.get(job)]
    if json:
        for one in found:
            typer.echo(orjson.dumps({**asdict(one), "since": one.since}).decode())
    elif job is None:
        rows = [(one.id, one.run, one.stages, one.state, _local(one.since)) for one in found]
        console.table(("job", "run", "stages", "state", "since"), rows)
    else:
        one = found[0]
        rows = [
            ("run", one.run),
            ("stages", one.stages),
            ("raytrain", one.raytrain),
            ("state", one.state),
            ("started", _local(one.started)),
            ("ended", _local(one.ended)),
            ("exit code", "" if one.exit_code is None else str(one.exit_code)),
            ("message", one.message.strip()),
        ]
        console.table((one.id, ""), [row for row in rows if row[1]])


def logs(
    job: JobArgument,
    config: OptionalConfig = None,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on to the job's end; exit code 0 if it succeeded.")
    ] = False,
) -> None:
    """Print what a job has printed."""
    from raytrain.console import Console

    console = Console()
    server = _server(config, address, console)
    if follow:
        _follow(server, console, job)
    else:
        typer.echo(server.logs(job), nl=False)


def stop(job: JobArgument, config: OptionalConfig = None, address: Address = None) -> None:
    """End a job. What it has finished stays; submitting the same configuration again goes on from there."""
    from raytrain.console import Console

    console = Console()
    was_running, now = _server(config, address, console).stop(job)
    if not was_running:
        console.say(f"{job} was not running: it is {now.state}")
    elif now.is_over:
        console.say(f"{job} is {now.state}")
    else:
        console.say(f"{job} was told to stop and is still {now.state}; `raytrain status {job}` looks again")


def _server(config: Path | None, address: str | None, console: Any) -> Any:
    from raytrain.cluster.jobs import Jobs, server_address
    from raytrain.config import load_config

    configured = load_config(config).cluster.address if config is not None else None
    return Jobs(server_address(address, configured), console.warn)


def _follow(server: Any, console: Any, job: str) -> None:
    """Print a job's lines; exit code 0 if it succeeds, 130 on Ctrl-C."""
    try:
        done = server.follow(job, lambda line: (sys.stdout.write(f"{line}\n"), sys.stdout.flush()))
    except KeyboardInterrupt:
        stopping.say_at_stop(None)
        console.say(
            f"{job} goes on. Look again with `raytrain logs --follow {job}`, end it with `raytrain stop {job}`"
            f" (--address {server.address})"
        )
        raise typer.Exit(130) from None
    console.say(f"{job} {done.state}")
    if not done.succeeded:
        if done.message:
            console.say(done.message.strip())
        raise typer.Exit(1)


def _tell(console: Any, given: Any) -> None:
    if given.secret:
        console.warn(
            f"{', '.join(given.secret)} can be read by whoever has the cluster's token (Jobs API, dashboard); better "
            "give the nodes their own"
        )
    if given.kept:
        console.say(f"secret and not passed: {', '.join(given.kept)} (the nodes have their own, or name it with --env)")


def _tell_owner(console: Any, config: Any) -> None:
    from raytrain.storage.ownership import describe_owner

    found = describe_owner(config.run_location)
    console.say(found[0] if found else "nobody owns the run folder")


def _local(when: Any) -> str:
    return "" if when is None else when.astimezone().strftime("%Y-%m-%d %H:%M:%S")
