"""Starts workers and speaks JSON lines with them: the parent's side of the pipe."""

import fcntl
import json
import os
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from keybroker.config import Config, Profile
from keybroker.credential import Credential, Issuer, Lease, Reference, Secret
from keybroker.errors import CLASSES, KeybrokerError, SourceError, SourceUnavailable
from keybroker.journal import decode, encode_issuer, encode_lease, write_time
from keybroker.slots import Record
from keybroker.values import dataclass, field

LONGEST_LINE = 1 << 20
GRACE_SECONDS = 1.0  # what a worker gets beyond its own hard timer
COMMAND = (sys.executable, "-I", "-m", "keybroker.worker")
# What a worker's environment has, where ours has it; nothing else goes in.
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
PASSED_ON = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR"),
        *("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "CREDENTIALS_DIRECTORY"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", *_PROXIES, *(name.lower() for name in _PROXIES)),
    }
)


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What became of one request.

    Attributes:
        ok: The operation's result, or None.
        error: Why there is none. A worker that died is SourceUnavailable with `unknown`.
        records: What it wrote into the journal; None when it died, and the journal must be read.
    """

    id: int
    ok: Mapping[str, Any] | None = field(repr=False)  # may hold a key
    error: KeybrokerError | None
    records: Sequence[Record] | None


class Pool:
    """
    The workers of one process: one for each kind of source, started when needed.

    Args:
        state: The state directory.
        environment: All of ours; workers get what PASSED_ON and `named` allow.
        lock: The owner lock's descriptor, which every worker inherits; None: readers only.
        named: Further variables that the configuration names, by the kind of source they are for:
            a worker of another kind does not have them.
        command: What starts a worker; tests put a program of their own here.
    """

    def __init__(
        self,
        state: Path,
        environment: Mapping[str, str],
        lock: int | None,
        named: Mapping[str, Iterable[str]] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self._state = state
        self._environment = environment
        self._named = named or {}
        self._lock = lock
        self._command = command or COMMAND
        self._workers: dict[str, _Worker] = {}
        self._next_id = 0
        self._kept: list[Answer] = []  # came while somebody waited for another

    def send(self, kind: str, op: str, seconds: float, /, **values: Any) -> int:
        """Ask a worker of a kind for an operation; `seconds` is its hard limit."""
        self._next_id += 1
        message = {"id": self._next_id, "op": op, "seconds": seconds}
        message.update({name: _encode(value) for name, value in values.items()})
        worker = self._workers.get(kind)
        if worker is None or not worker.send(self._next_id, message, seconds):
            if worker is not None:
                worker.end()
            worker = self._workers[kind] = _Worker(lambda: self._start(kind))
            worker.send(self._next_id, message, seconds)
        return self._next_id

    def receive(self, seconds: float) -> list[Answer]:
        """Wait for answers, at most so long. A worker past its limit is killed and answers so."""
        if self._kept:
            kept, self._kept = self._kept, []
            return kept
        until = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            answers = [a for worker in self._workers.values() for a in worker.overdue(now)]
            limits = [w.limit for w in self._workers.values() if w.limit is not None]
            self._drop_dead()
            if answers or now >= until or not limits:
                return answers
            with selectors.DefaultSelector() as selector:
                for worker in self._workers.values():
                    selector.register(worker.output, selectors.EVENT_READ, worker)
                for key, _ in selector.select(max(0.0, min([until, *limits]) - now)):
                    answers += key.data.read()
            self._drop_dead()
            if answers:
                return answers

    def call(self, kind: str, op: str, seconds: float, /, **values: Any) -> Mapping[str, Any]:
        """
        Ask and wait.

        Raises:
            KeybrokerError: What the worker answered, or that it died.
        """
        wanted = self.send(kind, op, seconds, **values)
        others: list[Answer] = []
        mine: Answer | None = None
        while mine is None:
            for answer in self.receive(seconds + 2 * GRACE_SECONDS):
                if answer.id == wanted:
                    mine = answer
                else:
                    others.append(answer)
        self._kept += others
        if mine.error is not None:
            raise mine.error
        return mine.ok or {}

    def close(self, *, at_once: bool = False) -> None:
        """Let the workers finish what they do, and end; or end them where they are."""
        for worker in self._workers.values():
            if at_once:
                worker.kill()
            worker.end()
        self._workers.clear()

    def _drop_dead(self) -> None:
        for kind in [kind for kind, worker in self._workers.items() if worker.dead]:
            self._workers.pop(kind).end()

    def _start(self, kind: str) -> tuple[int, int, int]:
        """Spawn a worker; return its pid, our end of its stdin and of its stdout."""
        allowed = PASSED_ON.union(self._named.get(kind, ()))
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        given = {0: theirs_in, 1: theirs_out}
        if self._lock is not None:
            given[3] = self._lock  # a worker never uses it but to hold the lock
        # Copies above all of these: who was started without stdin has the lock or a pipe there.
        copies = {to: fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 4) for to, one in given.items()}
        try:
            pid = os.posix_spawn(
                self._command[0],
                [*self._command, str(os.getpid()), str(self._state)],
                {k: v for k, v in self._environment.items() if k in allowed},
                file_actions=[(os.POSIX_SPAWN_DUP2, copy, to) for to, copy in copies.items()],
            )
        finally:
            for one in (theirs_in, theirs_out, *copies.values()):
                os.close(one)
        return pid, ours_in, ours_out


class _Worker:
    def __init__(self, start: Callable[[], tuple[int, int, int]]) -> None:
        self._pid, self._input, self.output = start()
        self._waiting: deque[tuple[int, float]] = deque()  # id, seconds
        self._buffer = b""
        self.limit: float | None = None  # when the oldest request is overdue
        self.dead = False

    def send(self, number: int, message: Mapping[str, Any], seconds: float) -> bool:
        data = json.dumps(message).encode() + b"\n"
        if self.dead:
            return False
        old = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        try:
            while data:
                data = data[os.write(self._input, data) :]
        except BrokenPipeError:  # it idled away; anything it still owed us is answered as died
            self.dead = not self._waiting
            return bool(self._waiting)
        finally:
            signal.signal(signal.SIGPIPE, old)
        self._waiting.append((number, seconds))
        self._set_limit()
        return True

    def read(self) -> list[Answer]:
        """Take what the worker wrote; when it ended, answer for all that it still owes."""
        piece = os.read(self.output, 1 << 16)
        self._buffer += piece
        answers = []
        while b"\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\n")
            try:
                answers.append(_decode(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                return answers + self._lost()  # something else writes there
            if self._waiting:
                self._waiting.popleft()
            self._set_limit()
        if not piece or len(self._buffer) > LONGEST_LINE:
            answers += self._lost()
        return answers

    def overdue(self, now: float) -> list[Answer]:
        if self.limit is None or now < self.limit:
            return []
        return self._lost()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def end(self) -> None:
        """Close its stdin and wait for it; it ends by itself within its hard timer."""
        os.close(self._input)
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        os.close(self.output)

    def _lost(self) -> list[Answer]:
        self.dead = True
        self.kill()
        problem = SourceUnavailable("worker: it ended without an answer", unknown=True)
        lost = [Answer(number, None, problem, None) for number, _ in self._waiting]
        self._waiting.clear()
        self.limit = None
        return lost

    def _set_limit(self) -> None:
        oldest = self._waiting[0] if self._waiting else None
        self.limit = time.monotonic() + oldest[1] + GRACE_SECONDS if oldest else None


def variables(config: Config | None) -> dict[str, set[str]]:
    """Return the environment variables that a configuration's sources name, by their type."""
    named: dict[str, set[str]] = {}
    for profile in config.profiles.values() if config else ():
        names = named.setdefault(profile.type, set())
        for value in profile.source.values():
            if isinstance(value, Reference) and value.kind == "env":
                names.add(str(value.value))
        names.update(profile.source.get("environment", ()))
    return named


def _encode(value: Any) -> Any:
    """Put a value into a message. This is the pipe to a worker: secrets leave here."""
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, Credential):
        return {"secret": value.secret.reveal(), "lease": encode_lease(value.lease)}
    if isinstance(value, Profile):
        return {"name": value.name, "raw": value.raw}
    if isinstance(value, Issuer):
        return encode_issuer(value)
    if isinstance(value, Lease):
        return encode_lease(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    return write_time(value) if isinstance(value, datetime) else value


def _decode(line: bytes) -> Answer:
    found = json.loads(line)
    records = [decode(record) for record in found["records"]]
    problem = found.get("error")
    error = None if problem is None else decode_error(problem)
    return Answer(found["id"], found.get("ok"), error, records)


def decode_error(found: Mapping[str, Any]) -> KeybrokerError:
    """Make the error of a worker's answer, of the class that its code names."""
    kind = CLASSES.get(found["code"], KeybrokerError)
    if issubclass(kind, SourceError):
        seconds = found.get("retry_after_s")
        return kind(
            found["message"],
            hint=found.get("hint"),
            unknown=bool(found.get("unknown")),
            retry_after=None if seconds is None else timedelta(seconds=seconds),
        )
    return kind(found["message"], hint=found.get("hint"))
