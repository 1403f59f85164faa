"""The tables that `init` adds to a configuration: built key by key, appended, checked, written.

draft = Draft("work")
draft.put(("profiles", "work", "base_url"), "https://llm.example.com")
draft.assign("source.lifetime=8h")
"""

import os
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keybroker import aws, paths
from keybroker.cli.table import with_keys
from keybroker.config import (
    CACHE,
    CLAUDE,
    PROFILE,
    PUBLISH,
    SOURCES,
    Config,
    Profile,
    load,
)
from keybroker.document import Document, read
from keybroker.errors import ConfigError
from keybroker.fields import NAME, REFERENCES, Field
from keybroker.tables import table_lines, toml
from keybroker.values import replace
from keybroker.vault import AUTH, PLACE

TOP = ("cache", "vault", "aws")  # tables beside the profiles
_PART = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Draft:
    """
    What is to be added.

    Args:
        profile: Its name.
        vault_in_source: The file has a [vault] for another server: this one stands in the source.
    """

    def __init__(self, profile: str, *, vault_in_source: bool = False) -> None:
        self.profile = profile
        self.tables: dict[str, Any] = {}
        self.own = ("profiles", profile)
        self.vault = (*self.own, "source") if vault_in_source else ("vault",)

    def put(self, path: Sequence[str], value: Any) -> None:
        """Set one key; tables on the way are made."""
        table = self.tables
        for part in path[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"init: {'.'.join(path)}: {part} is no table")
        table[path[-1]] = value

    def get(self, path: Sequence[str]) -> Any:
        """Return what was set; None where nothing was."""
        found: Any = self.tables
        for part in path:
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def source(self, key: str, value: Any) -> None:
        self.put((*self.own, "source", key), value)

    def assign(self, text: str) -> None:
        """
        Set one key as `--set` has it: source.lifetime=8h, vault.address=…, cache.key=file.

        Raises:
            ConfigError: It is not of that form. Whether key and value are right is checked with
                the rest.
        """
        name, equals, value = text.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(_PART.fullmatch(part) for part in parts):
            raise ConfigError(
                "--set: expected a key and a value", hint="such as --set source.lifetime=8h"
            )
        path = self._place(parts)
        self.put(path, _value(value.strip(), self._field(path)))

    def text(self) -> str:
        """Write the tables as TOML."""
        lines: list[str] = []
        for name in TOP:
            if name in self.tables:
                lines += table_lines((name,), self.tables[name])
        lines += table_lines(self.own, self.get(self.own) or {})
        return "\n".join(lines[1:]) + "\n"

    def _place(self, parts: list[str]) -> tuple[str, ...]:
        if parts[0] == "vault":
            return (*self.vault, *parts[1:])
        return tuple(parts) if parts[0] in TOP else (*self.own, *parts)

    def _field(self, path: tuple[str, ...]) -> Field | None:
        """Return what is known of a key; None: the check of the whole says what is wrong."""
        name, inner = path[-1], path[-2] if len(path) > 1 else ""
        own = path[: len(self.own)] == self.own
        if inner == "auth":
            method = self.get((*path[:-1], "method"))
            return AUTH.get(str(method), {}).get(name)
        if own and inner == "source":
            kind = str(self.get((*path[:-1], "type")))
            return SOURCES.get(kind, {}).get(name)
        if own and inner == "publish":
            return PUBLISH.get(str(self.get((*path[:-1], "to"))), {}).get(name)
        fields: Mapping[str, Field] = {"claude": CLAUDE, "vault": PLACE, "aws": aws.PLACE}.get(
            inner, CACHE if inner == "cache" else PROFILE if len(path) == len(self.own) + 1 else {}
        )
        return fields.get(name)


def _value(text: str, known: Field | None) -> Any:
    """Read a value as its key wants it: as it is, as TOML has it, as a reference, or a list."""
    if known is None:
        found = _toml_value(text)
        return text if found is None else found
    candidates = [text, _toml_value(text), reference_or_none(text), text.split(",")]
    for one in candidates:
        if one is None:
            continue
        try:
            known.kind.read(one)
        except ValueError:
            continue
        return one
    return text


def _toml_value(text: str) -> Any:
    try:
        found = tomllib.loads(f"x = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return None
    return found["x"] if list(found) == ["x"] else None


def reference_or_none(text: str) -> dict[str, Any] | None:
    """Read `keyring:NAME`, `file:PATH`, `command:PROGRAM ARGUMENT` and the like, as TOML has it."""
    kind, colon, value = text.partition(":")
    if not colon or kind not in REFERENCES or not value:
        return None
    if kind == "command":
        try:
            return {kind: shlex.split(value)}
        except ValueError:
            return None
    if kind == "file" and not value.startswith(("/", "~/")):
        value = os.path.abspath(value)
    return {kind: value}


def reference(text: str, flag: str) -> dict[str, Any]:
    """
    Read a reference that must be one.

    Raises:
        ConfigError: It is none. It is not repeated: it may be the secret itself.
    """
    found = reference_or_none(text)
    if found is None:
        raise ConfigError(
            f"{flag}: expected keyring:NAME, file:PATH, env:NAME, command:PROGRAM, "
            "vault:PATH#FIELD or aws:NAME",
            hint=f"the key itself is never an argument; {flag} - reads it from stdin",
        )
    return found


@dataclass(frozen=True, slots=True)
class File:
    """
    The user's configuration file as it was found.

    Attributes:
        path: What is written: where a link leads.
        data: Its bytes; None where there is none.
        document: All files together.
        tables: What this file itself has at its top.
        config: All files together, checked.
    """

    files: tuple[Path, ...]
    path: Path
    data: bytes | None
    document: Document
    tables: frozenset[str]
    config: Config

    @classmethod
    def find(cls, environment: Mapping[str, str]) -> "File":
        """
        Read the configuration that there is.

        Raises:
            ConfigError: It is wrong: it is mended before anything is added.
        """
        files = paths.config_files(environment)
        config = load(files, environment)
        document = read(files)
        own = read(files[-1:])
        path = Path(os.path.realpath(files[-1]))
        try:
            data = paths.Disk().read(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        return cls(files, path, data, document, frozenset(own.tables), config)

    def refuse_known(self, profile: str) -> None:
        """
        Refuse a name that cannot be used.

        Raises:
            ConfigError: It is no name, or there is a profile of it; file and line are named.
        """
        if not NAME.fullmatch(profile):
            raise ConfigError(
                "--profile: expected lower-case letters, digits, - and _, at most 32",
                hint="such as --profile work",
            )
        if profile in self.config.profiles:
            error = self.document.where.error(("profiles", profile), "is there already")
            raise ConfigError(error.message, hint=f"--profile {_free(profile, self.config)}")

    def refuse_tables(self, draft: Draft) -> None:
        """
        Refuse to add a table that the file has already: TOML allows it once.

        Raises:
            ConfigError: There is one; file and line are named.
        """
        for name in TOP:
            if name in draft.tables and name in self.tables:
                raise self.document.where.error(
                    (name,), "is there already; set the key there, or leave it out here"
                )

    def added(self, text: str) -> bytes:
        """Return what the file is with the new tables at its end, every byte before as it was."""
        before = self.data or b""
        newline = b"\r\n" if b"\r\n" in before else b"\n"
        start = b"" if not before else newline if before.endswith(b"\n") else newline * 2
        return before + start + text.encode().replace(b"\n", newline)

    def with_claude(
        self, profile: Profile, values: Mapping[str, str], environment: Mapping[str, str]
    ) -> bytes:
        """
        Return what the file is with some texts in a profile's table `claude`.

        Raises:
            ConfigError: The table is written in a way that is not edited.
        """
        path = ("profiles", profile.name, "claude")
        text = with_keys((self.data or b"").decode(), path, values)
        known = dict(self.config.profiles)
        try:
            found = dict(load(self.files, environment, {self.files[-1]: text}).profiles)
            now = found.pop(profile.name)
        except (ConfigError, KeyError):
            now = None
        before = known.pop(profile.name)
        wanted = {**before.claude, **values}
        if now is None or found != known or now != replace(before, claude=wanted, raw=now.raw):
            lines = "; ".join(f"{key} = {toml(value)}" for key, value in values.items())
            raise ConfigError(
                f"{self.path}: {'.'.join(path)} is not written as a table of its own",
                hint=f"write into it: {lines}",
            )
        return text.encode()

    def checked(self, text: str, environment: Mapping[str, str]) -> Config:
        """
        Return the configuration as it would be, checked by the rules of any other.

        Raises:
            ConfigError: What is wrong with what was given.
        """
        draft = self.added(text).decode()
        try:
            return load(self.files, environment, {self.files[-1]: draft})
        except ConfigError as error:
            place = re.match(rf"{re.escape(str(self.files[-1]))}(?::[0-9]+)?: ", error.message)
            message = error.message[place.end() :] if place else error.message
            raise ConfigError(f"init: {message}", hint=error.hint) from None

    def write(self, text: str) -> None:
        """
        Put the file in place with the new tables. See `put`.

        Raises:
            ConfigError: It was changed meanwhile, or cannot be written.
        """
        self.put(self.added(text))

    def put(self, data: bytes) -> None:
        """
        Put a new file in place at once.

        Raises:
            ConfigError: It was changed meanwhile, or cannot be written.
        """
        disk = paths.Disk()
        try:
            if self.data is None:
                self.path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.path.parent.mkdir(mode=0o700, exist_ok=True)
            if disk.read(self.path) != self.data:
                raise ConfigError(
                    f"{self.path}: was changed meanwhile; nothing was written",
                    hint="type it again",
                )
            disk.replace(self.path, data)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror})") from None


def _free(profile: str, config: Config) -> str:
    names = (f"{profile[:29]}-{number}" for number in range(2, 100))
    return next(name for name in names if name not in config.profiles)
