"""Secrets stay in the process: everything written, printed or sent to MLflow goes through `redacted` first.

It hides the user and password of a URL, query parameters that sign or authorize, and the values of environment
variables whose names mark them as secret:

    >>> redacted({"uri": "https://ann:pw@mlflow.example/a?page=2&token=abc"})
    {'uri': 'https://***@mlflow.example/a?page=2&token=***'}

Settings never hold credentials: those of `tracking.uri` move to $RAYTRAIN_TRACKING_URI when it is read, and
`with_credentials` puts them back at the last moment; any other setting refuses them.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

T = TypeVar("T")
HIDDEN = "***"
TRACKING_VARIABLE = "RAYTRAIN_TRACKING_URI"
MLFLOW_VARIABLE = "MLFLOW_TRACKING_URI"
_SHORTEST = 8  # characters of a variable's value; shorter ones would hide parts of ordinary words

_PART = r"[^\s/?#\"'<>]"
_USERINFO = re.compile(
    r"(\b[A-Za-z][A-Za-z0-9+.-]{0,30}://)(?:"
    rf"{_PART}*:{_PART}*"  # user:password
    r"|[^\s/@:\[\"'<>]+:(?!\d*(?:[/?#]|$))[^\s@\"'<>]*"  # a password with a bare slash; host:80/ is not one
    r"|(?<=https://)[^\s/?#@\"'<>]+|(?<=http://)[^\s/?#@\"'<>]+"  # a token alone; hdfs://user@host is a user's name
    r")@"
)
_QUERY = re.compile(
    r"([?&;][\w.-]{0,40}(?:secret|secret[_-]?key|token|password|passwd|pwd|access[_-]?key(?:[_-]?id)?|api[_-]?key"
    r"|signature|credentials?|sig|auth)=)[^&;#\s\"'<>]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic)\s+)[\w.~+/=-]+", re.IGNORECASE)
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:SECRETS?|TOKENS?|PASSWORDS?|PASSWD|PASSPHRASE|PASS|CREDENTIALS?|CONNECTION_STRING|PAT|APIKEY|SECRETKEY|(?:ACCESS_?)?KEY(?:_ID)?)(?:_|$)"
    r"|_PWD$",
    re.IGNORECASE,
)
# GOOGLE_APPLICATION_CREDENTIALS and the like name a file.
_NAMES_A_LOCATION = re.compile(
    r"(?:_PATH|_FILE|_DIR|_URL|_URI|_ENDPOINT|_EXPIRATION|_MODE|_TYPE)$|^GOOGLE_APPLICATION_CREDENTIALS$", re.IGNORECASE
)


def redacted(value: T) -> T:
    """The same text, or nested lists and dicts, with secrets replaced by `***`; other values as they are."""
    return _redacted(value, _secret_values(), {})


def _redacted(value: Any, secrets: list[str], done: dict[int, object]) -> Any:
    if isinstance(value, str):
        return _text(value, secrets)
    if not isinstance(value, dict) and type(value) not in (list, tuple):
        return value
    # YAML aliases make one value appear in many places.
    if id(value) not in done:
        if isinstance(value, dict):
            done[id(value)] = {key: _redacted(item, secrets, done) for key, item in value.items()}
        else:
            done[id(value)] = type(value)(_redacted(item, secrets, done) for item in value)
    return done[id(value)]


def without_credentials(text: str) -> str:
    """The text with the credentials of its URLs hidden; idempotent."""
    text = _USERINFO.sub(rf"\g<1>{HIDDEN}@", text)
    return _QUERY.sub(rf"\g<1>{HIDDEN}", text)


def holds_credentials(text: str) -> bool:
    """Whether a URL in the text has credentials."""
    return without_credentials(text) != text


def with_credentials(uri: str) -> str:
    """A tracking address with the credentials that were hidden in it.

    They come from $RAYTRAIN_TRACKING_URI or $MLFLOW_TRACKING_URI if that is the same address. Otherwise there are none,
    and MLflow uses MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
    """
    for name in (TRACKING_VARIABLE, MLFLOW_VARIABLE):
        full = os.environ.get(name, "")
        if full and without_credentials(full) == uri:
            return full
    return uri.replace(f"//{HIDDEN}@", "//")


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable holds a secret, judging by its name or value."""
    return holds_credentials(value) or bool(_SECRET_NAME.search(name) and not _NAMES_A_LOCATION.search(name))


def guard_output() -> None:
    """From now on, redact tracebacks and log records of this process too."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))

    def make_record(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = logging.LogRecord(*arguments, **options)
        if record.name.startswith("raytrain"):
            record.msg, record.args = redacted(record.getMessage()), ()
        return record

    sys.excepthook = hook
    logging.setLogRecordFactory(make_record)


def _text(text: str, secrets: list[str]) -> str:
    for value in secrets:
        text = text.replace(value, HIDDEN)
    return _HEADER.sub(rf"\g<1>{HIDDEN}", without_credentials(text))


def _secret_values() -> list[str]:
    """Values of secret variables, as they are and as a URL spells them; the longest first, since one may contain
    another."""
    values = set()
    for name in list(os.environ):  # another thread may remove a variable
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST and is_secret(name, ""):
            values |= {value, quote(value, safe="")}
    return sorted(values, key=lambda value: (-len(value), value))
