"""Keys that somebody pasted where Claude Code finds them: where they are, and taking one out.

    /home/jo/.bashrc:12: export ANTHROPIC_AUTH_TOKEN='…'     one line, and nothing else: it can go

A value is a `Secret` as soon as it was read. It is in no message and in no copy of the file.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from keybroker.connect import files
from keybroker.connect.edit import TRIES
from keybroker.credential import Secret, sha256
from keybroker.errors import ConfigError
from keybroker.settings import Document, SettingsInvalid

TOKEN = "ANTHROPIC_AUTH_TOKEN"  # noqa: S105
VARIABLES = (TOKEN, "ANTHROPIC_API_KEY")
LARGEST_FILE = 1 << 20
# Below the user's folder. PowerShell has its profiles here on Linux and macOS.
SHELLS = (
    *(".bashrc", ".bash_profile", ".profile", ".zshrc", ".zshenv", ".zprofile"),
    ".config/fish/config.fish",
    ".config/powershell/profile.ps1",
    ".config/powershell/Microsoft.PowerShell_profile.ps1",
)
_NAMES = "|".join(VARIABLES)
_VALUE = r"[^\s;'\"]*|'[^']*'|\"[^\"]*\""
# Any mention that sets one of them; and, more narrowly, a line that does nothing else.
_SETS = re.compile(
    rf"(?<![\w$])(?:\$env:)?({_NAMES})\s*=|\bset\s+(?:-\w+\s+|--\w+\s+)*({_NAMES})\s", re.I
)
_ALONE = (
    re.compile(rf"(?:export\s+)?({_NAMES})=({_VALUE})\s*;?(?:\s+#.*|\s*)"),
    re.compile(rf"set\s+(?:--?\w+\s+)+({_NAMES})\s+({_VALUE})\s*;?(?:\s+#.*|\s*)"),
    re.compile(rf"\$env:({_NAMES})\s*=\s*({_VALUE})\s*;?\s*(?:#.*)?", re.I),
)
_LITERAL = re.compile(r"[A-Za-z0-9_.\-+/=:@%]+")  # nothing that a shell would make something of
# A line after one that ends so belongs to it, or is all that a block has.
_OPENS = re.compile(r"(?:\\|`|&&|\|\|?|\{|\(|\b(?:then|do|else|in))\s*(?:#.*)?$")
_HERE = re.compile(r"<<-?\s*(['\"]?)(\w+)\1")


@dataclass(frozen=True, slots=True)
class Found:
    """
    One place where a key is set.

    Attributes:
        secret: The key; None where the line has something that a shell works out.
        alone: Taking it out touches nothing else.
        digest: Of the whole file when it was read.
    """

    path: Path
    line: int
    variable: str
    secret: Secret | None
    alone: bool
    is_settings: bool
    digest: str = field(repr=False)

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"

    def __str__(self) -> str:
        if self.secret is None:
            return f"{self.place}: {self.variable}, in a line that does more"
        return f"{self.place}: {self.variable}, {self.secret!r}"


def tokens(environment: Mapping[str, str], folder: Path | None = None) -> list[Found]:
    """
    Return where keys are set: in Claude Code's settings, then in the profiles of shells.

    Args:
        environment: Has the user's folder, and Claude Code's if that is another.
        folder: The project whose own settings and `.envrc` are looked at.
    """
    home = environment.get("HOME", "")
    if not home.startswith("/"):
        return []
    claude = environment.get("CLAUDE_CONFIG_DIR") or os.path.join(home, ".claude")
    settings = [Path(claude, "settings.json")]
    zsh = environment.get("ZDOTDIR", home)
    shells = [Path(zsh if name.startswith(".z") else home, name) for name in SHELLS]
    if folder is not None:
        settings += [folder / ".claude" / name for name in ("settings.local.json", "settings.json")]
        shells.append(folder / ".envrc")
    found: list[Found] = []
    for path in dict.fromkeys(settings):
        found += _in_settings(path)
    for path in dict.fromkeys(shells):
        found += _in_shell(path)
    return found


def take_out(found: Found) -> None:
    """
    Take a key out of its file; every other byte stays, and so do mode and links.

    What was changed meanwhile stays changed: the key is looked for anew.

    Raises:
        ConfigError: It is not there any more, the line does more than that, or the file may not
            be written.
        NotReady: Somebody writes the file all the time.
    """
    for _ in range(TRIES):
        now, target = _again(found), files.read(found.path)
        if target.data is None:
            raise _changed(found)
        if sha256(target.data) != now.digest:
            continue
        if not now.alone:
            raise ConfigError(
                f"{now.place}: does more than to set {now.variable}; it is left as it is",
                hint=f"take {now.variable} out of it yourself",
            )
        if files.replace(target, _without(now, target.data)):
            return
    raise files.changed_too_often(found.path)


def _without(found: Found, data: bytes) -> bytes:
    if found.is_settings:
        document = Document(data.decode())
        document.remove(("env", found.variable))
        return document.text.encode()
    lines = data.splitlines(keepends=True)
    del lines[found.line - 1]
    return b"".join(lines)


def _again(found: Found) -> Found:
    look = _in_settings if found.is_settings else _in_shell
    same = [
        one
        for one in look(found.path)
        if (one.variable, one.secret) == (found.variable, found.secret)
    ]
    if not same:
        raise _changed(found)
    return min(same, key=lambda one: abs(one.line - found.line))


def _changed(found: Found) -> ConfigError:
    return ConfigError(
        f"{found.path}: was changed meanwhile; {found.variable} is not where it was",
        hint=f"see that {found.variable} is out of it",
    )


def _in_settings(path: Path) -> Iterator[Found]:
    data = _read(path)
    if data is None:
        return
    try:
        text = data.decode()
        document = Document(text)
        env = document.value.get("env")
    except (SettingsInvalid, UnicodeDecodeError):
        return  # whoever edits it says so
    for name in VARIABLES:
        value = env.get(name) if isinstance(env, dict) else None
        if not isinstance(value, str) or not value:
            continue
        line = text.count("\n", 0, max(0, text.rfind(f'"{name}"'))) + 1
        yield Found(path, line, name, _secret(value), True, True, sha256(data))


def _in_shell(path: Path) -> Iterator[Found]:
    data = _read(path)
    if data is None:
        return
    before, here = "", ""  # the last line that says something; what ends a text that goes on
    for number, raw in enumerate(data.splitlines(), start=1):
        line = raw.decode("utf-8", "replace")
        if here:
            here = "" if line.strip() == here else here
            continue
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if (found := _setting(line)) is not None:
            name, value = found
            secret = _secret(value) if _LITERAL.fullmatch(value) else None
            # what stands inside of something else is not for us to take apart
            alone = secret is not None and not _OPENS.search(before)
            yield Found(path, number, name, secret, alone, False, sha256(data))
        before = line
        if (text := _HERE.search(line)) is not None:
            here = text[2]


def _setting(line: str) -> tuple[str, str] | None:
    """Return which variable a line sets and to what; no value where the line does more."""
    sets = _SETS.search(line)
    if sets is None:
        return None
    alone = next((match for one in _ALONE if (match := one.fullmatch(line))), None)
    if alone is None:
        return (sets[1] or sets[2]).upper(), ""
    value = alone[2][1:-1] if alone[2][:1] in ("'", '"') else alone[2]
    return (alone[1].upper(), value) if value else None  # it is set to nothing


def _secret(value: str) -> Secret | None:
    try:
        return Secret(value)
    except ValueError:
        return None


def _read(path: Path) -> bytes | None:
    try:
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            data = file.read(LARGEST_FILE + 1)
    except OSError:
        return None
    return data if len(data) <= LARGEST_FILE else None


def base_url(environment: Mapping[str, str]) -> str:
    """Return the ANTHROPIC_BASE_URL of the user's settings; empty where there is none."""
    home = environment.get("HOME", "")
    claude = environment.get("CLAUDE_CONFIG_DIR") or os.path.join(home, ".claude")
    data = _read(Path(claude, "settings.json"))
    with suppress(SettingsInvalid, UnicodeDecodeError):
        env = Document((data or b"{}").decode()).value.get("env")
        value = env.get("ANTHROPIC_BASE_URL") if isinstance(env, dict) else None
        return value if isinstance(value, str) else ""
    return ""
