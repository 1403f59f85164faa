"""A PostgreSQL server of the tests' own, on loopback, with data that need not survive."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from tests.servers.processes import Child, Port

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "autovacuum": "off",
    "log_timezone": "UTC",
    "timezone": "UTC",
}


def program(name: str) -> str:
    """Find one of PostgreSQL's programs; Debian keeps them out of PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: p.parent.name)
    found = shutil.which(name, path=":".join([*map(str, reversed(folders)), os.environ["PATH"]]))
    if not found:
        raise FileNotFoundError(f"{name} is not installed: run tests/setup.sh")
    return found


def owner() -> str | None:
    """The user the server runs as: PostgreSQL refuses to be root."""
    return "postgres" if os.geteuid() == 0 else None


def owned_folder(folder: Path) -> Path:
    """Make a 0700 folder for the server's user, reachable below its parents."""
    folder.mkdir(mode=0o700)
    if user := owner():
        folder.parent.chmod(0o711)
        entry = pwd.getpwnam(user)
        os.chown(folder, entry.pw_uid, entry.pw_gid)
    return folder


def create(parent: Path, over_tcp: str = "trust") -> Path:
    """Make a new, empty cluster; returns its data folder. `scram-sha-256` asks for passwords."""
    data = owned_folder(parent / "data")
    flags = ["--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync"]
    flags += ["--auth-local=trust", f"--auth-host={over_tcp}", "--wal-segsize=1"]
    _as_owner([program("initdb"), "--pgdata", str(data), *flags])
    return data


def unpack(archive: Path, parent: Path) -> Path:
    """Copy a stored cluster; returns its data folder."""
    data = owned_folder(parent / "data")
    with archive.open("rb") as stored:
        _as_owner(["tar", "-xf", "-", "-C", str(data)], stdin=stored.fileno())
    return data


def _as_owner(command: list[str], stdin: int = subprocess.DEVNULL) -> None:
    user = owner()
    done = subprocess.run(
        command,
        user=user,
        group=user,
        extra_groups=[] if user else None,
        cwd="/",
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise OSError(f"{command[0]}: exit status {done.returncode}\n{done.stdout}")


class Postgres:
    """
    A running server over a data folder. Sockets and log are kept beside the data.

    `stop` and `start` keep the port, so a client's address stays good over an outage.
    """

    def __init__(self, data: Path) -> None:
        self._data = data
        self._sockets = data.parent / "run"
        self._child: Child | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.port = stack.enter_context(Port()).number
            stack.callback(self.stop)
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """Address of the database `litellm`."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/litellm"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        if not self._sockets.exists():
            owned_folder(self._sockets)
        settings = {**_SETTINGS, "unix_socket_directories": str(self._sockets)}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self._child = Child(
            [program("postgres"), "-D", str(self._data), "-p", str(self.port), *options],
            log=self._data.parent / "postgres.log",
            environment={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            user=owner(),
            ask=signal.SIGINT,  # disconnects clients, then shuts down in good order
        )
        self._child.wait_until(self._answers, 30)

    def stop(self) -> None:
        """End the server. Clients are disconnected, new ones refused."""
        if self._child:
            self._child.stop()
            self._child = None

    def _answers(self) -> bool:
        return not self._psql("select 1", "postgres").returncode

    def query(self, sql: str, database: str = "litellm") -> str:
        """
        Run SQL over the server's own socket, so that no other server can answer.

        Raises:
            OSError: It failed. The message is psql's.
        """
        done = self._psql(sql, database)
        if done.returncode:
            raise OSError(f"psql: {done.stderr.strip()}")
        return done.stdout

    def logs_in(self, user: str, password: str) -> bool:
        """Whether it takes a password over TCP, if it asks for one there."""
        done = self._psql("select 1", "postgres", "127.0.0.1", user, password)
        return not done.returncode

    def _psql(
        self,
        sql: str,
        database: str,
        host: str | None = None,
        user: str = "postgres",
        password: str = "",
    ) -> subprocess.CompletedProcess[str]:
        flags = ["-X", "-q", "-A", "-t", "-w", "-v", "ON_ERROR_STOP=1"]
        where = ["-h", host or str(self._sockets), "-p", str(self.port), "-U", user, "-d", database]
        environment = {"PATH": os.environ["PATH"], "PGCONNECT_TIMEOUT": "5"}
        return subprocess.run(
            [program("psql"), *flags, *where],
            input=sql,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**environment, "PGPASSWORD": password} if password else environment,
        )
