"""Programs that want to be told of something: run for a while, with what happened on stdin.

    {"event": "login_ending", "login": "corp", "ends_at": "2026-11-22T18:00:00Z", …}

What they print is dropped, and nothing depends on them.
"""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from keybroker.errors import ConfigError, KeybrokerError

SECONDS = 10.0
# What makes a window of a desktop is told by its bus.
PASSED = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR"),
    *("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"),
)


def run(
    command: Sequence[str],
    facts: Mapping[str, Any],
    environment: Mapping[str, str],
    seconds: float = SECONDS,
) -> None:
    """
    Run a program; it and whatever it started are killed at the deadline.

    Raises:
        ConfigError: There is no such program.
        KeybrokerError: It failed or took too long.
    """
    about, name = f"hook {facts['event']}", os.path.basename(command[0])
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={one: environment[one] for one in PASSED if one in environment},
            process_group=0,
        )
    except OSError as error:
        raise ConfigError(f"{about}: {name} cannot be run ({error.strerror})") from None
    with process:
        try:
            process.communicate(json.dumps(facts).encode() + b"\n", timeout=seconds)
        except subprocess.TimeoutExpired:
            raise KeybrokerError(f"{about}: {name} took longer than {seconds:g} s") from None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        raise KeybrokerError(f"{about}: {name} ended with status {process.returncode}")
