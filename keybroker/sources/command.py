"""Any program that prints a key, or JSON with `key` and `ttl` or `expires_at`."""

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from keybroker.config import Profile
from keybroker.credential import Credential, Lease, Secret
from keybroker.errors import ConfigError, SourceInvalid, SourceUnavailable
from keybroker.fields import read_duration
from keybroker.journal import read_time
from keybroker.sources.followed import Followed
from keybroker.sources.gateway import Gateway

LARGEST_OUTPUT = 64 << 10
ALWAYS_PASSED = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR")


class Command(Followed):
    """Runs the program of a profile; its stderr is dropped, since it may show a key."""

    type = "command"

    def __init__(self, profile: Profile, environment: Mapping[str, str]) -> None:
        super().__init__(Gateway.of(profile))
        self._command: tuple[str, ...] = profile.source["command"]
        passed = (*ALWAYS_PASSED, *profile.source["environment"])
        self._environment = {k: environment[k] for k in passed if k in environment}
        self._seconds = profile.source["timeout"].total_seconds()

    def issue(self, label: str) -> Credential:
        del label  # the program's key has its owner's name
        issued_at = datetime.now(UTC)
        output = run(self._command, self._environment, self._seconds)
        return parse(output.decode("utf-8", "replace").strip(), issued_at)


def parse(output: str, issued_at: datetime) -> Credential:
    """
    Read what a program printed.

    Args:
        output: A key alone, or `{"key": "…", "ttl": 3600}`; `ttl` in seconds or as a duration,
            or `expires_at` with its zone instead.
        issued_at: When the program was started.

    Raises:
        SourceInvalid: Neither; what was printed is not repeated.
    """
    found: Any = {"key": output}
    if output.startswith("{"):
        try:
            found = json.loads(output)
        except (ValueError, RecursionError):
            raise SourceInvalid("command: the output begins like JSON, but is not") from None
    try:
        secret = Secret(found["key"] if isinstance(found.get("key"), str) else "")
    except ValueError as error:
        raise SourceInvalid(f"command: the key it printed is {error}") from None
    try:
        expires_at = _end(found, issued_at)
    except (ValueError, TypeError, OverflowError):
        raise SourceInvalid('command: "ttl" or "expires_at" cannot be read') from None
    if expires_at is not None and expires_at <= issued_at:
        raise SourceInvalid("command: the key it printed has expired")
    return Credential(secret, Lease(secret.fingerprint, "command", issued_at, expires_at))


def _end(found: Mapping[str, Any], issued_at: datetime) -> datetime | None:
    if (ttl := found.get("ttl")) is not None:
        if isinstance(ttl, bool):
            raise TypeError
        if isinstance(ttl, int | float):
            return issued_at + timedelta(seconds=ttl)
        return issued_at + read_duration(ttl)
    if (expires_at := found.get("expires_at")) is not None:
        return read_time(expires_at)
    return None


def run(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> bytes:
    """
    Run a program and return what it printed.

    It gets no stdin and its stderr is dropped, since it may show a key. It and whatever it
    started are killed at the deadline.

    Raises:
        ConfigError: There is no such program.
        SourceUnavailable: It failed or took too long.
        SourceInvalid: It printed nothing, or too much.
    """
    name = os.path.basename(command[0])
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            process_group=0,
        )
    except OSError as error:
        raise ConfigError(f"command: {name} cannot be run ({error.strerror})") from None
    with process:
        try:
            output = _read(process, time.monotonic() + seconds)
            if output is None:
                raise SourceUnavailable(
                    f"command: {name} took longer than {seconds:g} s", hint="run it by hand"
                )
        finally:
            with suppress(ProcessLookupError, PermissionError):  # of another user, or a zombie
                os.killpg(process.pid, signal.SIGKILL)
    if len(output) > LARGEST_OUTPUT:
        raise SourceInvalid(f"command: {name} printed more than 64 KiB")
    if process.returncode != 0:  # killed from outside, it may have printed half a key
        raise SourceUnavailable(
            f"command: {name} ended with status {process.returncode}", hint="run it by hand"
        )
    if not output.strip():
        raise SourceInvalid(f"command: {name} printed nothing", hint="run it by hand")
    return output


def _read(process: "subprocess.Popen[bytes]", deadline: float) -> bytes | None:
    """Read until the program closes its stdout and ends; None when the deadline comes first."""
    assert process.stdout is not None
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(output) <= LARGEST_OUTPUT:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            output += piece
    if len(output) <= LARGEST_OUTPUT:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        if process.returncode is None:
            return None
    return output
