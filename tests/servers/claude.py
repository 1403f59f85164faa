"""
The real Claude Code client, kept away from this machine's accounts and from the network.

It sees a fresh HOME, an environment made here, and proxies that lead nowhere; only loopback is
reached directly.

See: https://code.claude.com/docs/en/settings
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Self

from tests.servers.install import CLAUDE, claude_program

VERSIONS = CLAUDE
NEWEST, WITH_NODE_20 = VERSIONS

_NOBODY = "http://127.0.0.1:9"
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "ANTHROPIC_BASE_URL": _NOBODY,  # the settings' `env` replaces it
    "HTTP_PROXY": _NOBODY,
    "HTTPS_PROXY": _NOBODY,
    "NO_PROXY": "127.0.0.1,localhost",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
}


@dataclass(frozen=True, slots=True)
class Result:
    """What a client printed and how it ended; -9 when it was ended at its deadline."""

    rc: int
    stdout: str
    stderr: str


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The client's whole environment."""
    return {"PATH": os.defpath, "HOME": str(home), **_ENVIRONMENT, **(extra or {})}


def write_settings(home: Path, settings: Mapping[str, Any]) -> Path:
    """Replace the user's settings; running sessions notice."""
    path = home / ".claude" / "settings.json"
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(settings))
    return fresh.replace(path)


def run_claude(
    version: str,
    home: Path,
    settings: Mapping[str, Any] | None,
    prompt: str = "ping",
    env_extra: Mapping[str, str] | None = None,
    timeout: float = 60,
    *,
    words: tuple[str, ...] = (),
    under: tuple[str, ...] = (),
) -> Result:
    """
    Ask one question in a new client.

    Args:
        version: One of `VERSIONS`.
        home: Its HOME; its project is the folder `project` below it.
        settings: The user's settings, or None to leave the file as it is.
        prompt: The question.
        env_extra: Added to the environment made here.
        timeout: Seconds until the client is ended.
        words: What else is typed.
        under: A command that runs the client, such as `Machine.command`.
    """
    words = ("-p", prompt, *words)
    with start_stream(version, home, settings, env_extra, words, under) as session:
        return session.wait(timeout)


def start_stream(
    version: str,
    home: Path,
    settings: Mapping[str, Any] | None,
    env_extra: Mapping[str, str] | None = None,
    words: tuple[str, ...] = (
        *("-p", "--verbose"),
        *("--input-format", "stream-json"),
        *("--output-format", "stream-json"),
    ),
    under: tuple[str, ...] = (),
) -> Session:
    """Start a client that is asked one question after another; see `run_claude`."""
    if settings is not None:
        write_settings(home, settings)
    project = home / "project"
    project.mkdir(exist_ok=True)
    command = [*under, str(claude_program(version)), *words]
    return Session(command, project, environment(home, env_extra))


class Session:
    """A running client, as a context; leaving it ends the client and its helpers."""

    def __init__(self, command: list[str], project: Path, environment: dict[str, str]) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stdout: list[str] = []
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed on leaving
        self._process = subprocess.Popen(
            command,
            cwd=project,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
        )
        self._reader = Thread(target=self._read, name="claude")
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            text = line.decode(errors="replace")
            self._stdout.append(text)
            self._lines.put(text)
        self._lines.put(None)

    @property
    def pid(self) -> int:
        """The client's process."""
        return self._process.pid

    def ask(self, prompt: str = "ping", timeout: float = 60) -> dict[str, Any]:
        """
        Send one question and wait for its result.

        Returns:
            The client's message of type `result`: `is_error`, `result` (the text), …

        Raises:
            EOFError: The client ended first; the message is what it printed.
            queue.Empty: The time is over.
        """
        content = [{"type": "text", "text": prompt}]
        message = {"type": "user", "message": {"role": "user", "content": content}}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()
        while line := self._lines.get(timeout=timeout):
            with suppress(ValueError):
                answer: dict[str, Any] = json.loads(line)
                if answer.get("type") == "result":
                    return answer
        raise EOFError(f"the client ended: {self.wait()}")

    def wait(self, timeout: float = 60) -> Result:
        """Close the client's input and wait for its end; it is ended when the time is over."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        rc = self._process.wait()
        self._reader.join()
        self._stderr.seek(0)
        stderr = self._stderr.read().decode(errors="replace")
        return Result(rc, "".join(self._stdout), stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait(0)
        assert self._process.stdout
        self._process.stdout.close()
        self._stderr.close()
