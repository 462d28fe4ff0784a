"""YAML from a user or an archive: plain values only, of bounded size, nesting and repetition, and no duplicate keys.

    load_yaml(b"train: {max_steps: 100}")      # {"train": {"max_steps": 100}}
    load_yaml(b"a: 1\\na: 2")                   # raises ValueError: … the key 'a' appears twice

A few aliases can expand to more values than fit into memory, and each pass over the settings would visit all of them,
so each use of an alias counts.
"""

from __future__ import annotations

import os
import re
import typing
from pathlib import Path
from typing import Any

if typing.TYPE_CHECKING:
    import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_VALUES = 50_000
MAX_REPEATED = 10_000  # values that aliases expand to
_MAX_NUMBER = 100  # characters; those to base 60 (1:30) take time that grows with their square
_NUMBER = re.compile(r"[-+0-9][-+0-9_:.]*")


def read_yaml(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The values of a file. Raises `OSError` if it can't be read, and otherwise what `load_yaml` raises."""
    # Opened without blocking, a pipe without a writer is an empty file.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        os.set_blocking(file.fileno(), True)
        return load_yaml(file.read(max_bytes + 1), max_bytes)


def load_yaml(data: bytes | str, max_bytes: int = MAX_BYTES) -> Any:
    """Plain values of YAML in UTF-8, None if it is empty. Raises `ValueError` with the reason."""
    import yaml

    data = data if isinstance(data, bytes) else data.encode(errors="surrogatepass")
    if len(data) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # written in C, which not every platform has
    try:
        _check_size(yaml.parse(text, loader))
        _check_keys(yaml.compose(text, loader))
        return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    # Tags whose text does not fit them (!!bool x) raise all sorts of errors inside PyYAML.
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError("a value does not fit its tag (!!…)") from error


def _check_size(events: typing.Iterable[yaml.Event]) -> None:
    """Raise `ValueError` where values are nested too deeply, or repeated too often, with aliases followed.

    Works on events, which needs no recursion.
    """
    import yaml

    measured: dict[str, tuple[int, int]] = {}  # values and depth of each anchor
    open_collections: list[list[Any]] = []  # anchor, values and depth so far
    repeated = number = 0
    for event in events:
        number += isinstance(event, yaml.NodeEvent)
        if number > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES} values")
        if isinstance(event, yaml.CollectionStartEvent):
            open_collections.append([event.anchor, 1, 1])
            measured.pop(event.anchor, None)
            values, depth = 0, 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values, depth = open_collections.pop()
            if anchor is not None:
                measured[anchor] = values, depth
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > _MAX_NUMBER and _NUMBER.fullmatch(event.value) and event.implicit[0]:
                raise ValueError(f"line {event.start_mark.line + 1}: the number has more than {_MAX_NUMBER} characters")
            values, depth = 1, 0
            if event.anchor is not None:
                measured[event.anchor] = values, depth
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in measured:
                raise ValueError(f"the alias *{event.anchor} has no value yet, or holds itself")
            values, depth = measured[event.anchor]
            repeated += values
            if repeated > MAX_REPEATED:
                raise ValueError(f"its aliases expand to more than {MAX_REPEATED} values")
        else:
            continue
        if len(open_collections) + depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if open_collections:
            parent = open_collections[-1]
            parent[1], parent[2] = parent[1] + values, max(parent[2], depth + 1)


def _check_keys(root: yaml.Node | None) -> None:
    """Raise `ValueError` if a mapping has a duplicate key: one of its values would be lost silently."""
    import yaml

    waiting, seen = [root] if root is not None else [], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key, value in node.value:
                waiting += [key, value]
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in keys:
                        line = key.start_mark.line + 1
                        raise ValueError(f"line {line}: the key {key.value!r} appears twice")
                    keys.add((key.tag, key.value))
