"""Tables of the configuration, written as TOML."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from keybroker.config import SOURCES

BELOW = ("source", "auth", "publish", "claude")  # tables with a heading of their own


def toml(value: Any) -> str:
    """Write a value on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml_key(k)} = {toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_key(name: str) -> str:
    bare = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    return name if bare else toml(name)


def table_lines(path: Sequence[str], table: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table's heading and keys, then those of its tables that have their own heading."""
    below = {k: v for k, v in table.items() if k in BELOW and isinstance(v, Mapping)}
    order = list(SOURCES.get(str(table.get("type")), {}))  # as they are documented
    rest = sorted(table, key=lambda k: order.index(k) + 1 if k in order else 0)
    keys = {k: table[k] for k in rest if k not in below}
    if keys or not below:
        yield ""
        yield f"[{'.'.join(map(toml_key, path))}]"
        yield from (f"{toml_key(key)} = {toml(value)}" for key, value in keys.items())
    for key, value in below.items():
        yield from table_lines((*path, key), value)
