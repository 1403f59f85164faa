"""What is answered to whom: the key at once, or after a look, or why there is none."""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from keybroker import wire
from keybroker.audit import Audit
from keybroker.broker import Broker
from keybroker.config import Config
from keybroker.errors import ConfigError, KeybrokerError, NobodyAnswers, NotReady, SourceDenied
from keybroker.handout import Handout
from keybroker.journal import write_time
from keybroker.push import SettingsFiles
from keybroker.server import Client
from keybroker.sessions import Session, Sessions, identify
from keybroker.values import dataclass

KEY_SECONDS = wire.WAIT_SECONDS - 0.5  # until a waiting client is told that there is none
CHECK_SECONDS = 5.0  # until one that may have been refused gets the key that there is
CHECKS_APART = 10.0  # for one profile
AUDIT_SECONDS = 0.2  # until it is written down who was given what
_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
OTHER_VERSION = f"this daemon speaks version {wire.VERSION} of its protocol"

FOR_OTHERS = ("about", "status", "glance")  # what the users of a shared host may ask for

Operation = Callable[[Mapping[str, Any], Client], "Job | None"]


@dataclass(slots=True)
class Job:
    """
    A request for control that takes time.

    Attributes:
        result: Called until it returns what is to be answered; it may raise a KeybrokerError.
        until: When, by the monotonic clock, it is called for the last time.
        lasts: The answer is a line of what is told, and the connection stays open after it.
    """

    client: Client
    result: Callable[[bool], Any | None]
    until: float
    lasts: bool = False


@dataclass(slots=True)
class _Waiting:
    client: Client
    asked: wire.Asked
    session: Session | None
    until: float
    check: bool  # it has a key, which may have been refused


class Answers:
    """
    Answers requests. Without a broker, while journal and cache are being read, everybody waits.

    Args:
        config: The last good one.
        audit: Who was given what.
        files: The settings files that clients watch.
        operations: What can be asked for by control requests, by name.
    """

    def __init__(
        self,
        config: Config,
        audit: Audit,
        files: SettingsFiles,
        operations: Mapping[str, Operation],
    ) -> None:
        self.broker: Broker | None = None
        self.excuse: Callable[[], KeybrokerError | None] = lambda: None  # why nothing is done now
        self.expects: Callable[[str], bool] = lambda name: False  # it may yet be made for a program
        self.config = config
        self.owners: frozenset[int] = frozenset()  # the uids that may have and ask for everything
        self.others: Mapping[int, Config] = {}  # what each of the other users may have, by uid
        self.named = False  # a settings file that was not known before
        self.stirred = False  # something is to be settled that was not a moment ago
        self._audit = audit
        self._files = files
        self._operations = operations
        self._sessions = Sessions()
        self._waiting: dict[str, list[_Waiting]] = {}
        self._jobs: list[Job] = []
        self._checked: dict[str, float] = {}
        self._given: dict[tuple[str, str, int, int, str], tuple[int, float, float]] = {}
        self._audit_at = 0.0

    # requests

    def at_once(self, line: bytes, uid: int) -> bytes | None:
        """Answer a request if nothing has to be done for it."""
        try:
            asked = wire.read_request(line)
        except wire.OtherVersion:
            return wire.error_line(_other_version())
        except ValueError:
            return wire.error_line(NobodyAnswers("the daemon was asked in words it does not know"))
        if isinstance(asked, dict):
            return None
        config, ours = self.config_of(uid), uid in self.owners
        if ours and asked.ttl_ms and asked.directory and self._files.name(asked.directory):
            self.named = self.stirred = True
        if self.broker is None:
            return None
        name = asked.profile
        if name not in config.profiles:
            try:
                name = config.profile(name or None).name
            except ConfigError as error:
                return None if ours and self.expects(name) else wire.error_line(error)
        found = self.broker.ready.get(name)
        now = time.time()
        if found is None or not found.alive(now, time.clock_gettime(_BOOT)):
            found = self.broker.handout(name)
            if found is None:
                return None
        session = self._session(asked, uid)
        if asked.ttl_ms and session is not None and self._suspicious(asked, name, session, found):
            return None
        return self._give(name, found, session, uid, now)

    def later(self, line: bytes, client: Client) -> None:
        """Take over a client whose request needs something done."""
        asked = wire.read_request(line)
        if isinstance(asked, dict):
            self._control(asked, client)
            return
        name = asked.profile
        config = self.config_of(client.uid)
        try:
            name = config.profile(name or None).name
        except ConfigError as error:
            if client.uid not in self.owners or not self.expects(name):
                client.send(wire.error_line(error), last=True)
                return
        session = self._session(asked, client.uid)
        now = time.monotonic()
        known = self.broker is not None and name in self.config.profiles
        check = known and self.broker is not None and self.broker.handout(name) is not None
        until = now + (CHECK_SECONDS if check else KEY_SECONDS)
        waiting = self._waiting.setdefault(name, [])
        looks = any(one.check for one in waiting)  # another look would keep them waiting
        waiting.append(_Waiting(client, asked, session, until, check))
        client.send(wire.WAIT)
        if self.broker is None or not known:
            return
        if not check:
            self.broker.ask(name)
        elif not looks:
            self._checked[name] = now
            self.broker.check(name)

    def begin(self, broker: Broker) -> None:
        """Answer from this broker from now on."""
        self.broker = broker
        for name in self._waiting:
            if name in self.config.profiles:  # still
                broker.ask(name)

    @property
    def due(self) -> float | None:
        """When, by the monotonic clock, `settle` has something to do."""
        ends = [one.until for group in self._waiting.values() for one in group[:1]]
        ends += [job.until for job in self._jobs]
        if self._given:
            ends.append(self._audit_at)
        return min(ends, default=None)

    @property
    def commanded(self) -> bool:
        """Say whether somebody waits for what was asked with a request for control."""
        return bool(self._jobs)

    @property
    def busy(self) -> bool:
        """Say whether anybody waits for anything."""
        return bool(self._jobs or self._waiting)

    def settle(self) -> None:
        """Answer those whose answer is there, or whose time is over; write the audit log."""
        self.stirred = False
        now = time.monotonic()
        for name, group in list(self._waiting.items()):
            left = [one for one in group if not self._settled(name, one, now)]
            if left:
                self._waiting[name] = left
            else:
                del self._waiting[name]
        for job in list(self._jobs):
            if job.client.closed or self._done(job, now):
                self._jobs.remove(job)
        if now >= self._audit_at:
            self.write_audit()

    def write_audit(self) -> None:
        """Write down who was given what since the last time, one line for each asker and key."""
        if not self._given:
            return
        given, self._given = self._given, {}
        lines: list[dict[str, str | int]] = []
        for (name, fingerprint, uid, pid, program), (count, first, last) in given.items():
            line: dict[str, str | int] = {
                "at": _written(first),
                "event": "given",
                "profile": name,
                "fingerprint": fingerprint,
                "uid": uid,
                "pid": pid,
                "program": program,
            }
            if count > 1:
                line.update(times=count, until=_written(last))
            lines.append(line)
        self._audit.add(*lines)

    def give_up(self, problem: KeybrokerError) -> None:
        """Tell everybody who waits that they will not be answered."""
        for group in self._waiting.values():
            for one in group:
                one.client.send(wire.error_line(problem), last=True)
        for job in self._jobs:
            job.client.send(wire.refusal(problem, telling=job.lasts), last=True)
        self._waiting.clear()
        self._jobs.clear()

    def config_of(self, uid: int) -> Config:
        """Return what a user may have: nothing, if the configuration names them no more."""
        if uid in self.owners:
            return self.config
        return self.others.get(uid) or self.config.of(())

    # keys

    def _session(self, asked: wire.Asked, uid: int) -> Session | None:
        """Return whose key it is to be; processes of other users are not to be seen by us."""
        if uid not in self.owners:
            return Session(asked.pid, 0, "?") if asked.pid > 0 else None
        return identify(asked.pid)

    def _give(
        self, name: str, found: Handout, session: Session | None, uid: int, now: float
    ) -> bytes:
        fingerprint = found.secret.fingerprint
        if session is None:
            asker = (name, fingerprint, uid, 0, "?")
        else:
            asker = (name, fingerprint, uid, session.pid, session.name)
            self._sessions.given(session, name, fingerprint, now)
        if not self._given:
            self._audit_at = time.monotonic() + AUDIT_SECONDS
            self.stirred = True
        count, first, _ = self._given.get(asker, (0, now, now))
        self._given[asker] = (count + 1, first, now)
        return wire.ok(found.secret.reveal())

    def _suspicious(self, asked: wire.Asked, name: str, session: Session, found: Handout) -> bool:
        """Say whether the gateway is to be asked before this one is given the key again."""
        fingerprint, ttl_ms = found.secret.fingerprint, asked.ttl_ms
        now = time.time()
        if not self._sessions.suspicious(session, name, fingerprint, ttl_ms, now, None):
            return False
        changed_at = self._files.changed_at()
        if not self._sessions.suspicious(session, name, fingerprint, ttl_ms, now, changed_at):
            return False
        if self._waiting.get(name):
            return True  # the look that is under way is for this one too
        last = self._checked.get(name)
        return last is None or time.monotonic() - last >= CHECKS_APART

    def _settled(self, name: str, one: _Waiting, now: float) -> bool:
        if one.client.closed:
            return True
        broker = self.broker
        if broker is None:
            if now < one.until:
                return False
            one.client.send(wire.error_line(NotReady("the daemon is still starting")), last=True)
            return True
        if name not in self.config.profiles and now < one.until and self.expects(name):
            return False
        if name not in self.config.profiles:  # any more
            one.client.send(
                wire.error_line(NotReady(f"{name}: is not configured any more")), last=True
            )
            return True
        late = now >= one.until
        if one.check and not late and not broker.checked(name):
            return False
        found = broker.handout(name)
        if found is not None:
            reply = self._give(name, found, one.session, one.client.uid, time.time())
            one.client.send(reply, last=True)
            return True
        if late or broker.settled(name):
            problem = self.excuse() or broker.why_not(name)
            one.client.send(wire.error_line(problem), last=True)
            return True
        return False

    # control

    def _control(self, asked: Mapping[str, Any], client: Client) -> None:
        operation = self._operations.get(str(asked["op"]))
        try:
            if operation is None:
                raise NobodyAnswers(
                    f"the daemon does not know {str(asked['op'])[:32]!r}; it may be older",
                    hint="keybroker daemon --stop",
                )
            if client.uid not in self.owners and asked["op"] not in FOR_OTHERS:
                raise SourceDenied("only root may ask the daemon of a shared host for this")
            job = operation(asked, client)
        except KeybrokerError as error:
            client.send(wire.refusal(error, telling=asked["op"] in wire.TELLING), last=True)
            return
        if job is not None and not self._done(job, time.monotonic()):
            self._jobs.append(job)

    def _done(self, job: Job, now: float) -> bool:
        try:
            found = job.result(now >= job.until)
        except KeybrokerError as error:
            job.client.send(wire.refusal(error, telling=job.lasts), last=True)
            return True
        if found is None:
            return False
        job.client.send(wire.told(found) if job.lasts else wire.answer(found), last=not job.lasts)
        return True


def _written(seconds: float) -> str:
    return write_time(datetime.fromtimestamp(seconds, UTC))


def _other_version() -> KeybrokerError:
    return NobodyAnswers(OTHER_VERSION, hint="keybroker daemon --stop")
