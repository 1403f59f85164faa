"""A stage with a daemon that is started again when it dies, and a reader that goes on asking."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from keybroker import asking, paths, wire
from keybroker.errors import KeybrokerError
from keybroker.journal import Journal
from keybroker.slots import Slots, replay
from tests.crash.entry import ENTRY
from tests.crash.stage import Printed, Stage
from tests.resident import HELPER

APART_SECONDS = 0.1  # between two questions of the reader
PATIENCE_SECONDS = 30.0  # of a test with a machine that is busy


@dataclass(frozen=True)
class Asked:
    """
    One question of the reader. Times are of `time.monotonic`.

    Attributes:
        heard: When the first byte of an answer came; None: nobody answered.
        got: When a key was there; None: there was none.
    """

    at: float
    heard: float | None
    got: float | None


@dataclass
class Gap:
    """From a death of the daemon to the first words of the next, and to the first key."""

    died: float
    heard: float
    got: float


@dataclass
class Resident(Stage):
    """
    A stage whose daemon is watched over, as a service manager does.

    Its workers die by what `plan` says; the reader's keys are remembered as a command's are.
    """

    asked: list[Asked] = field(default_factory=list)
    deaths: list[float] = field(default_factory=list)
    mutant: str | None = None
    revive: bool = True  # the daemon is started again
    reads: bool = True
    again: bool = False  # make a request with each answer, not with each new key alone
    process: "subprocess.Popen[bytes] | None" = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.folder = paths.private_directory(paths.state_directory(self.environment))
        self.socket = paths.socket_path(self.environment)
        paths.private_directory(self.socket.parent)
        self.plans = self.home / "plan"
        self.locked = self.home / "locked"  # while it is there, the keyring is
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        super().__enter__()
        tasks = [self._watch_over] if self.revive else []
        if self.reads:
            tasks.append(self._read)
        if self.revive:
            self.spawn()
        self._threads = [threading.Thread(target=task) for task in tasks]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.end()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        self.end()
        super().__exit__()

    # the daemon

    def spawn(self) -> "subprocess.Popen[bytes]":
        """Start a daemon."""
        plan = {"armed": str(self.plans), "locked": str(self.locked), "mutant": self.mutant}
        words = [json.dumps(plan), str(self.folder), str(self.socket), "text"]
        with open(self.home / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, ENTRY, "daemon", *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        return self.process

    def _watch_over(self) -> None:
        while not self._over.is_set():
            assert self.process is not None
            self.process.wait()
            if not self._over.is_set():
                self.deaths.append(time.monotonic())
                self.spawn()

    def end(self) -> None:
        """End the daemon that runs, whoever started it."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if (pid := self.owner()) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def owner(self) -> int | None:
        """Return the daemon of this stage, by its own word, if it still is one."""
        with suppress(OSError, ValueError, KeyError):
            pid = int(json.loads((self.folder / paths.OWNER_LOCK).read_text())["pid"])
            if os.fsencode(self.folder) in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    def kill(self, who: str) -> bool:
        """Kill -9 the daemon, its workers, or both; say whether somebody was there."""
        pid, victims = self.owner(), []
        if pid is None:
            return False
        if who != "daemon":
            with suppress(OSError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                victims += [int(child) for child in children.split()]
        if who != "worker":
            victims.append(pid)
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        return bool(victims)

    # what people do

    def plan(self, *deaths: dict[str, str]) -> None:
        """Have workers or the daemon die: `effect`, `when`, `who`, one after the other."""
        draft = self.plans.with_name("draft")
        draft.write_text("".join(json.dumps(one) + "\n" for one in deaths))
        draft.replace(self.plans)

    def died(self) -> int:
        """Count the planned deaths, of whomever."""
        file = self.home / "died"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def say(self, op: str, seconds: float = 25.0) -> threading.Thread:
        """Have the daemon rotate or revoke; it may die of that. Return who waits for the answer."""
        if op == "revoke":
            self.revoked.append(datetime.now(UTC))

        def speak() -> None:
            with suppress(KeybrokerError):
                wire.control(self.socket, op, seconds, profiles=["work"])

        thread = threading.Thread(target=speak)
        thread.start()
        return thread

    # the reader

    def _read(self) -> None:
        used = 0.0
        while not self._over.wait(APART_SECONDS):
            known = len({one.key_sha256 for one in self.printed})
            key = self.ask()
            if key is None:
                continue
            new = len({one.key_sha256 for one in self.printed}) > known
            if new or (self.again and time.monotonic() > used + 1.0):
                used = time.monotonic()
                self.use(key)

    def ask(self) -> str | None:
        """Ask once, as the helper does; return the key."""
        at, before = time.monotonic(), datetime.now(UTC)
        heard, reply = None, b""
        with suppress(OSError):
            server = asking.connect(os.fsencode(self.socket), at + asking.FIRST_SECONDS)
            with closing(server):
                server.settimeout(asking.WAIT_SECONDS)
                server.sendall(wire.request("work"))
                while not reply.endswith(b"\n") or reply == wire.WAIT:
                    piece = server.recv(1 << 15)
                    heard = heard or time.monotonic()
                    if not piece:
                        break
                    reply += piece
        now = time.monotonic()
        waited = reply.startswith(wire.WAIT)
        reply = reply.removeprefix(wire.WAIT)
        found = reply[3:-1].decode() if reply.startswith(b"ok ") and reply[-1:] == b"\n" else None
        if found is not None:
            # What was answered at once was true when it was asked; our own clock may be late.
            self.remember(found, datetime.now(UTC) if waited else before)
        self.asked.append(Asked(at, heard if reply or waited else None, now if found else None))
        return found

    def remember(self, key: str, at: datetime) -> None:
        """Note a key that was printed: of many answers with the same one, the first and last."""
        one = Printed(at, sha256(key.encode()).hexdigest())
        if [old.key_sha256 for old in self.printed[-2:]] == [one.key_sha256] * 2:
            self.printed.pop()
        self.printed.append(one)

    def helper(self) -> "subprocess.CompletedProcess[str]":
        """Ask by the helper, which starts a daemon if there is none; remember its key."""
        before, at = datetime.now(UTC), time.monotonic()
        done = subprocess.run(
            [sys.executable, "-IS", str(HELPER), "-", "work"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        now = time.monotonic()
        got = now if done.returncode == 0 and done.stdout.endswith("\n") else None
        if got is not None:
            self.remember(done.stdout.strip(), before)
        self.asked.append(Asked(at, now, got))
        return done

    @property
    def slots(self) -> Slots:
        """What the journal knows, to wait by; the judge does not look at it."""
        return replay(Journal(self.folder).read()).get("work", Slots())

    # figures

    def until_read(self, since: float | None = None) -> None:
        """Wait until the reader has a key that it asked for later than this."""
        since = time.monotonic() if since is None else since
        until = since + PATIENCE_SECONDS
        while not any(one.at >= since and one.got for one in self.asked[-200:]):
            assert time.monotonic() < until, self.log()
            time.sleep(0.02)

    def gaps(self) -> list[Gap]:
        """Say for each death how long the reader was without an answer and without a key."""
        found = []
        for died in self.deaths:
            heard = [one.heard for one in self.asked if one.heard and one.heard > died]
            got = [one.got for one in self.asked if one.got and one.got > died]
            if heard and got:
                found.append(Gap(died, min(heard), min(got)))
        return found

    def longest(self) -> float:
        """Return the longest time between two keys of the reader."""
        got = [one.got for one in self.asked if one.got]
        return max((b - a for a, b in pairwise(got)), default=0.0)

    def log(self) -> str:
        """Return what the daemons said."""
        return (self.home / "log").read_text() if (self.home / "log").exists() else "nothing said"


def plan(effect: str, when: str, who: str) -> dict[str, Any]:
    """Return a death for `Resident.plan`."""
    return {"effect": effect, "when": when, "who": who}
