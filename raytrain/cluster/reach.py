"""Check what answers at a cluster's address before Ray connects: Ray retries silently for many minutes, and a token
that only one side has makes Ray Data wait forever."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import socket
import time
from typing import TYPE_CHECKING

from raytrain.cluster.authentication import TOKEN_SOURCES
from raytrain.errors import ClusterError
from raytrain.redaction import without_credentials

if TYPE_CHECKING:
    import grpc

_TRY_SECONDS = 5.0
_ANSWER_SECONDS = 20.0
_ADDRESS = re.compile(r"\[?([\w.:%-]+?)\]?:(\d+)")
_ALLOWED = "HOST:6379, as `ray start --head` prints it, or auto on a node of the cluster"
_REMEDY = "check cluster.address and RAY_ADDRESS (Ray starts here if neither is set)"


def check_cluster(address: str, token: str | None) -> None:
    """Raises `ClusterError`, within half a minute, if no cluster can be joined at `address` with `token`."""
    if address == "auto":
        address = _running()
    match = _ADDRESS.fullmatch(address)
    if match is None:
        shown = without_credentials(address)
        raise ClusterError(
            "not a cluster address",
            got=repr(shown if "://" in shown else re.sub(r".*@", "***@", shown, flags=re.DOTALL)),
            allowed=_ALLOWED,
            remedy=_REMEDY,
        )
    _check_port(address, match[1], int(match[2]))
    _check_answer(address, token)


def _running() -> str:
    from ray._private.services import get_ray_address_from_environment

    address = None
    with contextlib.suppress(ConnectionError):
        address = get_ray_address_from_environment("auto", None)
    if not address:
        raise ClusterError("no cluster runs on this machine", got="the address auto", allowed=_ALLOWED, remedy=_REMEDY)
    return address


def _check_port(address: str, host: str, port: int) -> None:
    """Try for some seconds, since a head that is starting will listen soon."""
    until = time.monotonic() + _TRY_SECONDS
    while True:
        left = until - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(1.0, left / 2)).close()
            return
        except (socket.gaierror, UnicodeError, OverflowError) as error:
            why = f"the host {host} is unknown" if isinstance(error, socket.gaierror) else str(error)
        except TimeoutError:
            why = "nothing answers there"
        except OSError as error:
            why = error.strerror or str(error)
        if left < 1.0:
            raise ClusterError(
                f"no cluster can be reached at {address}",
                why=why,
                allowed=_ALLOWED,
                remedy=f"{_REMEDY}, and that the head is running and accepts connections from this machine",
            )
        time.sleep(0.5)


def _check_answer(address: str, token: str | None) -> None:
    """Compare the token that the cluster requires with the local one."""
    refused = _refused_tokens(address, token)
    if None in refused and (token is None or token in refused):
        raise ClusterError(
            f"the cluster at {address} requires its token",
            got="none" if token is None else "another token",
            remedy=f"put the cluster's token into {TOKEN_SOURCES}",
        )
    if None not in refused and token is not None:
        raise ClusterError(
            f"the cluster at {address} does not use a token, but this machine has one",
            why="work would wait forever for answers that this machine refuses",
            remedy=f"set RAY_AUTH_MODE=disabled, or remove the token from {TOKEN_SOURCES}; better, start the cluster "
            "with it",
        )


def _refused_tokens(address: str, token: str | None) -> set[str | None]:
    """Which of no token (None) and `token` the cluster refuses; `token` is sent only to a cluster that requires one.
    Raises `ClusterError` if what listens there is not a cluster."""
    import grpc

    channel = _channel(address)
    refused: set[str | None] = set()
    try:
        if _refuses(channel, None):
            refused.add(None)
            if token is not None and _refuses(channel, token):
                refused.add(token)
    except grpc.RpcError as error:
        silent = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        raise ClusterError(
            f"what listens at {address} is not a Ray cluster",
            why=f"it did not answer within {_ANSWER_SECONDS:.0f} s" if silent else "it does not speak Ray's protocol",
            allowed=_ALLOWED,
            remedy=f"{_REMEDY}; 8265 is the port of the Jobs server, for `raytrain submit`",
        ) from None
    finally:
        channel.close()
    return refused


def _refuses(channel: grpc.Channel, token: str | None) -> bool:
    """Whether a cluster refuses a request with this token, or with none."""
    import grpc
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    messages = importlib.import_module("ray.core.generated.gcs_service_pb2")  # generated, without types
    metadata = [("authorization", f"Bearer {token}")] if token else []
    try:
        NodeInfoGcsServiceStub(channel).GetAllNodeInfo(
            messages.GetAllNodeInfoRequest(), timeout=_ANSWER_SECONDS, metadata=metadata
        )
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return True
        raise
    return False


def _channel(address: str) -> grpc.Channel:
    """A channel as Ray creates it, but without the token that Ray would add."""
    import grpc
    from ray._common.tls_utils import load_certs_from_env

    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address)
    chain, key, root = load_certs_from_env()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(root, key, chain))
