"""Look who answers at a cluster's address before Ray does: Ray tries for many minutes without a word, and a token that
only one side has lets Ray Data wait for ever."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from typing import Any

from raytrain.cluster.authentication import PLACES
from raytrain.errors import ClusterError
from raytrain.redaction import without_credentials

_TRY_SECONDS = 5.0
_ANSWER_SECONDS = 20.0
_ADDRESS = re.compile(r"\[?([\w.:%-]+?)\]?:(\d+)")
_ALLOWED = "HOST:6379, as `ray start --head` prints it, or auto on a node of the cluster"
_REMEDY = "check cluster.address and RAY_ADDRESS (without both Ray is started here)"


def check_cluster(address: str, token: str | None) -> None:
    """Raises `ClusterError`, within half a minute, where no cluster can be joined at `address` with `token`."""
    if address == "auto":
        address = _running()
    match = _ADDRESS.fullmatch(address)
    if match is None:
        shown = without_credentials(address)
        raise ClusterError(
            "this is no address of a cluster",
            got=repr(shown if "://" in shown else re.sub(r".*@", "***@", shown, flags=re.DOTALL)),
            allowed=_ALLOWED,
            remedy=_REMEDY,
        )
    _check_port(address, match[1], int(match[2]))
    _check_answer(address, token)


def _running() -> str:
    from ray._private.services import get_ray_address_from_environment

    found = None
    with contextlib.suppress(ConnectionError):
        found = get_ray_address_from_environment("auto", None)
    if not found:
        raise ClusterError("no cluster runs on this machine", got="the address auto", allowed=_ALLOWED, remedy=_REMEDY)
    return found


def _check_port(address: str, host: str, port: int) -> None:
    """Try for some seconds: a head that is being started listens soon."""
    until = time.monotonic() + _TRY_SECONDS
    while True:
        left = until - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(1.0, left / 2)).close()
            return
        except (socket.gaierror, UnicodeError, OverflowError) as error:
            why = f"{host} is not known" if isinstance(error, socket.gaierror) else str(error)
        except TimeoutError:
            why = "nothing answers there"
        except OSError as error:
            why = error.strerror or str(error)
        if left < 1.0:
            raise ClusterError(
                f"no cluster can be reached at {address}",
                why=why,
                allowed=_ALLOWED,
                remedy=f"{_REMEDY}, and that the head runs and lets this machine through",
            )
        time.sleep(0.5)


def _check_answer(address: str, token: str | None) -> None:
    import grpc
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    def refuses(shown: str | None) -> bool:
        """Whether the cluster refuses whoever shows this token, or none."""
        metadata = [("authorization", f"Bearer {shown}")] if shown else []
        try:
            stub.GetAllNodeInfo(messages.GetAllNodeInfoRequest(), timeout=_ANSWER_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return True
            raise
        return False

    channel = _channel(address)
    try:
        stub = NodeInfoGcsServiceStub(channel)
        asks = refuses(None)
        is_wrong = asks and token is not None and refuses(token)
    except grpc.RpcError as error:
        silent = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        raise ClusterError(
            f"what listens at {address} is no Ray cluster",
            why=f"it did not answer within {_ANSWER_SECONDS:.0f} s" if silent else "it does not speak Ray's protocol",
            allowed=_ALLOWED,
            remedy=f"{_REMEDY}; 8265 is the port of the Jobs server, which takes `raytrain submit`",
        ) from None
    finally:
        channel.close()
    if asks and (token is None or is_wrong):
        raise ClusterError(
            f"the cluster at {address} asks for its token",
            got="another token" if is_wrong else "none",
            remedy=f"put the token that the cluster was started with into {PLACES}",
        )
    if not asks and token is not None:
        raise ClusterError(
            f"the cluster at {address} asks for no token, but there is one here",
            why="work would wait for ever for answers that this side refuses",
            remedy=f"set RAY_AUTH_MODE=disabled, or take the token out of {PLACES}; better, start the cluster with it",
        )


def _channel(address: str) -> Any:
    """As Ray makes one, but without a token of its own accord."""
    import grpc
    from ray._private.grpc_utils import load_certs_from_env

    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address)
    chain, key, root = load_certs_from_env()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(root, key, chain))
