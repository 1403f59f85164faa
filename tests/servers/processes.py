"""Start programs for tests and end exactly those."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Self


class StartError(Exception):
    """A server did not start; the message ends with what it printed."""


class Port:
    """
    A loopback port of the kernel's choice that nobody else is given.

    The socket stays bound without listening, so the kernel does not hand the port out again; a
    server that sets SO_REUSEADDR, as PostgreSQL and asyncio do, may bind it nevertheless.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


class Child:
    """
    A program in a process group of its own, which ends with the test session.

    Its output goes to a file. Where `setpriv` exists the program also ends when this process is
    killed and cannot end it.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        stdin: IO[bytes] | None = None,
        user: str | None = None,
        ask: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = Path(command[0]).name
        self.log = log
        self._ask = ask
        guard = ["setpriv", "--pdeathsig", ask.name[3:], "--"] if shutil.which("setpriv") else []
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*guard, *command],
                env=dict(environment),
                stdin=stdin or subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=[] if user else None,
            )

    @property
    def pid(self) -> int:
        """The program's process, which leads its group."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> None:
        """
        Return once `ready` says so.

        Raises:
            StartError: The program ended, or the time is over.
        """
        if not wait_until(lambda: not self.alive() or ready(), seconds):
            raise StartError(f"{self.name}: not ready after {seconds:g} seconds\n{self.tail()}")
        if not self.alive():
            raise StartError(f"{self.name}: exit status {self._process.returncode}\n{self.tail()}")

    def tail(self, lines: int = 20) -> str:
        """The end of what it printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def pause(self) -> None:
        """Let it hang: it keeps its connections and takes new ones, and says nothing."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # all its threads

    def resume(self) -> None:
        """End a pause."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End its group at once, as a crash does. Killing twice is fine."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self, seconds: float = 10) -> None:
        """Ask it to end, then end what is left of its group. Stopping twice is fine."""
        if self.alive():
            self._process.send_signal(self._ask)
            self.resume()  # or it would not hear of it
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def wait_until(ready: Callable[[], bool], seconds: float) -> bool:
    """Ask again and again whether something is so; False when the time is over."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
