"""config: check, schema, show, path."""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import click

from keybroker import aws, paths
from keybroker.cli.base import coloured, for_profile, print_json
from keybroker.cli.work import configuration
from keybroker.config import Profile
from keybroker.credential import Reference
from keybroker.fields import show_duration
from keybroker.schema import schema
from keybroker.signin import read_text
from keybroker.tables import toml
from keybroker.vault import PLACE, Vault

BELOW = ("claude", "source", "publish", "auth")


@click.group("config")
def config_command() -> None:
    """Check, show and describe the configuration."""


@config_command.command("check")
def check() -> None:
    """Say whether the configuration is valid; name file, line and key where it is not.

    Exit status: 0, or 78.
    """
    config = configuration()
    for profile in config.profiles.values():
        for text in profile.warnings:
            print(coloured(f"warning: {text}", "yellow"))
    if not config.profiles:
        config.profile(None)
    files = ", ".join(str(file) for file in config.files)
    count = len(config.profiles)
    print(f"ok: {count} profile{'' if count == 1 else 's'} in {files}")


@config_command.command("schema")
def show_schema() -> None:
    """Print the JSON Schema of the configuration file, for editors."""
    print_json(schema())


@config_command.command("path")
def path() -> None:
    """Print which files are read, later ones over earlier ones, and where the state is kept."""
    for file in paths.config_files(os.environ):
        print(f"{file}{'' if file.exists() else '  (not there)'}")
    print(f"{paths.state_directory(os.environ)}  (state)")


@config_command.command("show")
@for_profile
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(profile: str | None, as_json: bool) -> None:
    """Print what is in force, defaults filled in. References are shown, never what they name."""
    config = configuration()
    chosen = [config.profile(profile)] if profile else list(config.profiles.values())
    document: dict[str, Any] = {
        "default": config.default,
        "cache": {"key": config.cache_key},
        "profiles": {one.name: _plain(one) for one in chosen},
    }
    for one in chosen:
        if one.vault is not None and one.type != "vault":  # for its references
            place = {name: getattr(one.vault, name) for name in PLACE}
            document["vault"] = {**_values(place), "auth": _auth(one.vault)}
        if one.account is not None and one.type != "aws":
            place = {name: getattr(one.account, name) for name in aws.PLACE}
            document["aws"] = _values(place)
    logins = chosen[0].logins if profile else config.logins.values()
    if logins:
        document["logins"] = {
            one.name: _values({"type": one.type, **one.settings}) for one in logins
        }
    if as_json:
        print_json(document)
        return
    if config.default:
        print(f"default = {toml(config.default)}\n")
    print(f"[cache]\nkey = {toml(config.cache_key)}")
    for table in ("vault", "aws"):
        if document.get(table):
            _print_tables(table, document[table])
    for name, values in document.get("logins", {}).items():
        _print_tables(f"logins.{name}", values)
    for name, values in document["profiles"].items():
        _print_tables(f"profiles.{name}", values)


def _plain(profile: Profile) -> dict[str, Any]:
    skipped = ("name", "raw", "type", "source", "vault", "account", "publish")
    values = {k: getattr(profile, k) for k in profile.__slots__ if k not in skipped}
    source = _values({"type": profile.type, **profile.source})
    if profile.type == "vault" and profile.vault is not None:
        source["auth"] = _auth(profile.vault)
    found = {**_values(values), "source": source}
    if profile.publish is not None:
        found["publish"] = _values({"to": profile.publish.to, **profile.publish.settings})
        if profile.publish.vault is not None:
            found["publish"]["auth"] = _auth(profile.publish.vault)
    return found


def _auth(vault: Vault) -> dict[str, Any]:
    return _values({"method": vault.method, **vault.auth})


def _values(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: _value(v) for k, v in values.items() if v is not None and v not in ({}, ())}
    if isinstance(values.get("login"), Reference):  # which is named without a table of its own
        found["login"] = found["login"]["login"]
    return found


def _value(value: Any) -> Any:
    if isinstance(value, timedelta):
        return show_duration(value)
    if isinstance(value, Reference):
        found = read_text(str(value.value)).name if value.kind == "login" else value.value
        return {value.kind: found if isinstance(found, str) else list(found)}
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _print_tables(name: str, values: Mapping[str, Any]) -> None:
    """Print a table, and below it those of its parts that have a heading of their own."""
    below = {key: value for key, value in values.items() if key in BELOW}
    print(f"\n[{name}]")
    for key, value in values.items():
        if key not in below:
            print(f"{key} = {toml(value)}")
    for key, value in below.items():
        _print_tables(f"{name}.{key}", value)
