"""A world in one process: clocks, a disk, a gateway and workers that can all go wrong.

The broker, the rule, the journal and the worker's operations are the real ones. Time is a number,
a crash is an exception that nothing catches.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from keybroker import worker
from keybroker.broker import Broker
from keybroker.clock import Clock, Instant
from keybroker.config import Profile, read_profile
from keybroker.credential import Credential, Lease, Look, Secret, Verdict, sha256
from keybroker.document import Where
from keybroker.errors import SourceInvalid, SourceUnavailable
from keybroker.handout import Sealed
from keybroker.journal import Journal
from keybroker.paths import Disk
from keybroker.pool import Answer, _decode, _encode
from keybroker.rotation import Kind
from keybroker.slots import Slots, replay
from keybroker.sources import Capabilities

START = datetime(2026, 11, 21, 12, tzinfo=UTC)
STATE = Path("/nowhere/keybroker")
WRAP_KEY = Secret("5a" * 32)


class Crash(BaseException):
    """The end of a process at this very point; `who` is worker, command or both."""

    def __init__(self, who: str) -> None:
        super().__init__(who)
        self.who = who


class Time(Clock):
    """True time, and what the machine believes."""

    def __init__(self) -> None:
        self.true = 0.0  # seconds
        self.error = 0.0  # how far the wall clock is off
        self.boot_error = 0.0
        self.boot_id = "boot 1"

    def read(self) -> Instant:
        wall = START + timedelta(seconds=self.true + self.error)
        return Instant(wall, 1000.0 + self.true + self.boot_error, self.boot_id)

    @property
    def now(self) -> datetime:
        """True time, by which the gateway lives."""
        return START + timedelta(seconds=self.true)

    def reboot(self) -> None:
        self.boot_id = f"boot {int(self.boot_id.split()[1]) + 1}"
        self.boot_error = -self.true - 1000.0


class MemoryDisk(Disk):
    """Files in a dictionary. `lose_power` forgets what was not synced."""

    def __init__(self) -> None:
        self.files: dict[Path, bytes] = {}
        self.safe: dict[Path, bytes] = {}

    def read(self, path: Path, last: int | None = None) -> bytes | None:
        found = self.files.get(path)
        return found if last is None or found is None else found[-last:]

    def directory(self, path: Path) -> None:
        pass

    def append(self, path: Path, data: bytes) -> None:
        self.files[path] = self.files.get(path, b"") + data

    def sync(self, path: Path) -> None:
        self.safe[path] = self.files[path]

    def truncate(self, path: Path, size: int) -> None:
        self.files[path] = self.files[path][:size]

    def replace(self, path: Path, data: bytes) -> None:
        self.files[path] = self.safe[path] = data

    def remove(self, path: Path) -> None:
        self.files.pop(path, None)
        self.safe.pop(path, None)

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        yield

    def lose_power(self) -> None:
        self.files = dict(self.safe)


@dataclass
class GatewayKey:
    label: str
    secret: str
    born: float
    ends: float
    revoked: float | None = None

    def alive(self, true: float) -> bool:
        return self.born <= true < self.ends and (self.revoked is None or true < self.revoked)


@dataclass
class Gateway:
    """
    A key API in memory. `plan` names what the next calls do, oldest first; then all is well.

    ok, down (never sent), refuse (503, not committed), drop (commits, no answer), lost (no
    answer, not committed), late (no answer, commits 30 s later), bad (a key that it then refuses),
    500 (an error, not committed), 500 and committed
    """

    time: Time
    name: str = "one"
    keys: dict[str, GatewayKey] = field(default_factory=dict)
    plan: list[str] = field(default_factory=list)
    out: bool = False  # an outage: everything is down
    mints: list[float] = field(default_factory=list)
    calls: list[tuple[float, str]] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    only_bad: bool = False  # every new key is one that it then refuses
    seconds_per_call: float = 0.05
    lifetime: float = 0.0

    def alive(self) -> list[GatewayKey]:
        return [key for key in self.keys.values() if key.alive(self.time.true)]

    def begin(self, what: str) -> str:
        self.calls.append((self.time.true, what))
        self.time.true += self.seconds_per_call
        if self.out:
            return "down"
        return self.plan.pop(0) if self.plan else "ok"


class GatewaySource:
    """The adapter for it."""

    capabilities = Capabilities(Kind.MINTED, find=True, revoke=True, enforces_expiry=True)

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def issue(self, label: str) -> Credential:
        gateway, time = self._gateway, self._gateway.time
        asked_at = time.read().wall
        gateway.mints.append(time.true)
        fate = gateway.begin("mint")
        if fate in ("down", "refuse"):
            raise SourceUnavailable("gateway: is down")
        text = f"sk-{len(gateway.keys)}-{sha256(label.encode())[:24]}"
        born = time.true + (30.0 if fate == "late" else 0.0)
        if fate not in ("lost", "500"):
            gateway.keys[text] = GatewayKey(label, text, born, born + gateway.lifetime)
        if fate in ("drop", "lost", "late"):
            time.true += 8.0
            raise SourceUnavailable("gateway: did not answer in time", unknown=True)
        if fate in ("500", "500 and committed"):
            raise SourceUnavailable("gateway: failed (500)", unknown=True, over=True)
        if fate == "bad" or self._gateway.only_bad:
            gateway.bad.add(text)
        ends = asked_at + timedelta(seconds=gateway.lifetime)
        return Credential(Secret(text), Lease(text, "litellm", asked_at, ends, revocable=True))

    def find(self, label: str) -> Sequence[Lease]:
        self._must_answer("find")
        return [
            Lease(key.secret, "litellm", START)
            for key in self._gateway.keys.values()
            if key.label == label and key.revoked is None and key.born <= self._gateway.time.true
        ]

    def revoke(self, lease: Lease) -> None:
        fate = self._gateway.begin("revoke")
        key = self._gateway.keys.get(lease.id)
        if fate in ("down", "refuse", "lost", "late"):
            raise SourceUnavailable("gateway: is down", unknown=True)
        if key is not None and key.revoked is None:
            key.revoked = self._gateway.time.true
        if fate == "drop":
            raise SourceUnavailable("gateway: did not answer in time", unknown=True)

    def verify(self, secret: Secret) -> Verdict:
        fate = self._gateway.begin("verify")
        if fate != "ok":
            return Verdict(Look.UNDECIDED, "models", "503 error")
        key = self._gateway.keys.get(secret.reveal())
        if key is None or not key.alive(self._gateway.time.true) or key.secret in self._gateway.bad:
            return Verdict(Look.REFUSED, "models", "401")
        return Verdict(Look.ALIVE, "models", "200")

    def sweep(self, prefix: str) -> Sequence[tuple[str, Lease]]:
        return ()

    def close(self) -> None:
        pass

    def _must_answer(self, what: str) -> None:
        if self._gateway.begin(what) != "ok":
            raise SourceUnavailable("gateway: is down", unknown=True)


class InProcess:
    """Workers without processes: what is sent is done at once, through the same messages."""

    def __init__(self, operations: worker.Operations) -> None:
        self.operations = operations
        self._answers: list[Answer] = []
        self._next = 0

    def send(
        self, kind: str, op: str, seconds: float, /, *, urgent: bool = False, **values: Any
    ) -> int:
        self._next += 1
        message = {"id": self._next, "op": op, "seconds": seconds}
        message.update({name: _encode(value) for name, value in values.items()})
        message = json.loads(json.dumps(message))
        try:
            reply = worker.answer(self.operations, message)
            line = json.dumps(reply).encode()
            worker.perform("answer", lambda: None)
            self._answers.append(_decode(line))
        except Crash as crash:
            if crash.who != "worker":
                raise
            problem = SourceUnavailable("worker: it ended without an answer", unknown=True)
            self._answers.append(Answer(self._next, None, problem, None))
        return self._next

    def receive(self, seconds: float) -> list[Answer]:
        answers, self._answers = self._answers, []
        return answers


@dataclass
class Tenure:
    """One key's time as the one that readers of a shelf find."""

    secret: str
    since: float
    until: float | None = None
    abandoned: bool = False  # its profile publishes elsewhere, or not at all


@dataclass
class Shelf:
    """
    Where keys are published, in memory. `plan` names what the next calls do; then all is well.

    ok, down (nothing was done), drop (done, no answer), beaten (another host publishes just before)

    Attributes:
        beside: A key can be put there before it is what others read, as AWS has it; not so Vault.
        versions: By their ids: label and text.
        tenures: What was read there, in order; others' keys among them.
    """

    time: Time
    beside: bool = True
    versions: dict[str, tuple[str, str]] = field(default_factory=dict)
    current: str = ""
    tenures: list[Tenure] = field(default_factory=list)
    plan: list[str] = field(default_factory=list)
    out: bool = False
    calls: list[tuple[float, str]] = field(default_factory=list)

    @property
    def text(self) -> str | None:
        return self.tenures[-1].secret if self.tenures else None

    def put(self, version: str, label: str, text: str) -> None:
        """Make a key the one that is read."""
        if self.tenures:
            self.tenures[-1].until = self.time.true
        self.versions[version] = label, text
        self.current = version
        self.tenures.append(Tenure(text, self.time.true))

    def overtake(self) -> None:
        """Have another host publish a key of its own."""
        number = len(self.tenures) + 1
        self.put(f"other-{number}" if self.beside else str(number), "other", f"sk-other-{number}")

    def abandon(self) -> None:
        """Nobody publishes here any more; who still reads here was left behind."""
        if self.tenures:
            self.tenures[-1].abandoned = True


class ShelfStore:
    """The adapter for it."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def standing(self) -> str:
        with self._call("standing"):
            return self._shelf.current

    def stage(self, label: str, credential: Credential) -> None:
        if self._shelf.beside:
            with self._call("stage"):
                self._shelf.versions.setdefault(label, (label, credential.secret.reveal()))

    def recover(self, label: str) -> Secret | None:
        shelf = self._shelf
        with self._call("recover"):
            found = shelf.versions.get(label if shelf.beside else shelf.current)
            return Secret(found[1]) if found is not None and found[0] == label else None

    def promote(self, label: str, credential: Credential, base: str) -> bool:
        shelf = self._shelf
        with self._call("promote"):
            if shelf.tenures and shelf.versions[shelf.current][0] == label:
                return True
            if shelf.current != base:
                return False
            if shelf.beside and label not in shelf.versions:
                raise SourceInvalid("shelf: there is no such version")
            version = label if shelf.beside else str(len(shelf.tenures) + 1)
            shelf.put(version, label, credential.secret.reveal())
            return True

    def close(self) -> None:
        pass

    @contextmanager
    def _call(self, what: str) -> Iterator[None]:
        shelf = self._shelf
        shelf.calls.append((shelf.time.true, what))
        shelf.time.true += 0.05
        fate = "down" if shelf.out else shelf.plan.pop(0) if shelf.plan else "ok"
        if fate == "down":
            raise SourceUnavailable("shelf: is down")
        if fate == "beaten":
            shelf.overtake()
        yield
        if fate == "drop":
            raise SourceUnavailable("shelf: did not answer in time", unknown=True)


def profile(
    name: str = "work", hold: str = "15m", publish: str | None = None, **source: Any
) -> Profile:
    """Read a minting profile; with `publish`, one whose keys are put on the shelf of that name."""
    raw: dict[str, Any] = {
        "base_url": "http://127.0.0.1:1",
        "helper_ttl": "60s",
        "hold": hold,
        "source": {"type": "litellm", "admin": {"env": "ADMIN"}, "lifetime": "2h", **source},
    }
    if publish is not None:
        raw["publish"] = {"to": "aws", "secret": publish, "region": "us-east-1"}
    return read_profile(name, raw, Where({}, "test"))


@dataclass
class HandedOut:
    at: float
    secret: str


class World:
    """One host with one profile, its gateway, and everything that was handed out."""

    def __init__(self, profile: Profile, roll: Callable[[], float] = lambda: 0.5) -> None:
        self.time = Time()
        self.disk = MemoryDisk()
        self.profile = profile
        self.roll = roll
        self.gateway = Gateway(self.time)
        self.gateway.lifetime = profile.policy.lifetime.total_seconds()
        self.shelves: dict[str, Shelf] = {}
        self.beside = True  # of shelves that are made from now on
        self.handed_out: list[HandedOut] = []
        self.crash_at: tuple[int, str, str] | None = None  # n-th effect from now, side, who
        self.effects: list[str] = []
        self.most_alive = 0
        self.start()

    def start(self) -> None:
        """A new process: journal and cache are all that it knows."""
        operations = worker.Operations(
            STATE,
            {},
            clock=self.time,
            disk=self.disk,
            build=lambda *_: self.source(),
            revoker=lambda *_: self.source(),
            store=lambda profile, *_: ShelfStore(self.shelf(profile)),
        )
        self.workers = InProcess(operations)
        message = {
            "id": 0,
            "op": "load",
            "profile": self.profile.name,
            "wrap_key": WRAP_KEY.reveal(),
        }
        reply = json.loads(json.dumps(worker.answer(operations, message)))
        sealed = Sealed.read(reply["ok"]["cached"]) if "ok" in reply else None
        self.journal = Journal(STATE, self.disk)
        self.broker = Broker(
            [self.profile],
            self.journal.read(),
            {} if sealed is None else {self.profile.name: sealed},
            self.workers,
            instance="0a1b2c3d",
            wrap_key=WRAP_KEY,
            mints={self.profile.name},
            clock=self.time,
            roll=self.roll,
            reread=self.journal.read,
        )

    def source(self) -> Any:
        """Return what a worker has of the gateway."""
        return GatewaySource(self.gateway)

    def shelf(self, profile: Profile | None = None) -> Shelf:
        """Return where a profile's keys are published."""
        publish = (profile or self.profile).publish
        assert publish is not None
        name = str(publish.settings["secret"])
        return self.shelves.setdefault(name, Shelf(self.time, self.beside))

    def perform(self, effect: str, call: Callable[[], Any]) -> Any:
        """Stand in for worker.perform: count, and crash where it was asked for."""
        self.effects.append(effect)
        if self.crash_at is not None:
            left, side, who = self.crash_at
            if left == 0:
                self.crash_at = None
                if side == "after":
                    call()
                raise Crash(who)
            self.crash_at = (left - 1, side, who)
        return call()

    def run(self, seconds: float) -> None:
        """Let time pass, doing what is due; a crashed command is started again."""
        until = self.time.true + seconds
        while self.time.true < until:
            wake = self.turn()
            left = until - self.time.true
            pause = left
            if wake is not None:
                pause = min(left, max(0.0, (wake - self.time.read().wall).total_seconds()))
            self.time.true += max(pause, 0.01)

    def turn(self) -> datetime | None:
        try:
            wake = self.broker.turn()
            started = len(self.effects)
            while self.broker.busy:
                assert len(self.effects) - started < 300, f"no end: {self.effects[-12:]}"
                self.broker.take(self.workers.receive(0))
                self.watch()
                wake = self.broker.turn()
            return wake
        except Crash:
            self.start()
            return self.broker.now()

    def watch(self) -> None:
        """Note what is to be looked at in the end."""
        self.most_alive = max(self.most_alive, len(self.gateway.alive()))

    def ask(self) -> str | None:
        """A reader asks, as the helper does."""
        self.turn()
        found = self.broker.credential(self.profile.name)
        if found is None:
            return None
        self.handed_out.append(HandedOut(self.time.true, found.secret.reveal()))
        return found.secret.reveal()

    @property
    def slots(self) -> Slots:
        """What the journal knows, read anew."""
        return replay(Journal(STATE, self.disk).read()).get(self.profile.name, Slots())


class DaemonWorld(World):
    """
    The same host with a daemon: only what changed or fell due is looked at, until it is killed.

    Attributes:
        keyring: Whether it is open. A daemon that starts while it is not has no sealed key, and
            keeps a new one in memory.
        overslept: What it would have done at once, had it looked at all profiles as it went to
            sleep.
    """

    keyring = True
    most = 8

    def __init__(self, profile: Profile, roll: Callable[[], float] = lambda: 0.5) -> None:
        self.overslept: list[str] = []
        super().__init__(profile, roll)

    def start(self) -> None:
        operations = worker.Operations(
            STATE,
            {},
            clock=self.time,
            disk=self.disk,
            build=lambda *_: self.source(),
            revoker=lambda *_: self.source(),
            store=lambda profile, *_: ShelfStore(self.shelf(profile)),
        )
        self.workers = InProcess(operations)
        self.journal = Journal(STATE, self.disk)
        self.broker = Broker(
            [self.profile],
            self.journal.read(),
            self.sealed() if self.keyring else {},
            self.workers,
            instance="0a1b2c3d",
            wrap_key=WRAP_KEY if self.keyring else None,
            locked=() if self.keyring else {self.profile.name},
            keeps=True,
            mints={self.profile.name},
            clock=self.time,
            roll=self.roll,
            reread=self.journal.read,
        )

    def sealed(self) -> dict[str, Sealed]:
        """Read the cache, as a worker's `open` does."""
        name = self.profile.name
        message = {"id": 0, "op": "load", "profile": name, "wrap_key": WRAP_KEY.reveal()}
        reply = json.loads(json.dumps(worker.answer(self.workers.operations, message)))
        sealed = Sealed.read(reply["ok"]["cached"]) if "ok" in reply else None
        return {} if sealed is None else {name: sealed}

    def unlock(self) -> None:
        """Open the keyring; the daemon looks at it now."""
        self.keyring = True
        self.broker.unlock(WRAP_KEY, "OS keyring", self.sealed())

    def turn(self) -> datetime | None:
        try:
            started = len(self.effects)
            while True:
                wake = self.broker.turn(self.most)
                if not self.broker.busy and (wake is None or wake > self.time.read().wall):
                    return wake
                assert len(self.effects) - started < 300, f"no end: {self.effects[-12:]}"
                self.broker.take(self.workers.receive(0))
                self.watch()
        except Crash:
            self.start()
            return self.broker.now()

    def rest(self) -> None:
        """Compare with who looks at all profiles: the daemon sleeps at most 1 s longer."""
        wake = self.turn()
        now = self.time.read().wall
        due = self.broker.turn()
        if self.broker.busy:
            due = now
            self.turn()
        if due is not None and (wake is None or wake > max(due, now) + timedelta(seconds=1)):
            self.overslept.append(f"at {now} it would have slept until {wake}, not {due}")

    def set_clock(self, seconds: float) -> None:
        """Set the wall clock; the kernel tells the daemon of that."""
        self.time.error += seconds
        self.broker.clock_was_set()

    def ask(self) -> str | None:
        """A client asks, and waits if there is no key; the daemon answers when it is settled."""
        name = self.profile.name
        found = self.broker.handout(name)
        if found is None:
            self.broker.ask(name)
            self.turn()
            found = self.broker.handout(name)
        if found is None:
            return None
        self.handed_out.append(HandedOut(self.time.true, found.secret.reveal()))
        return found.secret.reveal()
