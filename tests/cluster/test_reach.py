"""A cluster that can't be joined is reported quickly, with the reason: no host, no listener, no Ray, no token."""

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest
from conftest import free_port

from raytrain.cluster import reach
from raytrain.errors import ClusterError

TOKEN = "ab" * 32


@contextlib.contextmanager
def cluster(token: str | None):
    """What answers as a GCS does, and refuses who shows another token."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            shown = dict(details.invocation_metadata).get("authorization")

            def answer(request, context):
                if token is not None and shown != f"Bearer {token}":
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(reach, "_TRY_SECONDS", 1.0)
    monkeypatch.setattr(reach, "_ANSWER_SECONDS", 1.0)


def refusal(address: str, token: str | None = None) -> str:
    with pytest.raises(ClusterError) as error:
        reach.check_cluster(address, token)
    assert error.value.remedy
    return str(error.value)


def test_nobody_there():
    assert "refused" in refusal(f"127.0.0.1:{free_port()}")
    assert "the host host.invalid is unknown" in refusal("host.invalid:6379")
    for address in ("host", "127.0.0.1:99999", "ray://127.0.0.1:10001", ":6379", "a b:1"):
        assert "cluster" in refusal(address)


def test_somebody_else_there():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        message = refusal(f"127.0.0.1:{silent.getsockname()[1]}")
        assert "is not a Ray cluster" in message and "did not answer within 1 s" in message
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    message = refusal(f"127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    server.server_close()
    assert "does not speak Ray's protocol" in message and "8265 is the port of the Jobs server" in message


def test_tokens_on_one_side_only():
    with cluster(None) as address:
        reach.check_cluster(address, None)
        assert "does not use a token, but this machine has one" in refusal(address, TOKEN)
    with cluster(TOKEN) as address:
        reach.check_cluster(address, TOKEN)
        assert "requires its token; got none" in refusal(address)
        assert "got another token" in refusal(address, "00" * 32)
