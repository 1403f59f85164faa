"""What service managers have in common: how a service stands, how their programs are run."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from keybroker.errors import ConfigError
from keybroker.services.needs import Needs
from keybroker.values import dataclass

COMMAND_SECONDS = 30.0
PROGRAM = "from keybroker.cli import main; main()"


@dataclass(frozen=True, slots=True)
class State:
    """
    How a service stands.

    Attributes:
        current: Its files are what would be written now.
        pid: 0 where none runs.
        result: Why the last one ended.
    """

    installed: bool
    current: bool
    enabled: bool
    active: str
    pid: int
    restarts: int
    result: str


def run(
    command: Sequence[str], seconds: float = COMMAND_SECONDS, given: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Run a program; one that is not there, or does not end, is one that failed."""
    try:
        return subprocess.run(
            command, input=given, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: {error.strerror}")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no end within {seconds:.0f} s")


def is_current(files: Callable[[Needs], Mapping[Path, str]], needs: Needs | None) -> bool:
    """Say whether files are what they would be now; not where that cannot be told."""
    with suppress(ConfigError):  # what they would name is missing
        return needs is not None and all(content(f) == text for f, text in files(needs).items())
    return False


def content(file: Path) -> str | None:
    """Return a file's text; None where it cannot be read."""
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
