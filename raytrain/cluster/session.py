"""Start or reach Ray once, quietly, and leave nothing behind.

A local Ray listens on 127.0.0.1 only and asks for a token (see `authentication`). Ray's own memory monitor is off: in
2.60 a worker that it kills ends Train and Tune for good, where a plain out-of-memory kill is retried.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from raytrain.cluster.authentication import PLACES, token, token_authentication, warn_once
from raytrain.cluster.placement import ANYWHERE, Placement, total
from raytrain.cluster.reach import check_cluster
from raytrain.cluster.sockets import socket_folder
from raytrain.cluster.supervision import supervised
from raytrain.config import ClusterSection
from raytrain.errors import ClusterError, RaytrainError
from raytrain.redaction import without_credentials
from raytrain.waiting import telling, told

_QUIET = {
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # A thread that outlives a session and asks Ray for something would start another one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Tune's handler lets the first Ctrl-C end a search as if it were complete, and stays when the search is over.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "PYTHONWARNINGS": "ignore",
    # oneDNN keeps compiled convolutions for 1024 shapes; bucketed batches have thousands, and the cache then
    # holds gigabytes on a CPU.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


@contextlib.contextmanager
def ray_session(settings: ClusterSection) -> Iterator[None]:
    """Within it Ray is ready. A Ray that this process already uses is used and left running."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        quiet_data()
        yield
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if address == "local":
        address = None
    _check_address(address)
    common = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    if not address:
        common |= {
            "num_cpus": settings.num_cpus or max(2, os.cpu_count() or 2),
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            **socket_folder(),
        }
    start = f"the cluster at {address}" if address else "a Ray to start on this machine"
    with token_authentication(local=not address) as with_token, supervised(is_local=not address) as tell_session:
        if address:
            with telling(start):
                check_cluster(address, token() if with_token else None)
        with (
            telling(start),
            _no_native_stderr(),
            _on_loopback(not address),
            _readable(address, with_token),
            _same_handlers(),
        ):
            try:
                ray.init(address=address or "local", **common)
            except BaseException:
                ray.shutdown()  # what has started of it
                raise
        tell_session(ray._private.worker.global_worker.node.get_session_dir_path())
        if address and not with_token:
            warn_once(f"the cluster at {address}")
        try:
            quiet_data()
            yield
        finally:
            gc.collect()  # what still refers to Ray's objects would ask for them after the shutdown: that ends us
            ray.shutdown()


@contextlib.contextmanager
def _same_handlers() -> Iterator[None]:
    """Ray's handler of SIGTERM ends a driver as if all were well; let the one that there was stay."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _check_address(address: str | None) -> None:
    if address and address.startswith(("http://", "https://")):
        raise ClusterError(
            "this is the address of a Jobs server, which takes jobs but can't be joined",
            got=without_credentials(address),
            allowed="HOST:6379, as `ray start --head` prints it, or auto on a node of the cluster",
            remedy="send the run there with `raytrain submit`, or unset cluster.address and RAY_ADDRESS",
        )


@contextlib.contextmanager
def _readable(address: str | None, with_token: bool) -> Iterator[None]:
    """Ray's own errors where a cluster can't be joined, as ours; it does not say whether the token was to blame."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (AuthenticationError, ConnectionError):
        raise ClusterError(
            f"the cluster at {address} can't be joined",
            got="a token, which may be the wrong one" if with_token else "no token",
            allowed="a running cluster, and the token that it was started with if it asks for one",
            remedy=f"check cluster.address and RAY_ADDRESS (without both Ray is started here), and {PLACES}",
        ) from None


@contextlib.contextmanager
def _on_loopback(local: bool) -> Iterator[None]:
    """A Ray that starts here listens on 127.0.0.1 alone.

    Ray replaces 127.0.0.1 by an address that other machines reach, and then listens on all, but where it supports no
    clusters (Windows, macOS), which is what this switch says.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = before and not local
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def map_on_workers(
    items: list[Any], function: Callable[[list[Any]], Any], tasks_per_cpu: int, placement: Placement = ANYWHERE
) -> Iterator[Any]:
    """Call `function` on lists of items on Ray Data's workers; yields what it returns, in order.

    There are `tasks_per_cpu` lists for each CPU of the nodes of `placement`. A `RaytrainError` of a worker is raised
    here as it is: Ray Data would wrap it in its own and lose it. Raises `ConfigError` where there is no such node.
    """
    import ray

    def work(batch: dict[str, Any]) -> dict[str, Any]:
        try:
            result: Any = function([pickle.loads(item) for item in batch["item"]])
        except RaytrainError as error:
            result = error
        return {"result": [pickle.dumps(result)]}

    tasks = min(len(items), tasks_per_cpu * max(1, int(total(placement.nodes(), "CPU"))))
    data = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=tasks)
    rows = data.map_batches(work, batch_size=None, **placement.remote_options()).iter_rows()
    for row in told(rows, results_of_workers):
        result = pickle.loads(row["result"])  # made by our own workers a moment ago
        if isinstance(result, RaytrainError):
            raise result
        yield result


def results_of_workers() -> str:
    """What a job of Ray Data waits for, with what there is to work on."""
    import ray

    free, there = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
    return f"results of Ray's workers ({free:g} of {there:g} CPUs are free)"


@contextlib.contextmanager
def _no_native_stderr() -> Iterator[None]:
    """Drop what Ray's C++ parts print while they start; what goes wrong there is raised as an exception."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def quiet_data() -> None:
    """Ray Data in this process: rows in order, nothing printed."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    for name in ("ray.data", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
