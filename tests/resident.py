"""A daemon in a home of its own, as a user has it: a real process, asked through its socket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from keybroker import asking, paths, starting, wire
from keybroker.errors import NobodyAnswers

T = TypeVar("T")
HELPER = Path(asking.__file__).with_name("helper.py")
READY_SECONDS = 10.0


class Home(NamedTuple):
    """A user's folder, short enough for a socket below it, and the environment of that user."""

    path: Path
    environment: dict[str, str]


@contextmanager
def fresh_home() -> Iterator[Home]:
    """Make a HOME with every XDG folder below it; nothing of the caller's environment."""
    with tempfile.TemporaryDirectory(prefix="kb-", ignore_cleanup_errors=True) as temporary:
        path = Path(temporary)
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
            "HOME": str(path),
            "LANG": "C.UTF-8",
        }
        for name, below in {
            "XDG_CONFIG_HOME": ".config",
            "XDG_DATA_HOME": ".local/share",
            "XDG_STATE_HOME": ".local/state",
            "XDG_CACHE_HOME": ".cache",
            "XDG_RUNTIME_DIR": "run",
        }.items():
            (path / below).mkdir(mode=0o700, parents=True)
            environment[name] = str(path / below)
        yield Home(path, environment)


def until(what: Callable[[], T], seconds: float = 15.0, every: float = 0.02) -> T:
    """Return what a call returns as soon as it is true; fail when it never is."""
    ends = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < ends, "it never came to be"
        time.sleep(every)
    return found


class Resident:
    """
    One user's configuration and daemon.

    Args:
        home: Where everything of theirs is.
        variables: Of the daemon's environment, beside those of the home.

    Attributes:
        native: The helper in C, to ask by that one.
    """

    def __init__(self, home: Home, **variables: str) -> None:
        self.home = home
        self.environment = {**home.environment, **variables}
        self.file = home.path / ".config/keybroker/config.toml"
        self.file.parent.mkdir(mode=0o700, exist_ok=True)
        self.state = paths.private_directory(paths.state_directory(self.environment))
        self.socket = paths.socket_path(self.environment)
        self.log = self.state / starting.LOG
        self.process: subprocess.Popen[bytes] | None = None
        self.native: Path | None = None

    def configure(self, text: str) -> None:
        """Write the configuration file; a key file seals the cache."""
        self.file.touch(0o600)
        draft = self.file.with_name("draft")
        draft.write_text(f'{text}\n[cache]\nkey = "file"\n' if "[cache]" not in text else text)
        draft.replace(self.file)

    def start(
        self, *, ready: bool = True, command: Sequence[str] = (), form: str = "text", **more: str
    ) -> None:
        """Start the daemon; with `ready`, return when it listens."""
        paths.private_directory(self.socket.parent)
        arguments = [*(command or starting.command(self.state, self.socket, form))]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                arguments,
                env={**self.environment, **more},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        if ready:
            until(self.listens, READY_SECONDS)

    def listens(self) -> bool:
        """Say whether somebody answers; a daemon that ended is a failure."""
        assert self.process is None or self.process.poll() is None, self.said()
        try:
            wire.control(self.socket, "status", 5.0)
        except NobodyAnswers:
            return False
        return True

    def kill(self, number: int = signal.SIGKILL) -> int:
        """End the daemon by a signal; return its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(15)

    def stop(self) -> None:
        """End whatever runs, also a daemon that a command started."""
        if self.process is not None and self.process.poll() is None:
            self.kill(signal.SIGTERM)
        self.process = None
        if (pid := self.owner()) is not None:
            os.kill(pid, signal.SIGKILL)

    def owner(self) -> int | None:
        """Return the process that is the owner by its lock; None when nobody is."""
        if not (self.state / paths.OWNER_LOCK).exists() or paths.owner_lock_is_free(self.state):
            return None
        found = (self.state / paths.OWNER_LOCK).read_text()
        return int(json.loads(found)["pid"]) if found else None

    def said(self) -> str:
        """Return the daemon's log."""
        return self.log.read_text() if self.log.exists() else ""

    def ask(self, profile: str = "", pid: int = 0, ttl_ms: int = 0, directory: str = "") -> str:
        """Ask for a key; return the whole last line: `ok KEY` or `error STATUS TEXT`."""
        return wire.ask(self.socket, wire.request(profile, pid, ttl_ms, directory)).decode()

    def key(self, profile: str = "") -> str:
        """Ask for a key that must be there."""
        reply = self.ask(profile)
        assert reply.startswith("ok "), reply
        return reply.removeprefix("ok ")

    def status(self) -> dict[str, Any]:
        """Ask how things stand."""
        found: dict[str, Any] = wire.control(self.socket, "status", 10.0)
        return found

    def row(self, profile: str = "work") -> dict[str, Any]:
        """Return how one profile stands."""
        [found] = [row for row in self.status()["profiles"] if row["profile"] == profile]
        return dict(found)

    def helper(self, profile: str = "work", **variables: str) -> tuple[int, str, str]:
        """Run the helper as the settings line does; return its status, stdout and stderr."""
        done = subprocess.run(
            self.helper_command(profile),
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )
        return done.returncode, done.stdout, done.stderr

    def helper_command(self, profile: str = "work") -> list[str]:
        """Return what the settings line runs: the helper in Python, or the native one if set."""
        if self.native is not None:
            return [str(self.native), "-", profile, sys.executable]
        return [sys.executable, "-IS", str(HELPER), "-", profile]

    def cli(self, *arguments: str) -> tuple[int, str, str]:
        """Run a command; return its status, stdout and stderr."""
        done = subprocess.run(
            [sys.executable, "-c", "from keybroker.cli import main; main()", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr
