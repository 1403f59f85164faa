"""Starts workers and speaks JSON lines with them: the parent's side of the pipe."""

import _socket
import fcntl
import json
import os
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from keybroker import aws, vault
from keybroker.carry import decode_session, encode_session
from keybroker.clock import Instant
from keybroker.config import Config, Profile
from keybroker.credential import Credential, Issuer, Lease, Secret, Session
from keybroker.errors import CLASSES, KeybrokerError, SourceError, SourceUnavailable
from keybroker.journal import (
    decode,
    encode_issuer,
    encode_lease,
    write_time,
)
from keybroker.logins import name_of
from keybroker.signin import needed_by
from keybroker.slots import Record
from keybroker.values import dataclass, field

LONGEST_LINE = 1 << 20
AHEAD = 2  # requests that a worker is given: the one that it does, and the next
POLLS_AHEAD = 20  # of polls, whose answers come together
REAP_SECONDS = 0.05  # between two looks whether a worker is over
GRACE_SECONDS = 1.0  # what a worker gets beyond its own hard timer
COMMAND = (sys.executable, "-I", "-m", "keybroker.worker")
_NO_SIGNAL = getattr(_socket, "MSG_NOSIGNAL", 0)  # Python ignores SIGPIPE where it is missing
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
        sessions: Those that it began or renewed on the way.
    """

    id: int
    ok: Mapping[str, Any] | None = field(repr=False)  # may hold a key
    error: KeybrokerError | None
    records: Sequence[Record] | None
    sessions: Sequence[Session] = field(default=(), repr=False)


class Pool:
    """
    The workers of one process: one for each kind of source, started when needed.

    A worker is given few requests ahead; the others wait here, so that an urgent one passes them
    and no pipe is ever full. `fileno` becomes readable when `receive` has something to do.

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
        self.named = named or {}
        self._lock = lock
        self._command = command or COMMAND
        self._workers: dict[str, _Worker] = {}
        self._queues: dict[str, deque[_Request]] = {}
        self._ended: list[_Worker] = []  # to be reaped
        self._next_id = 0
        self._kept: list[Answer] = []  # came while somebody waited for another
        self._selector = selectors.DefaultSelector()

    def fileno(self) -> int:
        selector: Any = self._selector  # all that DefaultSelector stands for have one
        number: int = selector.fileno()
        return number

    @property
    def limit(self) -> float | None:
        """When, by the monotonic clock, `receive` has something to do though no pipe has."""
        if self._kept:
            return 0.0
        if self._ended:
            return time.monotonic() + REAP_SECONDS
        return min((w.limit for w in self._workers.values() if w.limit is not None), default=None)

    @property
    def quiet(self) -> bool:
        """Say whether no worker does anything that it was asked for, or is still ending."""
        waiting = any(self._queues.values()) or any(w.waiting for w in self._workers.values())
        return not (waiting or self._ended)

    def send(
        self, kind: str, op: str, seconds: float, /, *, urgent: bool = False, **values: Any
    ) -> int:
        """Ask a worker of a kind for an operation; `seconds` is its hard limit."""
        self._next_id += 1
        message = {"id": self._next_id, "op": op, "seconds": seconds}
        message.update({name: _encode(value) for name, value in values.items()})
        ahead = POLLS_AHEAD if op == "poll" else AHEAD
        request = _Request(self._next_id, json.dumps(message).encode() + b"\n", seconds, ahead)
        queue = self._queues.setdefault(kind, deque())
        if urgent:
            queue.appendleft(request)
        else:
            queue.append(request)
        self._pass_on(kind)
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
            limit = self.limit
            if not answers:  # where nobody owes an answer, one that idled away is still read
                patience = 0.0 if limit is None else max(0.0, min(until, limit) - now)
                for key, _ in self._selector.select(patience):
                    answers += key.data.read()
            self._tidy()
            if answers or limit is None or time.monotonic() >= until:
                return answers

    def call(self, kind: str, op: str, seconds: float, /, **values: Any) -> Mapping[str, Any]:
        """
        Ask and wait; return what the operation returned.

        Raises:
            KeybrokerError: What the worker answered, or that it died.
        """
        answer = self.ask(kind, op, seconds, **values)
        if answer.error is not None:
            raise answer.error
        return answer.ok or {}

    def ask(self, kind: str, op: str, seconds: float, /, **values: Any) -> Answer:
        """Ask and wait for the whole answer."""
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
        return mine

    def close(self, *, at_once: bool = False) -> None:
        """Let the workers finish what they do, and end; or end them where they are."""
        self._queues.clear()
        for kind in list(self._workers):
            self._part_with(kind, kill=at_once)
        for worker in self._ended:
            worker.reap(wait=True)
        self._ended.clear()

    def _pass_on(self, kind: str) -> None:
        """Give a kind's worker what it may have ahead; start one if there is none."""
        queue = self._queues[kind]
        while queue:
            worker = self._workers.get(kind)
            if worker is None:
                try:
                    worker = _Worker(*self._start(kind))
                except OSError as error:
                    problem = SourceUnavailable(f"worker: could not start ({error.strerror})")
                    self._kept += [Answer(one.id, None, problem, ()) for one in queue]
                    queue.clear()
                    return
                self._workers[kind] = worker
                self._selector.register(worker.pipe, selectors.EVENT_READ, worker)
            if len(worker.waiting) >= queue[0].ahead:
                return
            if worker.send(queue[0]):
                queue.popleft()
            elif worker.waiting:  # it ended; what it still owed comes first
                return
            else:
                self._part_with(kind)

    def _tidy(self) -> None:
        """Part with the workers that died, pass on what waits, reap who ended."""
        for kind in [kind for kind, worker in self._workers.items() if worker.dead]:
            self._part_with(kind)
        for kind, queue in self._queues.items():
            if queue:
                self._pass_on(kind)
        self._ended = [worker for worker in self._ended if not worker.reap()]

    def _part_with(self, kind: str, *, kill: bool = False) -> None:
        worker = self._workers.pop(kind)
        self._selector.unregister(worker.pipe)
        if kill or worker.dead:
            worker.kill()
        worker.let_go()
        self._ended.append(worker)

    def _start(self, kind: str) -> tuple[int, _socket.socket]:
        """Spawn a worker; return its pid and our end of its stdin and stdout."""
        allowed = PASSED_ON.union(self.named.get(kind, ()))
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        copies: dict[int, int] = {}
        try:
            ours.setblocking(False)
            given = {0: theirs.fileno(), 1: theirs.fileno()}
            if self._lock is not None:
                given[3] = self._lock  # a worker never uses it but to hold the lock
            # Copies above all of these: who was started without stdin has the lock or a pipe there.
            for to, one in given.items():
                copies[to] = fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 4)
            pid = os.posix_spawn(
                self._command[0],
                [*self._command, str(os.getpid()), str(self._state)],
                {k: v for k, v in self._environment.items() if k in allowed},
                file_actions=[(os.POSIX_SPAWN_DUP2, copy, to) for to, copy in copies.items()],
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            for copy in copies.values():
                os.close(copy)
        return pid, ours


@dataclass(frozen=True, slots=True)
class _Request:
    id: int
    line: bytes = field(repr=False)  # may hold a key
    seconds: float
    ahead: int


class _Worker:
    """One process, and what it was asked and has not answered."""

    def __init__(self, pid: int, pipe: _socket.socket) -> None:
        self.pid, self.pipe = pid, pipe
        self.waiting: deque[_Request] = deque()
        self._buffer = b""
        self.limit: float | None = None  # when the oldest request is overdue
        self.dead = False

    def send(self, request: _Request) -> bool:
        """Hand a request on; False when the worker takes no more."""
        if self.dead:
            return False
        try:
            sent = self.pipe.send(request.line, _NO_SIGNAL)
            if sent < len(request.line):  # larger than all that a socket holds: it reads now
                self.pipe.settimeout(request.seconds)
                self.pipe.sendall(request.line[sent:], _NO_SIGNAL)
        except OSError:  # it idled away; anything it still owes us is answered as died
            self.dead = not self.waiting
            return False
        finally:
            self.pipe.setblocking(False)
        self.waiting.append(request)
        if len(self.waiting) == 1:
            self._set_limit()
        return True

    def read(self) -> list[Answer]:
        """Take what the worker wrote; when it ended, answer for all that it still owes."""
        try:
            piece = self.pipe.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:  # it ended with something of ours unread
            piece = b""
        self._buffer += piece
        answers = []
        while b"\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\n")
            try:
                answers.append(_decode(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                return answers + self._lost()  # something else writes there
            if self.waiting:
                self.waiting.popleft()
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
            os.kill(self.pid, signal.SIGKILL)

    def let_go(self) -> None:
        """Close its stdin: it finishes what it does and ends."""
        with suppress(OSError):
            self.pipe.shutdown(_socket.SHUT_WR)

    def reap(self, *, wait: bool = False) -> bool:
        """Say whether it is over."""
        try:
            over = os.waitpid(self.pid, 0 if wait else os.WNOHANG)[0] != 0
        except ChildProcessError:
            over = True
        if over:
            self.pipe.close()
        return over

    def _lost(self) -> list[Answer]:
        self.dead = True
        self.kill()
        problem = SourceUnavailable("worker: it ended without an answer", unknown=True)
        lost = [Answer(request.id, None, problem, None) for request in self.waiting]
        self.waiting.clear()
        self.limit = None
        return lost

    def _set_limit(self) -> None:
        oldest = self.waiting[0] if self.waiting else None
        self.limit = time.monotonic() + oldest.seconds + GRACE_SECONDS if oldest else None


def variables(config: Config | None, issuers: Iterable[Issuer] = ()) -> dict[str, set[str]]:
    """
    Return the environment variables that sources need, by their type.

    Args:
        config: Whose sources name them.
        issuers: Those of the journal, whose keys are still to be revoked there.
    """
    named: dict[str, set[str]] = {}
    for profile in config.profiles.values() if config else ():
        named.setdefault(profile.type, set()).update(profile.source.get("environment", ()))
    for issuer in (*_asked(config), *issuers):
        names = named.setdefault(issuer.type, set())
        if issuer.admin is not None and issuer.admin.kind == "env":
            names.add(str(issuer.admin.value))
        if issuer.vault:
            names |= vault.variables(issuer.vault)
        if issuer.aws:
            names.update(aws.VARIABLES)
        for sign_in in needed_by(issuer):
            names |= sign_in.variables
    for sign_in in config.logins.values() if config else ():
        named.setdefault("login", set()).update(sign_in.variables)
    return named


def sessions(config: Config, issuers: Iterable[Issuer] = ()) -> list[str]:
    """Return the names of the sessions that a configuration and a journal's issuers may need."""
    return sorted({name for one in (*_asked(config), *issuers) if (name := name_of(one))})


def _asked(config: Config | None) -> list[Issuer]:
    profiles = config.profiles.values() if config else ()
    return [issuer for profile in profiles for issuer in profile.asked]


def _encode(value: Any) -> Any:
    """Put a value into a message. This is the pipe to a worker: secrets leave here."""
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, Credential):
        return {"secret": value.secret.reveal(), "lease": encode_lease(value.lease)}
    if isinstance(value, Instant):
        return {"wall": write_time(value.wall), "boot": value.boot, "boot_id": value.boot_id}
    if isinstance(value, Session):
        return encode_session(value)
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
    sessions = [decode_session(session) for session in found.get("sessions", ())]
    return Answer(found["id"], found.get("ok"), error, records, sessions)


def decode_error(found: Mapping[str, Any]) -> KeybrokerError:
    """Make the error of a worker's answer, of the class that its code names."""
    kind = CLASSES.get(found["code"], KeybrokerError)
    if issubclass(kind, SourceError):
        seconds = found.get("retry_after_s")
        return kind(
            found["message"],
            hint=found.get("hint"),
            unknown=bool(found.get("unknown")),
            withdrawn=bool(found.get("withdrawn")),
            retry_after=None if seconds is None else timedelta(seconds=seconds),
        )
    return kind(found["message"], hint=found.get("hint"))
