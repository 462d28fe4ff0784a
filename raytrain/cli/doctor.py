"""The command `doctor`: the state of every node of the cluster, what is wrong, and how to fix it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raytrain.cli.options import JsonOption, SetOption, check_needs, print_json

if TYPE_CHECKING:
    from raytrain.operations.doctor import Report
    from raytrain.operations.facts import NodeFacts

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Also check this run's storage, manifests and MLflow."),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray's address, as HOST:6379; by default cluster.address, RAY_ADDRESS, or Ray on this machine."),
]


def doctor(
    config: Config = None,
    set: SetOption = None,
    address: Address = None,
    nodes: Annotated[int, typer.Option(min=1, help="Wait for this many nodes, for at most five minutes.")] = 1,
    json: JsonOption = False,
) -> None:
    """Check every node of the cluster before a run: versions, GPUs, memory, limits, clocks, storage, MLflow, access.

    Exit code 1 if a check fails; warnings are not failures.
    """
    from raytrain.config import ClusterSection, load_config
    from raytrain.operations.doctor import examine

    check_needs(bool(set) and config is None, "--set", "--config")
    loaded = load_config(config, set) if config else None
    cluster = loaded.cluster if loaded else ClusterSection()
    if address:
        cluster = cluster.model_copy(update={"address": address})
    report = examine(loaded, cluster, nodes)
    if json:
        print_json(report.to_dict())
    else:
        _show(report)
    if not report.ok:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    from raytrain.console import Console
    from raytrain.operations.checks import FAIL, OK, WARN, fold

    console = Console()
    console.say(f"Ray at {report.address}" if report.address else "Ray on this machine only: no address was given")
    if report.nodes:
        columns = ("node", "CPUs", "GiB", "GPUs", "/dev/shm GiB", "open files", "run.root MiB/s")
        console.table(columns, [_node_row(node) for node in report.nodes])
    checks = fold(report.checks)
    marks = {OK: "ok", WARN: "warning", FAIL: "FAILS"}
    rows = [(marks[check.status], check.name, check.where or "cluster", check.seen) for check in checks]
    console.table(("", "check", "where", "seen"), rows)
    remedies = [(marks[check.status], check.name, check.remedy) for check in checks if check.status != OK]
    if remedies:
        console.table(("", "check", "to do"), remedies)
    failed, warnings = (sum(check.status == status for check in checks) for status in (FAIL, WARN))
    console.say(f"{failed} failed, {warnings} warnings, {len(checks) - failed - warnings} ok")


def _node_row(node: NodeFacts) -> tuple[str, ...]:
    from raytrain.operations.facts import GIB

    return (
        f"{node.host}{' (head)' if node.is_head else ''}",
        f"{node.cpus:g}",
        f"{node.memory / GIB:.0f}",
        f"{len(node.gpus)}",
        f"{node.shm_total / GIB:.1f}",
        f"{node.open_files[0]}",
        _speed(node),
    )


def _speed(node: NodeFacts) -> str:
    speed = node.storage.speed if node.storage else None
    return f"{speed.write_mib_s:,.0f} / {speed.read_mib_s:,.0f}" if speed and speed.write_mib_s else "–"
