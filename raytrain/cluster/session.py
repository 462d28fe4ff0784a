"""Start or join Ray once, quietly, and leave nothing behind.

A local Ray listens on 127.0.0.1 only and requires a token (see `authentication`). Ray's memory monitor is off: in 2.60,
a worker it kills ends Train and Tune permanently, while a plain out-of-memory kill is retried.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from raytrain.cluster.authentication import TOKEN_SOURCES, token, token_authentication, warn_once
from raytrain.cluster.reach import check_cluster
from raytrain.cluster.sockets import socket_folder
from raytrain.cluster.supervision import supervised
from raytrain.config import ClusterSection
from raytrain.errors import ClusterError
from raytrain.redaction import without_credentials
from raytrain.waiting import reporting_wait

_QUIET = {
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # A thread that outlives a session and calls Ray would start another one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Tune's handler makes the first Ctrl-C end a search as if it were complete, and stays installed after the search.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "PYTHONWARNINGS": "ignore",
    # oneDNN caches compiled convolutions for 1024 shapes; bucketed batches have thousands, so on a CPU the cache would
    # hold gigabytes.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


@contextlib.contextmanager
def ray_session(settings: ClusterSection) -> Iterator[None]:
    """Context in which Ray is ready. If this process already uses Ray, that session is reused and left running."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        quiet_data()
        yield
        return
    address = _address(settings)
    options = _init_options(address, settings.num_cpus)
    with token_authentication(local=not address) as with_token, supervised(is_local=not address) as report_session:
        _initialize(address, options, with_token)
        report_session(session_folder())
        if address and not with_token:
            warn_once(f"the cluster at {address}")
        try:
            quiet_data()
            yield
        finally:
            gc.collect()  # references to Ray objects that outlive the shutdown would kill this process
            ray.shutdown()


def _address(settings: ClusterSection) -> str | None:
    """The cluster to join, or None to start Ray on this machine."""
    address = settings.address or os.environ.get("RAY_ADDRESS")
    _check_address(address)
    return None if address == "local" else address or None


def _init_options(address: str | None, num_cpus: int | None) -> dict[str, Any]:
    """The options of `ray.init`."""
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    if address:
        return options | {"address": address}
    return options | {
        "address": "local",
        "num_cpus": num_cpus or max(2, os.cpu_count() or 2),
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": socket_folder(),
    }


def _initialize(address: str | None, options: dict[str, Any], with_token: bool) -> None:
    """Join the cluster at `address`, or start Ray here."""
    import ray

    target = f"the cluster at {address}" if address else "a Ray to start on this machine"
    if address:
        with reporting_wait(target):
            check_cluster(address, token() if with_token else None)
    with (
        reporting_wait(target),
        _no_native_stderr(),
        _on_loopback(not address),
        _readable(address, with_token),
        _same_handlers(),
    ):
        try:
            ray.init(**options)
        except BaseException:
            ray.shutdown()  # stop the parts that did start
            raise


def session_folder() -> str:
    """The folder in which this process's Ray session keeps its sockets and logs on this machine."""
    return str(_node().get_session_dir_path())


def temp_folder() -> str:
    """Ray's folder for temporary files, which is the same on all nodes."""
    return str(_node().get_temp_dir_path())


def _node() -> Any:
    from ray._private.worker import global_worker

    return global_worker.node


@contextlib.contextmanager
def _same_handlers() -> Iterator[None]:
    """Ray's SIGTERM handler ends a driver with a success status; this keeps the driver's own handler."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _check_address(address: str | None) -> None:
    if address and address.startswith(("http://", "https://")):
        raise ClusterError(
            "this is the address of a Jobs server, which accepts jobs but can't be joined",
            got=without_credentials(address),
            allowed="HOST:6379, as `ray start --head` prints it, or auto on a node of the cluster",
            remedy="send the run there with `raytrain submit`, or unset cluster.address and RAY_ADDRESS",
        )


@contextlib.contextmanager
def _readable(address: str | None, with_token: bool) -> Iterator[None]:
    """Convert Ray's errors when a cluster can't be joined to ours; Ray does not say whether the token was the
    problem."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (AuthenticationError, ConnectionError):
        raise ClusterError(
            f"the cluster at {address} can't be joined",
            got="a token, which may be the wrong one" if with_token else "no token",
            allowed="a running cluster, and its token if it requires one",
            remedy=f"check cluster.address and RAY_ADDRESS (Ray starts here if neither is set), and {TOKEN_SOURCES}",
        ) from None


@contextlib.contextmanager
def _on_loopback(local: bool) -> Iterator[None]:
    """Make a local Ray listen on 127.0.0.1 only.

    Ray replaces 127.0.0.1 with an address that other machines can reach and then listens on all interfaces, except
    where it does not support clusters (Windows, macOS); this switch makes it behave as there.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = before and not local
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _no_native_stderr() -> Iterator[None]:
    """Discard what Ray's C++ code prints during startup; failures are raised as exceptions."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def quiet_data() -> None:
    """Configure Ray Data in this process: rows in order, no output."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    for name in ("ray.data", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
