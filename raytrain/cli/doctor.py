"""The command `doctor`: what every node of the cluster is like, what is wrong, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raytrain.cli.options import SetOption

if TYPE_CHECKING:
    from raytrain.operations.doctor import Report
    from raytrain.operations.facts import Storage

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="A run, to look at its storage, manifests and MLflow too."),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray to look at, as HOST:6379; else cluster.address, RAY_ADDRESS, or one on this machine."),
]


def doctor(
    config: Config = None,
    set: SetOption = None,
    address: Address = None,
    nodes: Annotated[int, typer.Option(min=1, help="Wait for that many nodes, at most five minutes.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Look at every node of the cluster before a run: versions, GPUs, memory, limits, clocks, storage, MLflow, access.

    Exit code 1 if something fails; a warning is no failure.
    """
    from raytrain.config import ClusterSection, load_config
    from raytrain.operations.doctor import examine

    if set and config is None:
        raise typer.BadParameter("goes with --config", param_hint="--set")
    loaded = load_config(config, set) if config else None
    cluster = loaded.cluster if loaded else ClusterSection()
    if address:
        cluster = cluster.model_copy(update={"address": address})
    report = examine(loaded, cluster, nodes)
    if json:
        import orjson

        typer.echo(orjson.dumps(report.to_dict()).decode())
    else:
        _show(report)
    if not report.ok:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    from raytrain.console import Console
    from raytrain.operations.checks import FAIL, OK, WARN, fold
    from raytrain.operations.facts import GIB

    console = Console()
    console.say(f"Ray at {report.address}" if report.address else "a Ray on this machine alone: no address was given")
    if report.nodes:
        columns = ("node", "CPUs", "GiB", "GPUs", "/dev/shm GiB", "open files", "run.root MiB/s")
        rows = [
            (
                f"{node.host}{' (head)' if node.is_head else ''}",
                f"{node.cpus:g}",
                f"{node.memory / GIB:.0f}",
                f"{len(node.gpus)}",
                f"{node.shm_total / GIB:.1f}",
                f"{node.open_files[0]}",
                _speed(node.storage),
            )
            for node in report.nodes
        ]
        console.table(columns, rows)
    folded = fold(report.checks)
    marks = {OK: "ok", WARN: "warning", FAIL: "FAILS"}
    console.table(
        ("", "check", "where", "seen"),
        [(marks[one.status], one.name, one.where or "cluster", one.seen) for one in folded],
    )
    remedies = [(marks[one.status], one.name, one.remedy) for one in folded if one.status != OK]
    if remedies:
        console.table(("", "check", "to do"), remedies)
    bad, doubtful = (sum(one.status == status for one in folded) for status in (FAIL, WARN))
    console.say(f"{bad} failed, {doubtful} warnings, {len(folded) - bad - doubtful} in order")


def _speed(storage: Storage | None) -> str:
    speed = storage.speed if storage else None
    return f"{speed.write_mib_s:,.0f} / {speed.read_mib_s:,.0f}" if speed and speed.write_mib_s else "–"
