"""The program Claude Code: where it is, and of which version."""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SECONDS = 4.0
# From which version on: a 403 is answered by asking for another key, and a JWT is replaced ahead.
HEALS_403 = (2, 1, 246)
DISCOVERS = (2, 1, 129)
DISCOVERS_WITH_HELPER = (2, 1, 132)
FORBIDS_BOTH = (2, 1, 146)  # a first-party login that is forced, and a gateway's credential
Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """
    A program that was found.

    Attributes:
        version: None where it does not say.
    """

    file: Path
    version: Version | None

    def __str__(self) -> str:
        return f"{self.file} ({said(self.version)})"


def said(version: Version | None) -> str:
    return "of an unknown version" if version is None else ".".join(map(str, version))


def find(environment: Mapping[str, str]) -> Program | None:
    """Return the `claude` that a shell would start; None: there is none."""
    for folder in os.get_exec_path(dict(environment)):
        file = Path(folder, "claude")
        if file.is_file() and os.access(file, os.X_OK):
            return Program(file, _packaged(file.resolve()) or _asked(file, environment))
    return None


def _packaged(file: Path) -> Version | None:
    """Return the version that a package or an installer's own folder names."""
    if (found := _read(file.name)) is not None:  # ~/.local/share/claude/versions/2.1.329
        return found
    for folder in file.parents[:3]:
        with suppress(OSError, ValueError, AttributeError):
            package = json.loads((folder / "package.json").read_bytes())
            if str(package.get("name", "")).startswith("@anthropic-ai/claude-code"):
                return _read(str(package.get("version")))
    return None


def _asked(file: Path, environment: Mapping[str, str]) -> Version | None:
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [str(file), "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            env=dict(environment),
        )
        return _read(done.stdout.decode(errors="replace").split(" ", 1)[0])
    return None


def _read(text: str) -> Version | None:
    match = re.fullmatch(r"\s*(\d{1,4})\.(\d{1,4})\.(\d{1,6})\s*", text)
    return None if match is None else tuple(int(one) for one in match.groups())
