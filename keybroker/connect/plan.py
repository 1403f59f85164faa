"""What a surface wants done: keys in other programs' files, files of its own, and words."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keybroker import settings
from keybroker.errors import ConfigError

SYSTEMS = {"linux": "linux", "darwin": "macos", "win32": "windows"}


@dataclass(frozen=True, slots=True)
class Place:
    """
    Where things are: whose files, on which machine.

    Attributes:
        folder: The project that a local scope is about.
        system: linux, macos or windows, whose paths are meant.
        output: Files of the machine go below this folder instead of its root.
        installed_in: The folder that keybroker's environment has there, for another machine.
    """

    environment: Mapping[str, str]
    folder: Path
    system: str
    output: Path | None = None
    installed_in: str | None = None

    @classmethod
    def here(cls, **changes: Any) -> "Place":
        system = SYSTEMS.get(sys.platform, "linux")
        return cls(**{"environment": os.environ, "folder": Path.cwd(), "system": system, **changes})

    @property
    def made_for(self) -> dict[str, str]:
        """What was typed of the machines that it is for; empty where they are this one."""
        system = None if self.system == SYSTEMS.get(sys.platform, "linux") else self.system
        output = None if self.output is None else str(self.output)
        typed = {"system": system, "output": output, "installed_in": self.installed_in}
        return {name: value for name, value in typed.items() if value is not None}

    @property
    def home(self) -> Path:
        """
        Return the home directory.

        Raises:
            ConfigError: There is none.
        """
        home = self.environment.get("HOME", "")
        if not home.startswith("/"):
            raise ConfigError("connect: HOME is not set", hint="set HOME")
        return Path(home)

    def machine(self, path: str) -> Path:
        """Return a file of the machine, or where it goes below `output`."""
        if self.output is None:
            return Path(path)
        return self.output / path.replace("\\", "/").removeprefix("C:").lstrip("/")


@dataclass(frozen=True, slots=True)
class Keys:
    """
    Keys to set in somebody's JSON.

    Attributes:
        strict: Whoever reads the file takes no comments and no trailing commas.
        guarded: Keys whose present value must be ours, or is replaced by force only.
        mode: Of the file, where it has to be made.
        lent_by: The surface whose file this is, of a plan that needs it connected too. It stays
            that one's if it is; and if a third one set it, it is left as it is.
    """

    file: Path
    values: Mapping[settings.Path, Any]
    strict: bool = True
    guarded: tuple[settings.Path, ...] = ()
    mode: int = 0o600
    lent_by: str | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A line, or several in a row, that have to stand in a text file; added at its end."""

    file: Path
    line: str
    mode: int = 0o644  # of a file that is made


@dataclass(frozen=True, slots=True)
class Whole:
    """A file of ours, as a whole."""

    file: Path
    data: bytes
    mode: int = 0o600


Piece = Keys | Line | Whole


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What one surface wants.

    Attributes:
        before: Said first: what will not work any more, what was not tried.
        after: Said last: what to do and what to see.
        text: What is for stdout, of a surface that is not written anywhere.
        line: What is run for a key, and can be tried.
        environment: What it is run with.
        key: A file that the daemon keeps that key in.
    """

    pieces: tuple[Piece, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    text: str = ""
    line: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    key: Path | None = None
