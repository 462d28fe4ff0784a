"""Ray's token authentication: on whenever raytrain starts Ray, and on for a remote cluster whenever a token is found.

The token comes from the sources that Ray uses: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token. RAY_AUTH_MODE,
if set, takes precedence: `disabled` turns authentication off.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
from collections.abc import Iterator
from types import ModuleType

from raytrain.errors import ClusterError

_LOG = logging.getLogger("raytrain.cluster")
_MODE, _TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
TOKEN_SOURCES = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
NO_AUTHENTICATION = (
    "%s requires no token: anyone who can reach its ports can run code as its user (CVE-2023-48022); start Ray with "
    "RAY_AUTH_MODE=token"
)
_warned: set[str] = set()


@contextlib.contextmanager
def token_authentication(local: bool) -> Iterator[bool]:
    """Context in which Ray can be started (`local`) or joined; yields whether a token is used.

    If no token is configured, a local Ray gets a random one known only to this process and its children. Ray itself
    would write one to the home folder, where other users may be able to read it.
    """
    before = {name: os.environ.get(name) for name in (_MODE, _TOKEN)}
    mode = (before[_MODE] or "").lower()
    if not mode and (local or has_token()):
        os.environ[_MODE] = mode = "token"
    if mode == "token" and local and not has_token():
        os.environ[_TOKEN] = secrets.token_hex(32)
    refresh()
    try:
        yield mode == "token"
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
        refresh()


def has_token() -> bool:
    """Whether there is a token. Raises `ClusterError` if RAY_AUTH_TOKEN_PATH does not name a token file."""
    from ray.exceptions import AuthenticationError

    try:
        return bool(_raylet().AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))
    except AuthenticationError as error:
        raise ClusterError(
            "Ray's token can't be read",
            why=error.message,
            remedy="set RAY_AUTH_TOKEN_PATH to the file with the cluster's token, or unset it",
        ) from None


def token() -> str | None:
    """The token, or None."""
    return _raylet().AuthenticationTokenLoader.instance().get_raw_token(ignore_auth_mode=True) if has_token() else None


def token_header() -> dict[str, str]:
    """The HTTP header with the token; empty if there is no token."""
    secret = token()
    return {"Authorization": f"Bearer {secret}"} if secret else {}


def auth_mode() -> str:
    """This process's authentication mode for Ray: `token` or `disabled`."""
    from ray._private.authentication.authentication_utils import get_authentication_mode_name

    return get_authentication_mode_name(_raylet().get_authentication_mode())


def warn_once(server: str) -> None:
    """Warn about a cluster that does not require a token."""
    if server not in _warned:
        _warned.add(server)
        _LOG.warning(NO_AUTHENTICATION, server)


def refresh() -> None:
    """Ray caches both variables; make it read them again."""
    raylet = _raylet()
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    raylet.Config.initialize("")


def _raylet() -> ModuleType:
    """Ray's compiled module; its type stubs lack the members used here."""
    return importlib.import_module("ray._raylet")
