"""Mends what can be mended without asking: our own settings, our daemon, modes, caches."""

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress

from keybroker.doctor.finding import Close, Command, Mend, Remove

SECONDS = 60.0
_RUN = "from keybroker.cli import main; main()"


def mend(what: Mend, environment: Mapping[str, str] = os.environ) -> str:
    """
    Do it.

    Returns:
        Why it did not work; empty: it did.
    """
    try:
        if isinstance(what, Close):
            what.path.chmod(what.mode)
        elif isinstance(what, Remove):
            with suppress(FileNotFoundError):
                what.file.unlink()
        else:
            return _command(what, environment)
    except OSError as error:
        return str(error.strerror)
    return ""


def _command(what: Command, environment: Mapping[str, str]) -> str:
    """Type a command of ours; what it said last is why it failed."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RUN, *what.words],
            cwd=what.folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "it did not end in time"
    if done.returncode == 0:
        return ""
    lines = [
        line.removeprefix("keybroker: ")
        for line in done.stderr.decode(errors="replace").splitlines()
        if line.startswith("keybroker: ")
    ]
    return lines[-1][:200] if lines else f"status {done.returncode}"
