"""What is measured: a user's folder, the daemon in it, its helper, and the server in C beside."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import keybroker
from benchmarks.measure import UnmeasurableError
from keybroker import paths, starting
from keybroker.connect.line import helper_command
from keybroker.devgateway import DevGateway
from tests.servers.processes import Child

KEYBROKER = str(Path(sys.executable).parent / "keybroker")
DAEMON: tuple[str, ...] = (KEYBROKER, "daemon")
HELPER = Path(keybroker.__file__).parent / "helper.py"
STATUSLINE = HELPER.with_name("statusline.py")
PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.0002  # between two looks at whether a daemon is there yet

# The profile that all are asked for: a fixed key, which nothing has to be reached for.
FIXED = """\
default = "work"
[cache]
key = "file"
[profiles.work]
base_url = "http://127.0.0.1:9"
verify = "none"
[profiles.work.source]
type = "static"
key = {{ file = "{folder}/key" }}
"""
MINTED = """\
[profiles.{name}]
base_url = "{url}"
[profiles.{name}.source]
type = "litellm"
admin = {{ file = "{folder}/admin" }}
"""
COMMAND = """\
[profiles.{name}]
base_url = "{url}"
[profiles.{name}.source]
type = "command"
command = ["cat", "{folder}/admin"]
"""
STATIC = """\
[profiles.{name}]
base_url = "{url}"
[profiles.{name}.source]
type = "static"
key = {{ file = "{folder}/admin" }}
"""
# A minted key of 3 s with a hold of 1 s is replaced every 0.7 to 1 s.
OFTEN = '[defaults]\nhelper_ttl = "250ms"\nhold = "1s"\n'
OFTEN_MINTED = 'lifetime = "3s"\n'
OFTEN_READ = 'poll = "500ms"\n'


@dataclass(slots=True)
class Home:
    """
    A user's folder with a configuration in it.

    Attributes:
        key: What the profile `work` has, 100 bytes.
        profiles: Their names, `work` first.
        variables: Of programs in it, beside those of every home.
    """

    path: Path
    key: str = field(default_factory=lambda: f"sk-{secrets.token_hex(49)[:97]}")
    profiles: list[str] = field(default_factory=lambda: ["work"])
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What programs in it are started with; nothing of the caller's but PATH."""
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.path),
            "XDG_STATE_HOME": str(self.path / "state"),
            "XDG_RUNTIME_DIR": str(self.path / "run"),
            "KEYBROKER_CONFIG": str(self.path / "config.toml"),
            **self.variables,
        }

    @property
    def socket(self) -> Path:
        return self.path / "run" / "keybroker" / "s"

    @property
    def helper(self) -> tuple[str, ...]:
        """The helper in Python, as a client runs it."""
        return (sys.executable, "-IS", str(HELPER), str(self.socket), "work")

    @property
    def line(self) -> tuple[str, ...]:
        """What prints the line for a client's status line."""
        return (sys.executable, "-IS", str(STATUSLINE), str(self.socket), "work")

    @property
    def native(self) -> tuple[str, ...] | None:
        """The helper in C; None where it is not installed."""
        command = tuple(helper_command(str(self.socket), "work"))
        return None if command == self.helper else command


def furnish(
    folder: Path,
    url: str = "",
    admin: str = "",
    *,
    minted: int = 0,
    commands: int = 0,
    static: int = 0,
    often: bool = False,
) -> Home:
    """
    Make a home.

    Args:
        folder: Where; it must not be there yet. A short path: a socket goes below it.
        url, admin: A gateway and its admin key, for profiles other than `work`.
        minted, commands, static: How many more profiles there are of each kind of source.
        often: Whether everything is replaced or read again about once a second.
    """
    home = Home(folder)
    for below in ("run", "state"):
        (folder / below).mkdir(mode=0o700, parents=True)
    parts = [FIXED.format(folder=folder) + OFTEN_READ * often, OFTEN * often]
    for template, word, count, more in (
        (MINTED, "minted", minted, OFTEN_MINTED),
        (COMMAND, "command", commands, OFTEN_READ),
        (STATIC, "static", static, OFTEN_READ),
    ):
        for number in range(count):
            name = f"{word}-{number}"
            home.profiles.append(name)
            parts.append(template.format(name=name, url=url, folder=folder) + more * often)
    for name, text in (("key", home.key), ("admin", admin), ("config.toml", "".join(parts))):
        with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    return home


def ask(path: Path, profile: str) -> str:
    """Return the whole answer of whoever listens, empty when nobody does."""
    with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
        client.settimeout(PATIENCE_SECONDS)
        client.connect(str(path))
        client.sendall(f"1 get {profile} 0 0\n".encode())
        return b"".join(iter(lambda: client.recv(65536), b"")).decode()
    return ""


def listens(path: Path) -> bool:
    """Say whether somebody accepts connections there."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def has_key(path: Path, profile: str) -> bool:
    """Say whether a profile has a key to hand out."""
    return ask(path, profile).removeprefix("wait\n").startswith("ok ")


@dataclass(frozen=True, slots=True)
class Server:
    """Something that answers on a Unix socket."""

    socket: Path
    pid: int


@contextmanager
def daemon(home: Home) -> Iterator[Server]:
    """Run the daemon until every profile has a key, and as long as the context."""
    with _running(DAEMON, home, home.socket) as (child, server):
        for profile in home.profiles:
            seconds = PATIENCE_SECONDS
            child.wait_until(lambda name=profile: has_key(home.socket, name), seconds)  # type: ignore[misc]
        yield server


@contextmanager
def floor(parts: Path, home: Home) -> Iterator[Server]:
    """Run the server in C that hands out the same key."""
    path = home.path / "c"
    with _running((str(parts / "server"), str(path), home.key), home, path) as (_, server):
        yield server


@contextmanager
def _running(command: Sequence[str], home: Home, path: Path) -> Iterator[tuple[Child, Server]]:
    log = home.path / "log"
    with Child(command, log=log, environment=home.environment) as child:
        child.wait_until(lambda: listens(path), PATIENCE_SECONDS)
        yield child, Server(path, child.pid)


def seconds_to(home: Home, ready: Callable[[], bool]) -> float:
    """
    Start the daemon and end it again.

    Returns:
        How long it took from the start until `ready` said so.

    Raises:
        UnmeasurableError: It ended before, or took too long.
    """
    state = paths.private_directory(paths.state_directory(home.environment))
    paths.private_directory(home.socket.parent)
    program = starting.command(state, home.socket, "text")  # what `keybroker daemon` becomes
    with open(home.path / "log", "ab") as log:
        files = [(os.POSIX_SPAWN_DUP2, log.fileno(), to) for to in (1, 2)]
        began = time.perf_counter()
        pid = os.posix_spawn(program[0], program, home.environment, file_actions=files)
    try:
        while not ready():
            time.sleep(POLL_SECONDS)
            over = time.perf_counter() - began > PATIENCE_SECONDS
            if over or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                raise UnmeasurableError(f"the daemon did not get ready\n{_end_of(home)}")
        return time.perf_counter() - began
    finally:
        os.kill(pid, signal.SIGTERM)  # a zombie takes it too
        os.waitpid(pid, 0)


def _end_of(home: Home) -> str:
    return (home.path / "log").read_text("utf-8", "replace")[-1000:].strip()


def mints(gateway: DevGateway) -> int:
    """Return how many keys a gateway has minted, as far as it remembers: 10,000 requests."""
    return sum(one.path == "/key/generate" and one.status == 200 for one in gateway.seen())


def resident(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    return int(_table(Path(f"/proc/{pid}/status"))["VmRSS"].split()[0]) / 1024


def unshared(pid: int) -> float:
    """
    Return the memory of a process in MiB that it shares with no other.

    Raises:
        PermissionError: The process is closed to debuggers, and we are not root.
    """
    found = _table(Path(f"/proc/{pid}/smaps_rollup"))
    return sum(int(found[f"Private_{kind}"].split()[0]) for kind in ("Clean", "Dirty")) / 1024


def wake_ups(pid: int) -> int:
    """Return how often the threads of a process have gone to sleep so far; as often they woke."""
    found = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # one that ended
            found += int(_table(task / "status")["voluntary_ctxt_switches"])
    return found


def children(pid: int) -> list[int]:
    """Return the processes that a process of one thread has started and not yet collected."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _table(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)
