"""TOML files that only their owner can write, merged, with the place of every key."""

import os
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keybroker.errors import ConfigError

LARGEST_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Where:
    """Where each key stands: `file:line` by path; the nearest known parent for the rest."""

    known: Mapping[tuple[str, ...], str]
    file: str

    def error(self, path: tuple[str, ...], problem: str) -> ConfigError:
        place = next(
            (self.known[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.known),
            self.file,
        )
        key = ".".join(map(_shown, path))
        return ConfigError(f"{place}: {key}: {problem}" if path else f"{place}: {problem}")


def _shown(name: str) -> str:
    """Return a key's name as an error may say it: a secret may have been pasted in its place."""
    word = re.fullmatch(r"[A-Za-z_-]{1,24}|[a-z0-9][a-z0-9_-]{0,31}", name)
    return "…" if word is None or name.startswith("sk-") else name


@dataclass(frozen=True, slots=True)
class Document:
    """What the files say together. `files` are those that were read, in order."""

    tables: Mapping[str, Any]
    where: Where
    files: tuple[Path, ...]


def read(files: Sequence[Path]) -> Document:
    """
    Read the files that exist, later ones over earlier ones.

    Tables are merged key by key, a profile's `source` as a whole.

    Raises:
        ConfigError: A file cannot be read, may be written by others, or is not TOML; the message
            names file and line.
    """
    tables: dict[str, Any] = {}
    places: dict[tuple[str, ...], str] = {}
    found = []
    for file in files:
        text = _read(file)
        if text is None:
            continue
        found.append(file)
        try:
            document = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # not all of them are TOMLDecodeError
            raise ConfigError(f"{file}:{_toml_problem(error, text)}") from None
        places.update({path: f"{file}:{line}" for path, line in key_lines(text).items()})
        _merge(tables, document)
    return Document(tables, Where(places, str(found[-1] if found else "config")), tuple(found))


def _merge(into: dict[str, Any], document: Mapping[str, Any]) -> None:
    for name, value in document.items():
        old = into.get(name)
        if isinstance(old, dict) and isinstance(value, dict) and name != "source":
            _merge(old, value)
        else:
            into[name] = value


def _read(file: Path) -> str | None:
    """Read a file that nobody else can write; None when there is none."""
    try:
        with open(file, "rb") as opened:
            found = os.fstat(opened.fileno())
            data = opened.read(LARGEST_FILE + 1)
        folder = os.stat(file.parent)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    for path, status in ((file, found), (file.parent, folder)):
        mine = status.st_uid in (0, os.geteuid())
        loose = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
        if not mine or loose:
            command = f"chmod go-w {path}" if mine else f"chown {os.geteuid()} {path}"
            raise ConfigError(f"{path}: others can write it", hint=f"type: {command}")
    if len(data) > LARGEST_FILE:
        raise ConfigError(f"{file}: larger than 1 MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}:{line}: not UTF-8") from None


def _toml_problem(error: Exception, text: str) -> str:
    """Return line and problem, in the parser's words but without the file's text."""
    said = str(error)
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", said, re.S)
    # from the first quote to the last, since what is quoted may have quotes in it
    problem = re.sub(r"""['"].*['"]""", "…", match[1], flags=re.S) if match else "not TOML"
    line = match[2] if match and match[2] else str(text.count("\n") + 1)
    return f"{line}: {problem[:80]}"


_HEADER = re.compile(r"\s*\[\[?([^\[\]#]+)\]\]?\s*(?:#.*)?$")
_PART = re.compile(r"""\s*(?:"([^"\\]*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*(\.|=|$)""")


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """
    Return the line of each key of a valid TOML document, by path.

    tomllib keeps no places. This finds keys that begin a line and table headers, which is all
    that a person writes; a key inside an inline table is found at its parent's line.
    """
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    inside: str | None = None  # the quotes of a multi-line string
    for number, line in enumerate(text.splitlines(), 1):
        if inside is not None:
            if line.count(inside) % 2:
                inside = None
            continue
        header = _HEADER.match(line)
        if header is not None:
            table = _parts(header[1] + "=")
            lines.setdefault(table, number)
        elif (parts := _parts(line)) and not line.lstrip().startswith("#"):
            lines.setdefault((*table, *parts), number)
        for quotes in ('"""', "'''"):
            if line.count(quotes) % 2:
                inside = quotes
    return lines


def _parts(text: str) -> tuple[str, ...]:
    """Read `a."b c".d =` as its parts; nothing when it is not a key."""
    parts: list[str] = []
    at = 0
    while match := _PART.match(text, at):
        parts.append(next(part for part in match.groups()[:3] if part is not None))
        at = match.end()
        if match[4] == "=":
            return tuple(parts)
        if match[4] != ".":
            return ()
    return ()
