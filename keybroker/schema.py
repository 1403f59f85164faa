"""The JSON Schema of the configuration file, built from the tables that read it."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from keybroker import aws
from keybroker.config import CACHE, CLAUDE, GENERAL, HOOKS, PROFILE, PUBLISH, SERVICE, SOURCES
from keybroker.fields import NAME, Field, show_duration
from keybroker.login_types import LOGINS
from keybroker.vault import AUTH, PLACE


def schema() -> dict[str, Any]:
    """Return it."""
    base = _object(PROFILE)
    vault = _object(PLACE)
    vault["properties"]["auth"] = {"oneOf": [_named("method", *one) for one in AUTH.items()]}
    properties = {**base["properties"], "claude": _object(CLAUDE)}
    for table, key, kinds in (("source", "type", SOURCES), ("publish", "to", PUBLISH)):
        one_of_them = [_named(key, *one) for one in kinds.items()]
        for one in one_of_them:
            if one["properties"][key] == {"const": "vault"}:
                one["properties"]["auth"] = vault["properties"]["auth"]
        properties[table] = {"oneOf": one_of_them}
    profile = {
        **base,
        "properties": properties,
        "required": ["source"],  # base_url may stand in [defaults]
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "keybroker configuration",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **_object(GENERAL)["properties"],
            "cache": _object(CACHE),
            "hooks": _object(HOOKS),
            "service": _object(SERVICE),
            "vault": vault,
            "aws": _object(aws.PLACE),
            "logins": {
                "type": "object",
                "propertyNames": {"pattern": f"^{NAME.pattern}$"},
                "additionalProperties": {"oneOf": [_named("type", *one) for one in LOGINS.items()]},
            },
            "defaults": {
                **{k: v for k, v in base.items() if k != "required"},
                "properties": {**base["properties"], "claude": _object(CLAUDE)},
            },
            "profiles": {
                "type": "object",
                "propertyNames": {"pattern": f"^{NAME.pattern}$"},
                "additionalProperties": profile,
            },
        },
    }


def _named(key: str, name: str, fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the schema of a table whose key has a name, which says what else is in it."""
    one = _object(fields)
    return {
        **one,
        "properties": {key: {"const": name}, **one["properties"]},
        "required": [key, *one.get("required", [])],
    }


def _object(fields: Mapping[str, Field]) -> dict[str, Any]:
    properties = {}
    for name, one in fields.items():
        properties[name] = {**one.kind.schema, "description": one.doc}
        if isinstance(one.default, str | bool | int | float):
            properties[name]["default"] = one.default
        elif isinstance(one.default, timedelta):
            properties[name]["default"] = show_duration(one.default)
    required = [name for name, one in fields.items() if one.required]
    table: dict[str, Any] = {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
    return {**table, "required": required} if required else table
