"""TOML files that only their owner can write, merged, with the place of every key."""

import gc
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keybroker.errors import ConfigError
from keybroker.values import dataclass

LARGEST_FILE = 1 << 20
WHOLE = ("source", "publish")  # tables whose keys belong together


@dataclass(frozen=True, slots=True)
class Where:
    """Where each key stands: `file:line` by path; for the rest, what is in it or around it."""

    known: Mapping[tuple[str, ...], str]
    file: str

    def error(self, path: tuple[str, ...], problem: str) -> ConfigError:
        within = [known for known in self.known if path and known[: len(path)] == path]
        above = [path[:n] for n in range(len(path), 0, -1) if path[:n] in self.known]
        nearest = above if path in self.known else within + above
        place = next((self.known[found] for found in nearest), self.file)
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


def read(files: Sequence[Path], drafts: Mapping[Path, str] | None = None) -> Document:
    """
    Read the files that exist, later ones over earlier ones.

    Tables are merged key by key, a profile's `source` and `publish` as a whole.

    Args:
        files: Those that may be there.
        drafts: What some of them are about to be.

    Raises:
        ConfigError: A file cannot be read, may be written by others, or is not TOML; the message
            names file and line.
    """
    seen, known = _ahead.pop(tuple(files), (None, None))
    if known is not None and seen == states(files):
        return known
    tables: dict[str, Any] = {}
    places: dict[tuple[str, ...], str] = {}
    found = []
    for file in files:
        text = _read(file) if drafts is None or file not in drafts else drafts[file]
        if text is None:
            continue
        found.append(file)
        try:
            document = _load(text)
        except (ValueError, RecursionError) as error:  # not all of them are TOMLDecodeError
            raise ConfigError(f"{file}:{_toml_problem(error, text)}") from None
        for gone in _merge(tables, document):
            places = {k: place for k, place in places.items() if k[: len(gone)] != gone}
        places.update({path: f"{file}:{line}" for path, line in key_lines(text).items()})
    return Document(tables, Where(places, str(found[-1] if found else "config")), tuple(found))


State = tuple[int, int, int] | None
_ahead: dict[tuple[Path, ...], tuple[dict[Path, State], Document]] = {}


def read_ahead(files: Sequence[Path]) -> None:
    """
    Read what `read` will be asked for once more, and give back what that took.

    A process that stays does so before it loads the rest, which then has the room.

    Raises:
        ConfigError: As `read`.
    """
    seen = states(files)
    _ahead[tuple(files)] = seen, read(files)
    forget_reader()


def states(files: Iterable[Path]) -> dict[Path, State]:
    """Return by what each file would be another: None for one that is not there."""
    found: dict[Path, State] = {}
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            found[file] = None
        else:
            found[file] = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return found


def forget_reader() -> None:
    """Give back what reading took: a process that stays reads seldom."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tomllib"]:
        del sys.modules[name]
    if forget := getattr(sys.modules.get("typing"), "forget", None):
        forget()  # a daemon has another one for itself
    re.purge()
    gc.collect()


def _load(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)


def _merge(into: dict[str, Any], document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Put a later document over an earlier one; return the paths of what it replaced."""
    replaced: list[tuple[str, ...]] = []
    for name, value in document.items():
        old = into.get(name)
        if isinstance(old, dict) and isinstance(value, dict) and name not in WHOLE:
            replaced += [(name, *path) for path in _merge(old, value)]
        else:
            replaced += [(name,)] if name in into else []
            into[name] = value
    return replaced


def _not_waiting(path: str, flags: int) -> int:
    """Open a pipe too without waiting for who writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read(file: Path) -> str | None:
    """Read a file that nobody else can write; None when there is none."""
    try:
        with open(file, "rb", opener=_not_waiting) as opened:
            found = os.fstat(opened.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"{file}: is not a file")
            data = opened.read(LARGEST_FILE + 1)
        folder = os.stat(file.parent)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    for path, status in ((file, found), (file.parent, folder)):
        mine = status.st_uid in (0, os.geteuid())
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        loose = status.st_mode & 0o022 and not sticky
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


# Strings and comments, in which brackets, equals signs and line ends mean nothing.
_QUOTED = re.compile(
    r'"{3}(?:\\.|[^\\])*?"{3,5}|\'{3}.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL
)


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """
    Return the line of each key of a valid TOML document, by path.

    tomllib keeps no places. This finds keys that begin a line and table headers, which is all
    that a person writes; a key inside an inline table is found at its parent's line.
    """
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    number, start, depth = 1, 0, 0  # depth: of arrays and inline tables that go on
    for line in _QUOTED.sub(_masked, text).split("\n"):
        if depth == 0 and line.lstrip().startswith("["):
            inner = text[start : start + line.index("]")].lstrip(" \t[")
            table = _path(inner)
            lines.setdefault(table, number)
        elif depth == 0 and "=" in line:
            path = _path(text[start : start + line.index("=")])
            lines.setdefault((*table, *path), number)
        depth += len(re.findall(r"[\[{]", line)) - len(re.findall(r"[\]}]", line))
        number += 1 + line.count("\0")
        start += len(line) + 1
    return lines


def _masked(quoted: re.Match[str]) -> str:
    """Return as many letters as a string has; its line ends are kept apart from real ones."""
    return re.sub(r"[^\n]", "x", quoted[0]).replace("\n", "\0")


def _path(key: str) -> tuple[str, ...]:
    """Read `a."b c".d` as its parts."""
    found: Any = _load(f"{key} = 0")
    parts = []
    while isinstance(found, dict):
        [(part, found)] = found.items()
        parts.append(part)
    return tuple(parts)
