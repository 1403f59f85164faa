"""Secrets that can be recognised wherever they turn up, whole or in part, plain or encoded."""

from __future__ import annotations

import base64
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from keybroker.devgateway import DevGateway
from keybroker.devgateway.server import Reply, Request

WINDOW = 12  # so many characters of a secret in a row count as the secret


def canary(role: str) -> str:
    """Make a secret with characters that JSON, shells and URLs would change, and a long core."""
    return f'sk-{role}"\\&%-{secrets.token_hex(20)}'


def traces(secret: str) -> set[bytes]:
    """Return what gives a secret away: its pieces, plain, in hex, in base64 and as UTF-16."""
    core = max(secret.replace("\\", '"').split('"'), key=len).encode()
    found = {core[at : at + WINDOW] for at in range(max(1, len(core) - WINDOW + 1))}
    for whole in (core.hex(), core.hex().upper(), *_base64(core)):
        text = whole.encode()
        found |= {text[at : at + 2 * WINDOW] for at in range(len(text) - 2 * WINDOW + 1)}
    found.add(core.decode().encode("utf-16-le"))
    return found


def _base64(core: bytes) -> Iterator[str]:
    for shift in range(3):  # it may begin anywhere in a longer text
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(b"\0" * shift + core)[4:-4].decode()


@dataclass(slots=True)
class Canaries:
    """The secrets of one test, by role. Only roles are ever said of them."""

    planted: dict[str, set[bytes]] = field(default_factory=dict)

    def new(self, role: str) -> str:
        """Make a secret and know it from now on."""
        return self.know(role, canary(role))

    def know(self, role: str, secret: str) -> str:
        """Know a secret that somebody else made."""
        self.planted.setdefault(role, set()).update(traces(secret))
        return secret

    def seen_in(self, data: str | bytes, but: Iterable[str] = ()) -> list[str]:
        """Return the roles of the secrets that are in some bytes."""
        found = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
        allowed = set(but)
        return [
            role
            for role, pieces in list(self.planted.items())
            if role not in allowed and any(piece in found for piece in list(pieces))
        ]

    def below(self, folder: Path, but: Mapping[Path, str] | None = None) -> list[str]:
        """Return where below a folder a secret is, names of files included."""
        allowed = but or {}
        found = []
        for path in sorted(folder.rglob("*")):
            roles = self.seen_in(os.fsencode(path.name))
            if path.is_file() and not path.is_symlink():
                planted_here = [allowed[path]] if path in allowed else []
                with suppress(FileNotFoundError):
                    roles += self.seen_in(path.read_bytes(), planted_here)
            found += [f"{role} in {path.relative_to(folder)}" for role in roles]
        return found


@dataclass(frozen=True, slots=True)
class Process:
    """What anybody can see of a running process."""

    pid: int
    command: bytes
    environment: bytes | None  # None: it does not let us look
    core: bool  # it may leave a core
    closed: bool  # its memory belongs to root alone, whoever runs it

    @property
    def name(self) -> str:
        """Say which of ours it is."""
        words = [os.path.basename(word) for word in self.command.split(b"\0")]
        if b"keybroker.worker" in words:
            return "worker"
        return "command line" if b"keybroker" in words[:2] else "program"


def process(pid: int) -> Process | None:
    """Look at a process; None when it has gone, or was just becoming another program."""
    proc = Path(f"/proc/{pid}")
    try:
        command = (proc / "cmdline").read_bytes()
        environment: bytes | None = None
        with suppress(PermissionError):
            environment = (proc / "environ").read_bytes()
        limits = (proc / "limits").read_text()
        status = (proc / "status").read_text()
        owner = (proc / "mem").stat()
        same = (proc / "cmdline").read_bytes() == command
    except (FileNotFoundError, ProcessLookupError):
        return None
    core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    user, group = (
        int(next(line for line in status.splitlines() if line.startswith(name)).split()[2])
        for name in ("Uid:", "Gid:")
    )
    told = (user, group) != (0, 0)  # of root's own processes, in root's group, nothing is told
    closed = told and (owner.st_uid, owner.st_gid) == (0, 0)
    if not command or not same:
        return None
    return Process(pid, command, environment, core.split()[4] != "0", closed)


def descendants(pid: int) -> list[int]:
    """Return all processes below one."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                stat = Path(f"/proc/{name}/stat").read_text()
                children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(name))
    found = list(children.get(pid, ()))
    for one in found:
        found += children.get(one, ())
    return found


class Watch:
    """Looks at all processes below ours, again and again and when asked, while it is entered."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, bytes, bytes | None], Process] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._guard = threading.Lock()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def look(self, *_: object) -> list[Process]:
        """Look now. It is also a hook of the proxy that breaks requests."""
        found = [one for one in map(process, descendants(os.getpid())) if one is not None]
        with self._guard:
            for one in found:
                self.seen[(one.pid, one.command, one.environment)] = one
        return found

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self.look()


class Gateway(DevGateway):
    """The development gateway, telling which keys it was asked for and which it made."""

    def __init__(self, canaries: Canaries, **options: Any) -> None:
        super().__init__(canaries.new("master"), **options)
        self.canaries = canaries
        self.minted: list[str] = []

    def respond(self, request: Request) -> Reply:
        """Know a key before anybody else can say it."""
        reply = super().respond(request)
        if request.path == "/key/generate" and isinstance(reply.body, dict):
            key = reply.body.get("key")
            if isinstance(key, str):
                self.minted.append(self.canaries.know("minted", key))
        return reply


@contextmanager
def written(path: Path, text: str, mode: int = 0o600) -> Iterator[Path]:
    """Have a private file for a while."""
    write(path, text, mode)
    try:
        yield path
    finally:
        path.unlink()


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    """Write a file with its mode, in a folder that only its owner enters."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
    path.chmod(mode)
    return path
